"""`vestige import`."""

from vestige.registry import command
from vestige.settings import ImportSettings
from vestige.terminal import say


@command("import", ImportSettings, function="vestige.index:import_published", order=190)
def import_(settings: ImportSettings) -> None:
    """Turn gradients or scores that other software has published into an index or a run."""
    from vestige.index import import_published

    say(import_published(**settings.arguments()).folder)
