"""`vestige precondition`."""

from vestige.registry import command
from vestige.settings import PreconditionSettings
from vestige.terminal import say


@command("precondition", PreconditionSettings, function="vestige.curvature:precondition", order=40, sweepable=True)
def precondition(settings: PreconditionSettings) -> None:
    """Measure the curvature of an index, and precondition its gradients.

    `vestige attribute` measures it by itself when it is missing. Interrupted at any moment, the same command continues.
    """
    from vestige.curvature import precondition as measure

    fisher = measure(**settings.arguments())
    sizes = [len(block.matrix) for block in fisher.blocks]
    say(f"{settings.index}: Fisher matrices of {len(sizes)} components, {min(sizes)} to {max(sizes)} numbers wide.")
    if settings.out is not None:
        say(f"Preconditioned gradients: {settings.out}")
