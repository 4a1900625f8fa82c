"""`vestige index`."""

from vestige.cli._command import command
from vestige.settings import IndexSettings


@command(IndexSettings)
def index(settings: IndexSettings) -> None:
    """Store the compressed gradient of every training example.

    The estimate of time, memory and disk is printed before work starts. Interrupted at any moment, the same
    command continues; with other settings it is refused and says what differs.
    """
    import vestige

    made = vestige.index(**settings.arguments())
    print(f"{made.manifest}")
