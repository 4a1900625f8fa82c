"""`vestige bank`: from a language model and its training data to many models trained on parts of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import nn

from vestige.banks import (
    BANK_FORMAT,
    BANK_MEASURES,
    Bank,
    BankManifest,
    BankWork,
    Measured,
    Run,
    Subset,
    Texts,
    list_subsets,
    make_design,
    open_members,
    prepare_manifest,
    read_lists,
    read_manifest,
    remove_bank,
)
from vestige.data import (
    TokenizedData,
    describe_copies,
    token_groups,
)
from vestige.errors import DataError, IndexMismatch, differences
from vestige.indexes import batch_tokens, read_data
from vestige.jobs import is_worker, refuse_overwrite_by_ranks, step_done, worker_command
from vestige.models import LoadedModel, load_model, save_trained
from vestige.progress import announce
from vestige.settings import BankSettings, with_settings
from vestige.training._adopted import adopt_trainings
from vestige.training._engine import Rows, Step, fit, make_model
from vestige.training._examples import as_learned, measure, read_questions
from vestige.training._store import Unfinished
from vestige.training._tracking import begin_tracking, open_tracking
from vestige.training._train import steps_per_epoch

_IDENTITY = (
    *("batch_size", "learning_rate", "optimizer", "momentum", "weight_decay", "schedule", "warmup", "clip"),
    *("from_scratch", "lora_rank"),
)
"""Settings that stand in a bank's identity as they were given."""
_ADDED = (
    *("lora_alpha", "lora_dropout", "lora_targets", "accumulation", "bf16", "gradient_checkpointing"),
    *("learn", "drop_by"),
)
"""Settings that stand there where they are not the default: banks of earlier versions do not name them."""
_ENGINE = "engine"
"""What trained the members; absent from banks of earlier versions, whose loop drew batches in another order."""


@with_settings(BankSettings)
def bank(settings: BankSettings) -> Bank:
    """Train a bank of models on subsets of the training data, and measure every example and query with each.

    Interrupted at any moment, the same call continues where it stopped and gives the same numbers; more subsets or
    seeds extend it; another setting over an old bank is refused, with the difference shown.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        PieceFailed: Members failed every time they were tried; all others are done.
    """
    if settings.from_trainings:
        return _adopt(settings)
    loaded = load_model(settings.model, **settings.loading)
    data = read_data(settings, settings.data, loaded)
    queries = _read_queries(settings, loaded, data)
    learned, weights = as_learned(data, settings.learn, loaded)
    _remove_old(settings)
    texts = _texts(learned), _texts(queries)
    groups = _group(settings, data)
    design = _make_design(settings, texts[0], groups)
    subsets = design(settings.subsets if settings.leave_one_out is None else settings.leave_one_out + 1)
    steps = settings.steps or _count_steps(settings, len(data))
    identity = _identify(settings, loaded, data, queries, steps)
    if learned.fingerprint != data.fingerprint:
        identity["learned"] = learned.fingerprint
    by_lists = settings.leave_source_out or settings.leave_out_lists is not None
    if not by_lists and describe_copies(groups) is not None:
        identity["group"] = settings.group or "copies"
    wanted = BankManifest(identity, list_subsets(subsets), settings.seeds, _name_inputs(settings, loaded, data))
    if (finished := _find_finished(settings, wanted)) is not None:
        return finished
    manifest, subsets = prepare_manifest(settings.out, wanted, design)

    def train_member(run: Run) -> Measured:
        model = _train_member(settings, loaded, learned, weights, steps, run)
        return _measure_texts(settings, model, learned, queries, loaded)

    begin_tracking(settings.report_to, settings.out)
    paired, keep = _leaves_out(settings), settings.keep_weights
    work = BankWork(settings.out, manifest, subsets, texts, settings.seed, train_member, paired, keep)
    if not is_worker():
        _announce(work, settings, f"{steps:,} steps of {settings.batch_size * settings.accumulation} examples each")
        _announce_copies(settings, data, groups, subsets)
    return work.run(settings, worker_command(settings, "bank"))


def _name_inputs(settings: BankSettings, loaded: LoadedModel, data: TokenizedData) -> dict[str, str]:
    """Return what model, data and queries are called, for people."""
    names = {"model": loaded.name, "data": data.name}
    if (given := settings.queries) is not None:
        names["queries"] = given if isinstance(given, str) else type(given).__name__
    return names


def _find_finished(settings: BankSettings, wanted: BankManifest) -> Bank | None:
    """Return the bank that an earlier version has finished in the folder, None if it is to be made or extended here."""
    old = read_manifest(settings.out)
    if old is None or _ENGINE in old.identity:
        return None
    if differences(old.identity | {_ENGINE: wanted.identity[_ENGINE]}, wanted.identity, {}, {}):
        return None  # refused with what differs
    files, common = open_members(settings.out, old), len(wanted.subsets)
    larger = common > len(old.subsets) or settings.seeds > old.seeds
    if larger or not all(files.is_done(member, weights=settings.keep_weights) for member in old.members):
        raise IndexMismatch(
            f"The bank in {settings.out} was begun by an earlier version, which trained in another order: new members "
            "would differ from its own in more than their data. Give another --out, or make it again with --overwrite."
        )
    announce(f"{settings.out}: an earlier version has finished this bank; nothing was done.")
    return Bank.open(settings.out)


def _measure_texts(
    settings: BankSettings, model: nn.Module, data: TokenizedData, queries: TokenizedData | None, loaded: LoadedModel
) -> Measured:
    """Measure all examples, and the queries if there are any."""
    parts = {"example": data} | ({} if queries is None else {"query": queries})
    budget = batch_tokens(settings, loaded)
    found = {kind: measure(model, part, budget, mean=settings.loss == "mean") for kind, part in parts.items()}
    return {f"{kind}_{name}": values for kind, columns in found.items() for name, values in columns.items()}


def _adopt(settings: BankSettings) -> Bank:
    """Measure trained models, which are those of the bank; no model is trained."""
    adopted = adopt_trainings(settings)
    loaded, data = adopted.loaded, adopted.learned
    asked = {"max_length": adopted.settings.max_length, "chat": adopted.settings.chat or None}
    queries = _read_queries(settings.model_copy(update=asked), loaded, data)
    _remove_old(settings)
    identity = _identify_inputs(settings, loaded, adopted.data, queries)
    identity |= {_ENGINE: "vestige train", **adopted.common}
    wanted = BankManifest(
        identity, list_subsets(adopted.subsets), adopted.seeds, _name_inputs(settings, loaded, adopted.data)
    )
    manifest, subsets = prepare_manifest(settings.out, wanted, lambda count: adopted.subsets[:count])

    def measure_member(run: Run) -> Measured:
        trained = load_model(adopted.find(run.member), precision=adopted.settings.precision, device=settings.device)
        if run.weights is not None and not run.weights.is_dir():
            save_trained(trained.model, loaded, run.weights)
        return _measure_texts(settings, trained.model, data, queries, loaded)

    texts = _texts(data), _texts(queries)
    work = BankWork(settings.out, manifest, subsets, texts, 0, measure_member, True, settings.keep_weights)
    if not is_worker():
        _announce(work, settings, f"trained already, {adopted.common['steps']:,} steps each")
    return work.run(settings, worker_command(settings, "bank"))


def _remove_old(settings: BankSettings) -> None:
    if settings.overwrite and not is_worker():
        refuse_overwrite_by_ranks()
        remove_bank(settings.out)


def _read_queries(settings: BankSettings, loaded: LoadedModel, data: TokenizedData) -> TokenizedData | None:
    return None if settings.queries is None else read_questions(settings.queries, settings, loaded, data, "queries")


def _texts(data: TokenizedData | None) -> Texts:
    if data is None:
        return Texts([], [], [], np.zeros(0, dtype=np.int64))
    ids, sources, labels = ([getattr(one, name) for one in data.examples] for name in ("id", "source", "label"))
    return Texts(ids, sources, labels, data.target_counts)


def _leaves_out(settings: BankSettings) -> bool:
    return settings.leave_source_out or settings.leave_out_lists is not None or settings.leave_one_out is not None


def _group(settings: BankSettings, data: TokenizedData) -> Int[np.ndarray, "example"]:
    """Group the examples that are drawn, or left out as one; an old bank that was drawn row by row goes on so."""
    old = read_manifest(settings.out)
    if old is not None and "group" not in old.identity and settings.group is None:
        return np.arange(len(data))
    return token_groups(data, settings.group)


def _make_design(
    settings: BankSettings, texts: Texts, groups: Int[np.ndarray, "example"]
) -> Callable[[int], list[Subset]]:
    given = settings.leave_out_lists
    return make_design(
        texts.ids,
        texts.sources,
        groups,
        settings.seed,
        fraction=settings.fraction,
        leave_source_out=settings.leave_source_out,
        leave_out=None if given is None else read_lists(given, texts.ids),
        leave_one_out=settings.leave_one_out,
    )


def _count_steps(settings: BankSettings, examples: int) -> int:
    """Return the number of optimizer steps of every member of the bank.

    The number does not depend on what is left out: removal at a fixed number of epochs would shorten the training by
    the size of what is removed, and a large source would seem to matter for its size alone.
    """
    whole = _leaves_out(settings) or settings.drop_by == "weight"
    size = examples if whole else round(settings.fraction * examples)
    return (settings.passes or 0) * steps_per_epoch(size, settings)


def _identify(
    settings: BankSettings, loaded: LoadedModel, data: TokenizedData, queries: TokenizedData | None, steps: int
) -> dict[str, Any]:
    """Return every setting and the fingerprint of every input that the numbers follow from, in JSON terms."""
    ways = {"leave_source_out": "sources", "leave_out_lists": "lists", "leave_one_out": "examples"}
    left_out = next((what for name, what in ways.items() if getattr(settings, name)), None)
    given = settings.record()
    return {
        **_identify_inputs(settings, loaded, data, queries),
        "left_out": left_out,
        "fraction": None if left_out else settings.fraction,
        "seed": settings.seed,
        "steps": steps,
        _ENGINE: "Trainer",
        **{name: given[name] for name in _ADDED if getattr(settings, name) != BankSettings.model_fields[name].default},
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        **{name: given[name] for name in _IDENTITY},
        # Not the setting as typed: a bank of the default length and one of three epochs are the same.
        "epochs": settings.passes,
    }


def _identify_inputs(
    settings: BankSettings, loaded: LoadedModel, data: TokenizedData, queries: TokenizedData | None
) -> dict[str, Any]:
    return {
        "format": BANK_FORMAT,
        "model": loaded.fingerprint,
        "data": data.fingerprint,
        "queries": None if queries is None else queries.fingerprint,
        "examples": len(data),
        "query_count": 0 if queries is None else len(queries),
        "loss": settings.loss,
    }


def _announce(work: BankWork, settings: BankSettings, trained: str) -> None:
    counts = f"{len(work.subsets)} subsets x {work.manifest.seeds} seeds"
    more = (
        "" if work.manifest.seeds <= settings.seeds or settings.from_trainings else " (as many as the bank has already)"
    )
    announce(
        f"Bank {work.manifest.id}: {counts}{more}, {trained}; {len(work.texts[0].ids):,} examples and "
        f"{len(work.texts[1].ids):,} queries, {len(BANK_MEASURES)} numbers of each."
    )


def _announce_copies(
    settings: BankSettings, data: TokenizedData, groups: Int[np.ndarray, "example"], subsets: list[Subset]
) -> None:
    """Print how many copies there are, and where they were not kept together."""
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


def _train_member(
    settings: BankSettings,
    loaded: LoadedModel,
    data: TokenizedData,
    weights: np.ndarray | None,
    steps: int,
    run: Run,
) -> nn.Module:
    """Train a model for `run` and return it; its weights are saved if they are to be."""
    teaches = (data.target_counts > 0) & (True if weights is None else weights > 0)
    inside = np.zeros(len(data), dtype=bool)
    inside[run.rows] = True
    if not (teaches & inside).any():
        raise DataError(f"{data.name}: none of {len(run.rows)} examples has a target token: there is nothing to learn.")
    by_weight = settings.drop_by == "weight"
    rows = np.flatnonzero(teaches if by_weight else teaches & inside)
    model, every = make_model(settings, loaded, run.seed), settings.checkpoint_every
    unfinished = Unfinished(run.unfinished, run.id, run.seed)
    config, name = settings.record() | {"steps": steps, "seed": run.seed}, run.member.name

    def after(step: Step) -> None:
        tracking.log_step(step)
        if every is not None and step.number % every == 0 and step.number < steps:
            unfinished.keep(step.trainer)
        step_done(1 / steps)

    with open_tracking(settings.report_to, settings.out, config, member=name, step=unfinished.last) as tracking:
        fit(
            model,
            Rows(data, rows, weights, ~inside if by_weight else None),
            settings,
            steps=steps,
            seed=run.seed,
            after_step=after,
            resume=unfinished.path,
            tokenizer=loaded.tokenizer,
        )
    model.eval().requires_grad_(False)
    if run.weights is not None and not run.weights.is_dir():
        save_trained(model, loaded, run.weights)
    return model
