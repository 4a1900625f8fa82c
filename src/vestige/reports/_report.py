"""A run directory in, one HTML file out."""

from pathlib import Path

from vestige.errors import UserError
from vestige.reports._render import page_of
from vestige.storage import make_folder, remove_strays_of, write_durably

GENERATOR = '<meta name="generator" content="vestige'
"""Marks a page as ours: only such a file is overwritten without asking."""


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run as one HTML file that opens anywhere, without a network, and return its path.

    Args:
        run: A run directory, as `attribute` or `audit` writes it.
        out: The file to write, or a folder to put `report.html` in; by default `RUN/report.html`.

    Raises:
        UserError: `run` is no run directory, `out` is a file that Vestige did not write, or cannot be written.
    """
    target = _target(Path(run), out)
    page = page_of(Path(run))
    make_folder(target.parent)
    remove_strays_of(target)
    write_durably(target, [page.encode()])
    return target


def _target(run: Path, out: str | Path | None) -> Path:
    """Return the file to write, refusing to replace a file that Vestige did not make."""
    target = Path(out) if out is not None else run / "report.html"
    if target.is_dir():
        target = target / "report.html"
    if target.exists():
        ours = False
        if target.is_file():  # a pipe would be waited for
            with target.open(encoding="utf-8", errors="replace") as file:
                ours = GENERATOR in file.read(2000)
        if not ours:
            raise UserError(
                f"{target} exists and is not a Vestige report; it was left as it is.\n"
                f"Type: vestige report {run} --out {target.with_name('report.html')}"
            )
    return target
