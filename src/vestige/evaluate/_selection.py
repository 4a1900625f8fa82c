"""`vestige evaluate selection`: does training on chosen data beat training on random data of the same size?"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import t as student

from vestige.banks import EVERYTHING, Bank
from vestige.data import describe_copies, load_examples, text_groups
from vestige.errors import IndexMismatch, SpecError
from vestige.evaluate import (
    CONFIDENCE,
    Estimate,
    Evaluation,
    EvaluationRow,
    Mark,
    Value,
    bootstrap,
    estimate_mean,
    interval_figure,
    make_interval,
    require_own_files,
    retrain,
    write_evaluation,
)
from vestige.selection import SelectedData
from vestige.settings import SelectionSettings, with_settings
from vestige.storage import make_folder, write_durably
from vestige.training import steps_per_epoch

RANDOM = "random"


TrainingSets = dict[str, frozenset[str]]
"""Ids of the examples to train on, by the name of the bank's subset."""


@with_settings(SelectionSettings)
def selection(settings: SelectionSettings) -> Evaluation:
    """Measure held-out loss and accuracy after training on each chosen set, on random sets, and on everything.

    All training runs take the same number of steps from the same start, and those of one seed share their randomness.
    The trained models are a bank in OUT/bank: an interrupted evaluation continues, and further sets are added to it. In
    `settings.out`: `selection.json`, and the figure `selection`.

    Raises:
        SpecError: A chosen set is everything, two folders have one name, or no other set of that size can be drawn.
        IndexMismatch: A set was chosen from other data.
    """
    require_own_files(settings, "selection")
    examples = load_examples(settings.data, **settings.reading)
    ids, groups = [example.id for example in examples], text_groups(examples)
    chosen = _open_chosen(settings, ids)
    random = {size: _random_sets(settings, ids, groups, size) for size in sorted(set(map(len, chosen.values())))}
    for name, own in chosen.items():
        if all(each in (own, frozenset()) for each in random[len(own)].values()):
            raise SpecError(
                f"There is no random set of {len(own)} rows but {name!r} itself: too few other texts fit with "
                "all their copies. Give more data, or select with another --budget."
            )
    # Random sets come first, so that further chosen sets of the same size extend the bank.
    sets = {name: own for group in (*random.values(), chosen) for name, own in group.items()}
    truth = _train(settings, ids, sets, max(random))
    found = _Measured(settings, truth)
    gains = {name: found.gain(name, random[len(own)]) for name, own in chosen.items()}
    rows = [EvaluationRow(name, found.values([name], len(own), gains[name])) for name, own in chosen.items()]
    for size, group in random.items():
        name = RANDOM if len(random) == 1 else f"{RANDOM} {size}"
        rows.append(EvaluationRow(name, found.values(group, _rows_of(group)), opponent=True))
    rows.append(EvaluationRow(EVERYTHING, found.values([EVERYTHING], len(ids)), opponent=True))
    result = Evaluation(
        "selection",
        f"Trained on chosen data: mean loss per token, in nats, and accuracy on {len(truth.query_ids)} queries",
        tuple(rows),
        _notes(settings, truth, groups),
        {
            "gain_by_seed": {name: gain.by_seed.tolist() for name, gain in gains.items()},
            "sets": {name: sorted(own) for name, own in sets.items()},
            "losses": found.losses_by_seed(),
            "bank": truth.identity,
        },
    )
    marks = [Mark(name, gain.over_all) for name, gain in gains.items()]
    figure = interval_figure("selection", marks, "fewer nats per token than after random data (95 % intervals)")
    return write_evaluation(result, settings.out, figure, settings.report_to)


def _rows_of(sets: TrainingSets) -> int | str:
    """Return how many rows each set has; fewer where no further text fitted with all its copies."""
    sizes = list(map(len, sets.values()))
    return sizes[0] if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _notes(settings: SelectionSettings, truth: Bank, groups: Int[np.ndarray, "example"]) -> tuple[str, ...]:
    copies = describe_copies(groups)
    return (
        *([f"{copies} Random sets hold a text with all its copies or not at all."] if copies else []),
        f"{settings.seeds} training runs on each set, of {truth.identity['steps']} steps each; random: "
        f"{settings.random_sets} sets of each size.",
        "Gain: mean loss after random sets of the same size minus that after the chosen one, seed by seed; 95 % "
        f"intervals, {settings.draws} bootstrap draws of seeds, random sets and queries. Over seeds: Student's t "
        "interval of the seeds' gains.",
    )


class Gain(NamedTuple):
    """How much lower losses are than after random data."""

    over_all: Estimate
    """Interval over seeds, random sets and queries."""
    over_seeds: Estimate
    """Student's t interval of the seeds' means; NaN for a single seed."""
    by_seed: Float[np.ndarray, "seed"]


def measure_gain(
    chosen: Float[np.ndarray, "seed query"], random: Float[np.ndarray, "set seed query"], draws: int, seed: int
) -> Gain:
    """Return the mean of `random - chosen`, positive where the chosen data leave less loss, seed by seed."""
    gains = random - chosen
    by_seed = gains.mean((0, 2))

    def compute(sets: np.ndarray, seeds: np.ndarray, queries: np.ndarray) -> float:
        return gains[np.ix_(sets, seeds)].mean((0, 1))[queries].mean()

    over_all = make_interval(float(gains.mean()), bootstrap(compute, gains.shape, draws, seed))
    return Gain(over_all, _student(by_seed), by_seed)


def _student(values: Float[np.ndarray, "seed"]) -> Estimate:
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = student.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(mean, mean - float(half), mean + float(half))


class _Measured:
    """What the trained models make of the queries."""

    def __init__(self, settings: SelectionSettings, truth: Bank) -> None:
        self._settings = settings
        arrays = (truth.by_subset(values) for values in (truth.query_token_losses, truth.values("query_accuracy")))
        self._losses, self._accuracies = (dict(zip(truth.subset_names, array, strict=True)) for array in arrays)

    def gain(self, chosen: str, random: Iterable[str]) -> Gain:
        """Return the gain of a chosen set over random ones of its size."""
        others = _stack(self._losses, random)
        return measure_gain(self._losses[chosen], others, self._settings.draws, self._settings.seed)

    def values(self, sets: Iterable[str], size: int | str, gain: Gain | None = None) -> dict[str, Value]:
        """Return the columns of one row."""
        draws, seed = self._settings.draws, self._settings.seed
        found: dict[str, Value] = {
            "examples": size,
            "loss": estimate_mean(_stack(self._losses, sets).mean((0, 1)), draws, seed),
            "accuracy": estimate_mean(_stack(self._accuracies, sets).mean((0, 1)), draws, seed),
        }
        if gain is not None:
            ahead = f"{int((gain.by_seed > 0).sum())} of {len(gain.by_seed)}"
            found |= {"gain over random": gain.over_all, "over seeds": gain.over_seeds, "seeds ahead": ahead}
        return found

    def losses_by_seed(self) -> dict[str, list[float]]:
        """Return the mean loss of every set, seed by seed."""
        return {name: losses.mean(1).tolist() for name, losses in self._losses.items()}


def _stack(values: Mapping[str, np.ndarray], sets: Iterable[str]) -> Float[np.ndarray, "set seed query"]:
    return np.stack([values[name] for name in sets])


def _open_chosen(settings: SelectionSettings, ids: Sequence[str]) -> TrainingSets:
    known, names, found = set(ids), [Path(folder).name for folder in settings.selected], TrainingSets()
    for folder in map(Path, settings.selected):
        own = frozenset(SelectedData.open(folder).ids)
        if absent := own - known:
            raise IndexMismatch(
                f"{folder} holds the example {min(absent)!r}, which the data do not. Give the --data that it was "
                "chosen from."
            )
        if len(own) == len(known):
            raise SpecError(f"{folder} is all of the data: there is nothing to compare it with.")
        found[folder.name] = own
    taken = [name for name in names if name == EVERYTHING or name.startswith(f"{RANDOM} ") or names.count(name) > 1]
    if taken:
        raise SpecError(f"Selections are called by their folders' names, and {taken[0]!r} is taken. Rename one.")
    return found


def _random_sets(
    settings: SelectionSettings, ids: list[str], groups: Int[np.ndarray, "example"], size: int
) -> TrainingSets:
    """Return sets of `size` rows of random texts, each with all its copies; what does not fit is passed over."""
    sets, copies = TrainingSets(), np.bincount(groups)
    for number in range(settings.random_sets):
        generator = np.random.default_rng([settings.seed, size, number])
        first = generator.choice(len(copies), min(size, len(copies)), replace=False)
        # Without copies the first draws fill the set; else what they leave is filled from the others.
        others = generator.permutation(np.setdiff1d(np.arange(len(copies)), first))
        drawn, left = [], size
        for text in [*first, *others]:
            if copies[text] <= left:
                drawn.append(text)
                left -= copies[text]
        rows = np.flatnonzero(np.isin(groups, drawn))
        sets[f"{RANDOM} {size} #{number}"] = frozenset(ids[row] for row in rows)
    return sets


def _train(settings: SelectionSettings, ids: Sequence[str], sets: TrainingSets, largest: int) -> Bank:
    lists = {name: [each for each in ids if each not in own] for name, own in sets.items()}
    make_folder(settings.out)
    path = settings.out / "left-out.json"
    content = (json.dumps(lists) + "\n").encode()
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, [content])
    steps = settings.steps or (settings.passes or 0) * steps_per_epoch(largest, settings)
    return retrain(settings, str(path), epochs=None, steps=steps)
