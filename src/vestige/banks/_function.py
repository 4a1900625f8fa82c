"""A bank of anything that can be trained: the caller's function stands in for the language model."""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vestige.banks._design import make_design
from vestige.banks._files import FORMAT, BankManifest, Measured, list_subsets, remove_bank
from vestige.banks._plan import BankPlan, Run, prepare_manifest
from vestige.banks._store import Bank, Texts
from vestige.errors import SpecError
from vestige.launch import is_worker, run_plan
from vestige.settings import LaunchSettings

TrainFunction = Callable[[np.ndarray, int], np.ndarray | Measured]
"""From rows to train on, sorted, and a seed to the losses of the queries [query], or to several columns by name, such
as `query_loss`, `query_margin`, `example_loss`."""


def bank_of(
    train: TrainFunction,
    *,
    examples: int | Sequence[str],
    queries: int | Sequence[str],
    out: str | Path,
    settings: Mapping[str, Any],
    subsets: int = 50,
    fraction: float = 0.5,
    sources: Sequence[str] | None = None,
    leave_source_out: bool = False,
    leave_out: Mapping[str, Sequence[int]] | None = None,
    leave_one_out: int | None = None,
    groups: Sequence[str | int] | None = None,
    seeds: int = 2,
    seed: int = 0,
    retries: int = 0,
    overwrite: bool = False,
    launch: LaunchSettings | None = None,
    command: Sequence[str] | None = None,
) -> Bank:
    """Make a bank of models that `train` trains: the same folder, the same `Bank`, for any model and framework.

    Killed at any moment, the same call continues; called in several processes at once, they share the work.

    Args:
        train: Trains on rows with a seed, and returns what is measured, in float64.
        examples: How many there are to train on, or their ids.
        queries: How many losses `train` returns, or their ids.
        out: Folder of the bank.
        settings: Everything that the numbers follow from, in JSON terms: the data by a name or a hash, the model, the
            recipe. It becomes the bank's identity together with the text of `train` itself, and a bank made with other
            settings is refused.
        subsets: Random subsets, unless something is left out.
        fraction: Share of the examples in each.
        sources: Of the examples.
        leave_source_out: Everything, then all but each source.
        leave_out: Everything, then all but each of these lists of rows.
        leave_one_out: Everything, then all but one, for N examples.
        groups: Which group each example belongs to: random subsets hold, and `leave_one_out` leaves out, all of a group
            or none of it. Copies of one example belong together, or what it teaches is never left out. Not given:
            each is a group of its own.
        seeds: Runs of each subset.
        seed: Of the subsets and the runs.
        retries: How often a run that raised is tried again.
        overwrite: Delete a bank that is already there.
        launch: Where the models are trained, `retries` included; None for this process.
        command: Words of a command that comes to the same call in another process; workers need one.

    Raises:
        SpecError: Settings that JSON cannot hold, or two ways to leave out.
        IndexMismatch: The bank in `out` was made with other settings.
        PieceFailed: `train` raised, or returned losses that are not finite; all other members are done.
    """
    if sum([leave_source_out, leave_out is not None, leave_one_out is not None]) > 1:
        raise SpecError("leave_source_out, leave_out and leave_one_out each need a bank of their own.")
    out, texts = Path(out), (_texts(examples, sources), _texts(queries, None))
    numbers = _number(groups, len(texts[0].ids))
    if overwrite and not is_worker():
        remove_bank(out)
    lists = None if leave_out is None else {name: np.array(rows) for name, rows in leave_out.items()}
    design = make_design(
        texts[0].ids,
        texts[0].sources,
        numbers,
        seed,
        fraction=fraction,
        leave_source_out=leave_source_out,
        leave_out=lists,
        leave_one_out=leave_one_out,
    )
    wanted = design(subsets if leave_one_out is None else leave_one_out + 1)
    paired = leave_source_out or leave_out is not None or leave_one_out is not None
    identity = _identify(train, texts, settings) | {"fraction": None if paired else fraction, "seed": seed}
    manifest, chosen = prepare_manifest(out, BankManifest(identity, list_subsets(wanted), seeds, {}), design)

    def train_member(run: Run) -> Measured:
        result = train(run.rows.copy(), run.seed)
        return result if isinstance(result, Mapping) else {"query_loss": np.asarray(result)}

    plan = BankPlan(out, manifest, chosen, texts, seed, train_member, paired)
    if not is_worker():
        plan.prepare()
    return run_plan(plan, launch or LaunchSettings.model_validate({"retries": retries}), command)


def _number(groups: Sequence[str | int] | None, count: int) -> np.ndarray:
    if groups is None:
        return np.arange(count)
    if len(groups) != count:
        raise SpecError(f"There are {len(groups)} groups for {count} examples.")
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([number[group] for group in groups], dtype=np.int64)


def _texts(given: int | Sequence[str], sources: Sequence[str] | None) -> Texts:
    ids = [str(row) for row in range(given)] if isinstance(given, int) else list(given)
    if sources is not None and len(sources) != len(ids):
        raise SpecError(f"There are {len(sources)} sources for {len(ids)} examples.")
    known: list[str | None] = [None] * len(ids) if sources is None else [*sources]
    return Texts(ids, known, [None] * len(ids), np.ones(len(ids), dtype=np.int64))


def _identify(train: TrainFunction, texts: tuple[Texts, Texts], settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(settings)))
    except TypeError as error:
        raise SpecError(f"settings: {error}. Give numbers, texts, lists and mappings of them.") from error
    counts = {"examples": len(texts[0].ids), "query_count": len(texts[1].ids)}
    names = {"ids": hashlib.sha256(repr(texts[0].ids + texts[1].ids).encode()).hexdigest()[:16]}
    clash = {"format", "function", "fraction", "seed", *counts, *names} & set(plain)
    if clash:
        raise SpecError(f"settings: {', '.join(sorted(clash))} are names that the bank itself uses. Choose others.")
    return {"format": FORMAT, "function": _source(train), **counts, **names, **plain}


def _source(function: TrainFunction) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):
        return name
    return f"{name} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
