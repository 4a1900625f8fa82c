"""Imports that wait until they are needed: names of a package, and torch, which takes seconds to import."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package whose `__init__` imports its names for type checkers.

    What stands there under `if TYPE_CHECKING:` is imported name by name, when one is first used: a command pays for the
    modules that it runs, not for those that lie beside them.

    Args:
        package: Its `__name__`; its module is the one being imported.
    """
    module = sys.modules[package]
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    guarded = [node for part in tree.body if isinstance(part, ast.If) for node in part.body]
    origins = {
        alias.asname or alias.name: (str(node.module), alias.name)
        for node in guarded
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in origins:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        origin, original = origins[name]
        value = getattr(import_module(origin), original)
        setattr(module, name, value)
        return value

    return find, lambda: sorted({*vars(module), *origins}), list(origins)


class _Module:
    """A module that is imported when something in it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


if not TYPE_CHECKING:
    torch = _Module("torch")
