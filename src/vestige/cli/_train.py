"""`vestige train`, `vestige bank` and `vestige select`."""

from vestige.registry import command
from vestige.settings import BankSettings, SelectSettings, TrainSettings
from vestige.terminal import say, show


@command("train", TrainSettings, function="vestige.training:train", order=20, sweepable=True)
def train(settings: TrainSettings) -> None:
    """Train a model, in full or by LoRA, and keep what attribution and audit need.

    Checkpoints at fractions of epochs with the optimizer's state, the order of the examples, their losses, and, with
    --alarm, the list of those about to be memorized while the training goes on. Interrupted at any moment, the
    same command continues; with other settings it is refused, with the difference shown.
    """
    from vestige.training import train as run

    say(run(**settings.arguments()))


@command("bank", BankSettings, function="vestige.banks:bank", order=50, sweepable=True)
def bank(settings: BankSettings) -> None:
    """Train many models on parts of the data, and store what each makes of every example and query.

    Without a way of leaving out, the parts are random subsets. Interrupted at any moment, the same command continues;
    more --subsets or --seeds extend the bank; with other settings it is refused, with the difference shown.
    """
    from vestige.banks import bank as build

    made = build(**settings.arguments())
    say(f"{settings.out}: {made!r}, id {made.id}")


@command("select", SelectSettings, function="vestige.selection:select", order=90, sweepable=True)
def select(settings: SelectSettings) -> None:
    """Choose which examples to train on.

    By the scores of a run, by gradients, or at random: a smaller data set with a reason for every example in it.
    """
    from vestige.selection import select as choose

    show(choose(**settings.arguments()))
