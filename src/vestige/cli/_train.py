"""`vestige train`."""

from vestige.registry import command
from vestige.settings import TrainSettings
from vestige.terminal import say


@command("train", TrainSettings, function="vestige.training:train", order=20, sweepable=True)
def train(settings: TrainSettings) -> None:
    """Train a model, in full or by LoRA, and keep what attribution and audit need.

    Checkpoints at fractions of epochs with the optimizer's state, the order of the examples, their losses, and, with
    --alarm, the list of those about to be memorized while the training goes on. Interrupted at any moment, the
    same command continues; with other settings it is refused, with the difference shown.
    """
    from vestige.training import train as run

    say(run(**settings.arguments()))
