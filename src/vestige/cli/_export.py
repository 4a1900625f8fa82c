"""`vestige export`."""

from vestige.cli._command import command
from vestige.settings import ExportSettings


@command(ExportSettings)
def export(settings: ExportSettings) -> None:
    """Copy the gradients of an index to NumPy, Arrow or Parquet files."""
    from vestige.index import Index, export_index

    for path in export_index(Index.open(settings.path), settings.out, settings.to):
        print(path)
