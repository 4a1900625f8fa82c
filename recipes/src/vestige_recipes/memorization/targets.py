"""Targets: models trained on random halves of some examples, with what each shows at the trigger and at the end."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from vestige.banks import Bank, bank_of
from vestige.errors import CorruptFile, IndexMismatch
from vestige.measures import evidence_table, read_evidence, write_evidence
from vestige.storage import make_folder, write_durably

TRIGGER = 0.05
"""The alarm goes off when the median training loss is below this share of its start."""

Examples = TypeVar("Examples")
Measures = dict[str, Float[np.ndarray, "example"]]
Early = Callable[[Measures, int], None]
"""Takes measures of a target's own examples at the trigger, and when that was."""
Train = Callable[[np.ndarray, int, Early], tuple[Measures, int]]
"""From rows and a seed to measures of all examples at the end, and when that was."""


class Targets(NamedTuple, Generic[Examples]):
    """A bank of models; each is a target once."""

    examples: Examples
    bank: Bank
    early: list[Measures]
    """Of each member, of the examples that it is trained on in ascending order: measures at the trigger."""
    late: list[Measures]
    """Of each member, of all examples: measures at the end."""
    moments: Int[np.ndarray, "member"]
    """When the trigger went off, in steps or epochs."""


def make_targets(
    examples: Examples,
    train: Train,
    out: Path,
    *,
    ids: Sequence[str],
    kept: Mapping[str, str],
    settings: Mapping[str, Any],
    models: int,
    seed: int,
) -> Targets[Examples]:
    """Return the bank in `out/bank` and its members' measures in `out/early` and `out/late`, made now or found there.

    Args:
        examples: What the targets are trained on.
        train: Trains one target.
        out: Folder of the targets.
        ids: Of the examples.
        kept: Names in the bank of measures at the end.
        settings: What decides the members beside rows and seeds.
        models: How many targets.
        seed: Of halves and trainings.
    """

    def run(rows: np.ndarray, run_seed: int) -> dict[str, np.ndarray]:
        def early(measures: Measures, moment: int) -> None:
            keep_measures(target_file(out / "early", rows), [ids[int(row)] for row in rows], measures, moment)

        late, moment = train(rows, run_seed, early)
        keep_measures(target_file(out / "late", rows), ids, late, moment)
        return {"query_loss": np.zeros(1), **{name: late[measure] for name, measure in kept.items()}}

    bank = bank_of(
        run, examples=ids, queries=1, out=out / "bank", settings=settings, subsets=models, seeds=1, seed=seed
    )
    early, late = (
        [kept_measures(target_file(out / moment, np.flatnonzero(own)))[1:] for own in bank.membership]
        for moment in ("early", "late")
    )
    moments = np.array([moment for _, moment in early])
    return Targets(examples, bank, [each for each, _ in early], [each for each, _ in late], moments)


def alarm(loss: Float[np.ndarray, "example"], start: Float[np.ndarray, "example"]) -> bool:
    """Return whether the median training loss has fallen below the share `TRIGGER` of what it was at the start."""
    return float(np.median(loss)) < TRIGGER * float(np.median(start))


def claim_folder(folder: Path, made_of: str) -> None:
    """Reserve the folder for trainings that are made of this and nothing else.

    Raises:
        IndexMismatch: It holds trainings of something else.
    """
    make_folder(folder)
    path, digest = folder / "made-of.txt", hashlib.sha256(made_of.encode()).hexdigest() + "\n"
    if path.exists() and path.read_text() != digest:
        raise IndexMismatch(f"{folder} holds a training of another model, plan or data. Choose another --out.")
    write_durably(path, [digest.encode()])


def target_file(folder: Path, rows: np.ndarray) -> Path:
    """Where the measures of the target that was trained on these rows are."""
    return folder / f"{hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()[:16]}.parquet"


def keep_measures(path: Path, ids: Sequence[str], measures: Mapping[str, np.ndarray], step: int) -> None:
    """One target's measures of some examples at one step are on disk."""
    make_folder(path.parent)
    write_evidence(path, [evidence_table(ids, measures, checkpoint=step)])


def kept_measures(path: Path) -> tuple[list[str], dict[str, Float[np.ndarray, "example"]], int]:
    """Ids, measures by name and the step, as `keep_measures` left them.

    Raises:
        CorruptFile: The file is not there although the model's numbers are.
    """
    if not path.exists():
        raise CorruptFile(
            f"{path} is missing, though its model is finished. Delete the study's folder and run it again."
        )
    table: pa.Table = read_evidence(path)
    names = [name for name in table.column_names if name not in ("checkpoint", "layer", "example_id")]
    found = {name: table[name].to_numpy() for name in names}
    return table["example_id"].to_pylist(), found, int(table["checkpoint"][0].as_py())
