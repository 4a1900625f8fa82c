"""Layouts of other software: `import_published` reads them, and `vestige.export` writes them.

Each layout has a file with its reader and its writer; what an export format and a reader of ground truth are is said
in `vestige.registry` and `vestige.banks`.
"""

from vestige_recipes.interop.importing import import_published as import_published
from vestige_recipes.interop.similarities import (
    PublishedProducts as PublishedProducts,
    published_products as published_products,
)
