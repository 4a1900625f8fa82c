"""`vestige bank`: from a model and its training data to many models trained on parts of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Int

from vestige.banks._design import (
    Subset,
    random_subsets,
    read_lists,
    without_each,
    without_each_source,
    without_one,
)
from vestige.banks._manifest import FORMAT, BankManifest, read_manifest, remove_bank, subsets_shown
from vestige.banks._members import MEASURES
from vestige.banks._store import Bank, Texts
from vestige.banks._train import Trainer
from vestige.banks._work import BankPlan, TrainMember, planned_bank, prepare_bank
from vestige.data import TokenizedData, ask, describe_copies, load_queries, token_groups, tokenize
from vestige.errors import DataError, UserError
from vestige.indexes import batch_tokens, read_data, tokens_at_most
from vestige.launch import is_one_of_several, is_worker, run_plan, worker_command
from vestige.models import LoadedModel, Recipe, load_model
from vestige.progress import announce
from vestige.settings import BankSettings, verb

_CHOSEN = (
    "epochs",
    "batch_size",
    "learning_rate",
    "optimizer",
    "momentum",
    "weight_decay",
    "schedule",
    "warmup",
    "clip",
)
"""Settings that stand in a bank's identity as they were given."""
_LORA = ("lora_alpha", "lora_targets")
"""Settings that stand there where they are not the default: banks of earlier versions do not name them."""


@verb(BankSettings)
def bank(settings: BankSettings) -> Bank:
    """Train a bank of models on subsets of the training data, and measure every example and query with each.

    Interrupted at any moment, the same call continues where it stopped and gives the same numbers; more subsets or
    seeds extend it; another setting over an old bank is refused, with the difference shown.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        PieceFailed: Members failed every time they were tried; all others are done.
    """
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    data = read_data(settings, settings.data, loaded)
    return build_bank(settings, loaded, data, read_queries(settings, loaded, data))


def build_bank(settings: BankSettings, loaded: LoadedModel, data: TokenizedData, queries: TokenizedData | None) -> Bank:
    """Make a bank for a model, data and queries that are loaded already."""
    if settings.overwrite and not is_worker():
        _require_one_process()
        remove_bank(settings.out)
    groups = _groups(settings, data)
    design = _design(settings, data, groups)
    wanted = design(_wanted(settings))
    steps = settings.steps or _steps(settings, wanted, len(data))
    whole = _manifest(settings, loaded, data, queries, wanted, steps)
    if (drawn := _drawn_together(settings, groups)) is not None:
        whole = replace(whole, identity=whole.identity | {"group": drawn})
    manifest, subsets = planned_bank(settings.out, whole, design)
    trainer = Trainer(settings, _recipe(settings), steps, loaded, data, queries, batch_tokens(settings, loaded))

    @contextmanager
    def open_trainer() -> Iterator[TrainMember]:
        yield trainer.member

    texts = _texts(data), _texts(queries)
    plan = BankPlan(
        settings.out,
        manifest,
        subsets,
        texts,
        settings.seed,
        open_trainer,
        _leaves_out(settings),
        settings.keep_weights,
    )
    if not is_worker():
        _announce(plan, settings, steps)
        _announce_copies(settings, data, groups, subsets)
        prepare_bank(plan)
    return run_plan(plan, settings, worker_command(settings, "bank"))


def read_queries(settings: BankSettings, loaded: LoadedModel, data: TokenizedData) -> TokenizedData | None:
    """Read the queries, put to the model as the data are; None if there are none.

    Raises:
        DataError: One has no target token: a prompt without an answer has no loss.
    """
    if settings.queries is None:
        return None
    limit = tokens_at_most(settings, loaded)
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    asked = ask(given, data.examples, chat=settings.chat, tokenizer=loaded.tokenizer)
    queries = tokenize(
        asked.queries,
        loaded.tokenizer,
        max_length=limit,
        name="queries",
        chat=bool(settings.chat),
        vocabulary=loaded.vocabulary,
    )
    empty = np.flatnonzero(queries.target_counts == 0)
    if empty.size:
        raise DataError(
            f"Query {queries.examples[empty[0]].id!r} has no token whose loss could be measured ({empty.size} such "
            "queries). Give each a `text`, or a `completion` to its `prompt`."
        )
    return queries


def _leaves_out(settings: BankSettings) -> bool:
    return settings.leave_source_out or settings.leave_out_lists is not None or settings.leave_one_out is not None


def _wanted(settings: BankSettings) -> int:
    """Return the number of requested subsets, where they can be counted beforehand."""
    return settings.subsets if settings.leave_one_out is None else settings.leave_one_out + 1


def _groups(settings: BankSettings, data: TokenizedData) -> Int[np.ndarray, "example"]:
    """Group the examples that are drawn, or left out as one.

    A bank that was begun before this was so goes on as it was: row by row.
    """
    old = read_manifest(settings.out)
    if old is not None and "group" not in old.identity and settings.group is None:
        return np.arange(len(data))
    return token_groups(data, settings.group)


def _drawn_together(settings: BankSettings, groups: Int[np.ndarray, "example"]) -> str | None:
    """Return the grouping in the bank's identity, where subsets follow from groups: their column, or `copies`."""
    by_lists = settings.leave_source_out or settings.leave_out_lists is not None
    return None if by_lists or describe_copies(groups) is None else settings.group or "copies"


def _design(
    settings: BankSettings, data: TokenizedData, groups: Int[np.ndarray, "example"]
) -> Callable[[int], list[Subset]]:
    """Return the map from a number N to the first N subsets; where they follow from the data, to all of them."""
    ids = [example.id for example in data.examples]
    if settings.leave_source_out:
        subsets = without_each_source([example.source for example in data.examples])
        return lambda _: subsets
    if settings.leave_out_lists is not None:
        subsets = without_each(read_lists(settings.leave_out_lists, ids), len(ids))
        return lambda _: subsets
    if settings.leave_one_out is not None:
        return lambda count: without_one(ids, groups, count - 1, settings.seed)
    return lambda count: random_subsets(groups, settings.fraction, count, settings.seed)


def _steps(settings: BankSettings, subsets: list[Subset], examples: int) -> int:
    """Return the number of optimizer steps of every member of the bank.

    The number does not depend on what is left out: removal at a fixed number of epochs would shorten the training by
    the size of what is removed, and a large source would seem to matter for its size alone.
    """
    size = len(subsets[0].rows) if _leaves_out(settings) else round(settings.fraction * examples)
    return (settings.passes or 0) * -(-size // settings.batch_size)


def _recipe(settings: BankSettings) -> Recipe:
    return Recipe(
        settings.learning_rate,
        settings.optimizer,
        settings.momentum,
        settings.weight_decay,
        settings.schedule,
        settings.warmup,
        settings.clip,
    )


def _manifest(
    settings: BankSettings,
    loaded: LoadedModel,
    data: TokenizedData,
    queries: TokenizedData | None,
    subsets: list[Subset],
    steps: int,
) -> BankManifest:
    ways = {"leave_source_out": "sources", "leave_out_lists": "lists", "leave_one_out": "examples"}
    left_out = [what for name, what in ways.items() if getattr(settings, name)]
    identity = {
        "format": FORMAT,
        "model": loaded.fingerprint,
        "data": data.fingerprint,
        "queries": None if queries is None else queries.fingerprint,
        "examples": len(data),
        "query_count": 0 if queries is None else len(queries),
        "left_out": left_out[0] if left_out else None,
        "fraction": None if left_out else settings.fraction,
        "seed": settings.seed,
        "steps": steps,
        "from_scratch": settings.from_scratch,
        "lora_rank": settings.lora_rank,
        **_given(settings, _LORA),
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "loss": settings.loss,
        **{name: getattr(settings, name) for name in _CHOSEN},
        # Not the setting as typed: a bank of the default length and one of three epochs are the same.
        "epochs": settings.passes,
    }
    names = {"model": loaded.name, "data": data.name}
    names |= {} if queries is None else {"queries": _name(settings.queries)}
    return BankManifest(identity, subsets_shown(subsets), settings.seeds, names)


def _given(settings: BankSettings, names: Sequence[str]) -> dict[str, Any]:
    """Return the settings that are not the default."""
    fields = BankSettings.model_fields
    return {name: value for name in names if (value := getattr(settings, name)) != fields[name].default}


def _name(source: object) -> str:
    return str(source) if isinstance(source, str) else type(source).__name__


def _texts(data: TokenizedData | None) -> Texts:
    if data is None:
        return Texts([], [], [], np.zeros(0, dtype=np.int64))
    examples = data.examples
    return Texts(
        [example.id for example in examples],
        [example.source for example in examples],
        [example.label for example in examples],
        data.target_counts,
    )


def _announce(plan: BankPlan, settings: BankSettings, steps: int) -> None:
    counts = f"{len(plan.subsets)} subsets x {plan.manifest.seeds} seeds"
    more = "" if plan.manifest.seeds <= settings.seeds else " (as many as the bank has already)"
    announce(
        f"Bank {plan.manifest.id}: {counts}{more}, {steps:,} steps of {settings.batch_size} examples each; "
        f"{len(plan.texts[0].ids):,} examples and {len(plan.texts[1].ids):,} queries, {len(MEASURES)} numbers of each."
    )


def _announce_copies(
    settings: BankSettings, data: TokenizedData, groups: Int[np.ndarray, "example"], subsets: list[Subset]
) -> None:
    """Say how many copies there are, and where they were not kept together."""
    if (line := describe_copies(groups, settings.group)) is not None:
        announce(line)
    copies, split = token_groups(data), 0
    for subset in subsets:
        known = np.bincount(copies[subset.rows], minlength=len(data)) > 0
        split = max(split, int(known[copies].sum()) - len(subset.rows))
    if split:
        announce(
            f"Up to {split:,} of the rows that a model is trained without are copies of rows that it is trained on: it "
            "learns them nevertheless."
        )


def _require_one_process() -> None:
    if is_one_of_several():
        raise UserError(
            "--overwrite under torchrun would have every rank delete what the others make. Delete the folder first, "
            "and run the command without --overwrite."
        )
