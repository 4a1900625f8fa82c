"""Layouts of other software: `import_published` reads them, and `vestige.export` writes them.

Each layout has a file with its reader and its writer; what an export format and a reader of ground truth are is said
in `vestige.registry` and `vestige.banks`. The names are imported on first use, so that help costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vestige_recipes.interop.importing import detect_layout as detect_layout, import_published as import_published
    from vestige_recipes.interop.similarities import (
        PublishedProducts as PublishedProducts,
        published_products as published_products,
    )

_FILES = {
    "PublishedProducts": "similarities",
    "detect_layout": "importing",
    "import_published": "importing",
    "published_products": "similarities",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_FILES)}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
