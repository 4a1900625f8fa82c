"""`vestige evaluate WHAT`: how far scores, and what they are computed from, can be trusted."""

from vestige.registry import Command, make_command
from vestige.settings import (
    ComponentsSettings,
    LdsSettings,
    MislabelSettings,
    OverlapSettings,
    RandomisationSettings,
    RemovalSettings,
    RetrievalSettings,
    SelectionSettings,
    Settings,
    SketchSettings,
    SourcesSettings,
    TailPatchSettings,
)


def _evaluation(kind: str, settings: type[Settings], order: int) -> Command:
    function = f"vestige.evaluate:{kind.replace('-', '_')}"
    return make_command(f"evaluate {kind}", settings, function=function, order=order, sweepable=True)


lds = _evaluation("lds", LdsSettings, 10)
sources = _evaluation("sources", SourcesSettings, 20)
removal = _evaluation("removal", RemovalSettings, 30)
tail_patch = _evaluation("tail-patch", TailPatchSettings, 40)
mislabel = _evaluation("mislabel", MislabelSettings, 50)
retrieval = _evaluation("retrieval", RetrievalSettings, 60)
randomisation = _evaluation("randomisation", RandomisationSettings, 70)
overlap = _evaluation("overlap", OverlapSettings, 80)
selection = _evaluation("selection", SelectionSettings, 90)
sketch = _evaluation("sketch", SketchSettings, 100)
components = _evaluation("components", ComponentsSettings, 110)
