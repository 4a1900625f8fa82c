"""`vestige sweep`."""

from vestige.registry import command
from vestige.settings import SweepSettings
from vestige.terminal import show


@command("sweep", SweepSettings, function="vestige.sweep:sweep", order=130, status="vestige.sweep:sweep_status")
def sweep(settings: SweepSettings) -> None:
    """Run a verb over a grid of settings.

    Every cell is checked before the first one runs. Its folder is named after its settings, so an interrupted sweep
    continues and a grown grid keeps what it had. A cell that fails is reported with its log, and the others go on.
    """
    from vestige.sweep import sweep as run

    show(run(**settings.arguments()), file_width=160)
