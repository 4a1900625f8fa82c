"""`vestige cancel`."""

from vestige.registry import command
from vestige.settings import CancelSettings
from vestige.terminal import say


@command("cancel", CancelSettings, order=170)
def cancel(settings: CancelSettings) -> None:
    """End the work on an index or a run, in processes of this host and on SLURM; what is finished stays.

    The command that began it continues it later.
    """
    from vestige.launch import cancel_jobs

    say("\n".join(cancel_jobs(settings.path)) or f"Nothing is at work on {settings.path}.")
