"""Which verbs can be swept: everything that takes its settings and leaves a folder."""

from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

from vestige.errors import SpecError
from vestige.settings import (
    EVALUATIONS,
    PREPARATIONS,
    AttributeSettings,
    AuditSettings,
    BankSettings,
    IndexSettings,
    PreconditionSettings,
    SelectSettings,
    Settings,
    StudySettings,
    TrainSettings,
    UntracSettings,
    nearest,
)


class Verb(NamedTuple):
    """What a cell runs."""

    name: str
    """As it is typed after `vestige`."""
    settings: type[Settings]
    room: str
    """Module that holds its function, imported when a cell runs."""
    refuses_its_own: bool = False
    """Whether it writes its run in the end, at once, and refuses a folder that holds one, also the same."""

    def run(self, settings: Settings) -> None:
        """The verb has done its work."""
        function = self.name.rpartition(" ")[2].replace("-", "_")
        getattr(import_module(self.room), function)(**settings.arguments())


def _group(word: str, room: str, kinds: Mapping[str, type[Settings]]) -> dict[str, Verb]:
    return {f"{word} {kind}": Verb(f"{word} {kind}", settings, room) for kind, settings in kinds.items()}


_VERBS = {
    verb.name: verb
    for verb in (
        Verb("index", IndexSettings, "vestige.index"),
        Verb("precondition", PreconditionSettings, "vestige.curvature"),
        Verb("bank", BankSettings, "vestige.bank"),
        Verb("attribute", AttributeSettings, "vestige.methods", refuses_its_own=True),
        Verb("train", TrainSettings, "vestige.train"),
        Verb("select", SelectSettings, "vestige.select"),
        Verb("audit", AuditSettings, "vestige.audit", refuses_its_own=True),
        Verb("untrac", UntracSettings, "vestige.unlearn", refuses_its_own=True),
        Verb("study", StudySettings, "vestige.studies"),
    )
} | {**_group("evaluate", "vestige.evaluate", EVALUATIONS), **_group("data", "vestige.prepare", PREPARATIONS)}


def find_verb(name: str) -> Verb:
    """The verb of this name.

    Raises:
        SpecError: There is none that could be swept.
    """
    if name not in _VERBS:
        hint = nearest(name, list(_VERBS)).replace("Known settings", "Verbs to sweep over")
        raise SpecError(f"There is no verb {name!r} to sweep over. {hint}")
    return _VERBS[name]
