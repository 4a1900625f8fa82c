"""What `vestige evaluate` can evaluate: one row a kind. Its settings' docstring is the help of its command.

`vestige evaluate tail-patch` takes the settings of its row and calls `vestige.evaluate.tail_patch`.
"""

from vestige.settings._base import Settings
from vestige.settings._evaluate_components import ComponentsSettings
from vestige.settings._evaluate_scores import (
    LdsSettings,
    MislabelSettings,
    OverlapSettings,
    RandomisationSettings,
    RemovalSettings,
    RetrievalSettings,
    SourcesSettings,
    TailPatchSettings,
)
from vestige.settings._evaluate_selection import SelectionSettings
from vestige.settings._evaluate_sketch import SketchSettings

EVALUATIONS: dict[str, type[Settings]] = {
    "lds": LdsSettings,
    "sources": SourcesSettings,
    "removal": RemovalSettings,
    "tail-patch": TailPatchSettings,
    "mislabel": MislabelSettings,
    "retrieval": RetrievalSettings,
    "randomisation": RandomisationSettings,
    "overlap": OverlapSettings,
    "selection": SelectionSettings,
    "sketch": SketchSettings,
    "components": ComponentsSettings,
}
