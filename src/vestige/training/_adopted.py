"""Finished trainings of `vestige train` as the models of a bank: what they share, and who was trained on what."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks import Member, Subset
from vestige.data import TokenizedData
from vestige.errors import DataError, IndexMismatch, SpecError, UserError, differences
from vestige.indexes import read_data
from vestige.models import LoadedModel, load_model
from vestige.settings import BankSettings, TrainSettings
from vestige.training._examples import ALARM_OFF, as_learned, repeat_settings, require_inputs
from vestige.training._store import RECORD, TrainingRun

_OF_EACH = ("seed", "split_seed")
"""What the trainings of a bank may differ in."""
_NAMES = {"data": "learned", "loss": "learn"}
"""What a bank's identity calls what a training's names otherwise."""
_OF_BANKS = ("format", "model", "examples")


@dataclass(frozen=True)
class Adopted:
    """Trainings that form a bank."""

    settings: TrainSettings
    """Of the first of them."""
    loaded: LoadedModel
    """From which they began."""
    data: TokenizedData
    learned: TokenizedData
    """The same with what was learned as targets."""
    common: dict[str, Any]
    """What all of their identities share, in JSON terms."""
    subsets: list[Subset]
    runs: list[list[TrainingRun]]
    """Of each subset, ascending by seed."""

    @property
    def seeds(self) -> int:
        """Trainings of each subset."""
        return len(self.runs[0])

    def find(self, member: Member) -> Path:
        """Return the folder of the model of a member."""
        return list(self.runs[member.subset][member.seed].checkpoints.values())[-1]


def adopt_trainings(settings: BankSettings) -> Adopted:
    """Return the trainings in the folders of `--from-trainings` as a bank's, with their model and data."""
    runs = list(_find_trainings(settings.from_trainings))
    if not runs:
        raise DataError(f"There is no training of `vestige train` in {', '.join(map(str, settings.from_trainings))}.")
    first, common = runs[0], _share(runs[0])
    for run in runs:
        if "seconds" not in run.record or not run.checkpoints:
            raise DataError(f"The training in {run.folder} is not finished. Type its `vestige train` command again.")
        if found := differences(common, _share(run), first.record["names"], run.record["names"]):
            words = "; ".join(f"{one.field} {one.old} and {one.new}" for one in found)
            raise IndexMismatch(
                f"{first.folder} and {run.folder} differ in more than --split-seed and --seed: {words}. Name trainings "
                "with the same settings."
            )
    trained = repeat_settings(first, model=settings.model, data=settings.data)
    loaded = load_model(trained.model, tokenizer=trained.tokenizer, precision=trained.precision, device=settings.device)
    data = read_data(trained, trained.data, loaded)
    learned, _ = as_learned(data, trained.loss, loaded)
    require_inputs(first, loaded, learned)
    common = {_NAMES.get(name, name): value for name, value in common.items() if name not in _OF_BANKS}
    return Adopted(trained, loaded, data, learned, common, *_arrange(runs, data))


def _find_trainings(folders: Sequence[Path]) -> Iterator[TrainingRun]:
    for folder in folders:
        places = [folder] if (folder / RECORD).is_file() else sorted(path.parent for path in folder.rglob(RECORD))
        for place in places:
            with suppress(UserError):  # results of other commands
                run = TrainingRun.open(place)
                if run.id is not None:
                    yield run


def _share(run: TrainingRun) -> dict[str, Any]:
    other = (*_OF_EACH, "checkpoints", "losses", *ALARM_OFF)
    return {name: value for name, value in run.record["identity"].items() if name not in other}


def _arrange(runs: Sequence[TrainingRun], data: TokenizedData) -> tuple[list[Subset], list[list[TrainingRun]]]:
    """Return a subset for each set of members, with its trainings."""
    row = {example.id: number for number, example in enumerate(data.examples)}
    found: dict[tuple[int, bytes], dict[int, TrainingRun]] = {}
    for run in runs:
        rows = np.array(sorted(row[name] for name in run.members), dtype=np.int64)
        seed, split = (int(run.record["identity"][name]) for name in _OF_EACH)
        same = found.setdefault((split, rows.tobytes()), {})
        if (twin := same.setdefault(seed, run)) is not run:
            raise SpecError(f"{twin.folder} and {run.folder} are the same training. Name one of them.")
    subsets, arranged = [], []
    for (split, members), by_seed in sorted(found.items(), key=lambda item: item[0][0]):
        words = ", ".join(map(str, sorted(by_seed)))
        subsets.append(Subset(f"split {split}, seeds {words}", np.frombuffer(members, dtype=np.int64)))
        arranged.append([by_seed[seed] for seed in sorted(by_seed)])
    counts = sorted({len(each) for each in arranged})
    if len(counts) > 1:
        raise SpecError(
            f"Some splits were trained {counts[0]} times and others {counts[-1]} times, and a bank has as many runs of "
            "each. Leave trainings out, or make those that are missing."
        )
    return subsets, arranged
