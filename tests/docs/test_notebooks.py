"""Every notebook runs as it is in a folder with a tiny model, and is kept without outputs."""

import ast
import json
from pathlib import Path

import pytest

from tests.workshop import furnish

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"
RUN_ELSEWHERE = {"components"}
"""Run by the tests of what they read."""


def test_the_notebooks_are_these():
    names = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert names == {"first-answer", "fix-and-prove", "memorization", "components", "paraphrases"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb") if path.stem not in RUN_ELSEWHERE)
)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(furnish(tmp_path / "work"))
    names: dict[str, object] = {}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == []
        _show(_run(ast.parse("".join(cell["source"])), names))


def _run(cell: ast.Module, names: dict[str, object]) -> object:
    """Run a cell and return the value of its last line, as a notebook does."""
    last = cell.body.pop() if cell.body and isinstance(cell.body[-1], ast.Expr) else None
    exec(compile(cell, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _show(value: object) -> None:
    """Do what a notebook does to show a value."""
    repr(value)
    if (show := getattr(value, "_repr_html_", None)) is not None:
        show()
