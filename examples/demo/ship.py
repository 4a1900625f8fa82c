"""`make example`: copies the run and the fix of `make demo` into the package, where `vestige demo` finds them."""

import shutil
from pathlib import Path

from examples.demo.__main__ import OUTPUT

from vestige.fixes import EXAMPLE
from vestige.progress import format_bytes

LEFT_OUT = ("models", "data", "report.html")
"""Models, copies of the rows, and the pages that `vestige demo` makes again."""


def ship(output: Path, example: Path) -> int:
    """Replace `example` by the run and the fix below `output`, and return their size in bytes."""
    if example.exists():
        shutil.rmtree(example)
    for part in ("run", "fix"):
        shutil.copytree(output / part, example / part, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return sum(path.stat().st_size for path in example.rglob("*") if path.is_file())


if __name__ == "__main__":
    print(f"{EXAMPLE}: {format_bytes(ship(OUTPUT, EXAMPLE))}")
