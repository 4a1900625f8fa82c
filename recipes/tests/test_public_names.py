"""Recipes use public names of Vestige alone."""

import ast
from pathlib import Path

import pytest

import vestige_recipes

ROOT = Path(vestige_recipes.__file__).parent


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_import_no_private_module_or_name_of_vestige(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vestige":
            words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "vestige"]
            words = [word for name in names for word in name.split(".")]
        else:
            continue
        private = [word for word in words if word.startswith("_")]
        assert not private, f"line {node.lineno} imports {', '.join(private)}"
