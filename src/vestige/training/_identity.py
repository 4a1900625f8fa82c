"""What a training is: everything that its weights and its files follow from; a changed setting is refused."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vestige.data import TokenizedData
from vestige.errors import IndexMismatch, UserError, differences, mismatch_message
from vestige.models import LoadedModel
from vestige.settings import TrainSettings
from vestige.storage import make_folder, remove_result, remove_strays, require_no_others, write_durably
from vestige.training._alarm import AT_RISK
from vestige.training._checkpoint import CHECKPOINT_FILES
from vestige.training._store import FORMAT, KIND, LOG, LOSSES, MEMBERSHIP, RECORD, read_record

_ELSEWHERE = ("model", "data", "out", "tokenizer", "device", "token_budget", "limit", "max_length", "chat")
"""Settings that do not stand in the identity as given: the fingerprints of model and data say what came of them, or
they say where the work is done."""
_ALSO_ELSEWHERE = ("overwrite", "checkpoints", "keep_optimizer", "precision", "group")
_OURS = (
    RECORD,
    LOSSES,
    MEMBERSHIP,
    f"{AT_RISK}.parquet",
    f"{AT_RISK}.jsonl",
    f"{LOG}/steps-*.parquet",
    *CHECKPOINT_FILES,
)


def identity_of(
    settings: TrainSettings, loaded: LoadedModel, data: TokenizedData, steps: int, checkpoints: list[int]
) -> dict[str, Any]:
    """Return everything that decides the result, in JSON terms; the length of the training and its checkpoints too.

    Two training runs that differ in epochs alone are different ones from the first step on, because the learning rate
    falls otherwise.
    """
    left = (*_ELSEWHERE, *_ALSO_ELSEWHERE)
    chosen = {name: value for name, value in settings.record().items() if name not in left}
    return {
        "format": FORMAT,
        "model": loaded.fingerprint,
        "data": data.fingerprint,
        "examples": len(data),
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        **chosen,
        "steps": steps,
        "checkpoints": checkpoints,
    }


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return sixteen hexadecimal digits of the sha256 over the identity."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prepare_run(folder: Path, identity: dict[str, Any], settings: TrainSettings, names: dict[str, str]) -> None:
    """Prepare the folder with the record of this training, new or as an interrupted one has left it.

    Raises:
        IndexMismatch: It holds a training with other settings; nothing was changed.
        UserError: It holds something else.
    """
    old = read_record(folder)
    if old is None:
        require_no_others(folder, ())
    else:
        _require_same(folder, old, identity, names)
    make_folder(folder)
    remove_strays(folder)
    if old is None:
        record = {
            "format": FORMAT,
            "kind": KIND,
            "vestige": version("vestige"),
            "id": identity_digest(identity),
            "command": settings.command_line("train"),
            "config": settings.record(),
            "identity": identity,
            "names": names,
        }
        write_record(folder, record)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record into `run.json`."""
    write_durably(folder / RECORD, [(json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()])


def remove_run(folder: Path) -> None:
    """Remove the training in the folder, for `--overwrite`.

    Raises:
        UserError: The folder holds files that are not a training's.
    """
    remove_result(folder, _OURS, RECORD)


def _require_same(folder: Path, old: Mapping[str, Any], identity: Mapping[str, Any], names: dict[str, str]) -> None:
    before = old.get("identity")
    if before is None:
        raise UserError(f"{folder} was recorded from a Trainer of your own. Give another --out.")
    if found := differences(before, identity, old["names"], names):
        raise IndexMismatch(mismatch_message(f"The training in {folder}", found))
