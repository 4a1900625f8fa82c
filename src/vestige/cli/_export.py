"""`vestige export`."""

from dataclasses import replace

from vestige.registry import EXPORT_FORMATS, command
from vestige.settings import ExportSettings
from vestige.terminal import say


@command("export", ExportSettings, function="vestige.indexes:export", order=180)
def _export(settings: ExportSettings) -> None:
    """Copy an index or a run into formats that other programs read."""
    from vestige.indexes import export as write

    for path in write(**settings.arguments()):
        say(path)


def _formats() -> str:
    """Return the names of the installed formats, a line for each kind of thing that has them."""
    names = [name.split() for name in EXPORT_FORMATS.names()]
    kinds = sorted({kind for kind, _ in names})
    return "\n".join(f"- {kind}: {', '.join(to for of, to in names if of == kind)}" for kind in kinds)


export = replace(_export, help=f"{_export.help}\n\nFormats by what is exported:\n\n{_formats()}")
