"""`vestige bank`: from a language model and its training data to many models trained on parts of it."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from vestige.banks._design import Subset, make_design, read_lists
from vestige.banks._files import (
    FORMAT,
    MEASURES,
    BankManifest,
    Measured,
    list_subsets,
    prepare_manifest,
    read_manifest,
    remove_bank,
)
from vestige.banks._plan import BankWork, Run
from vestige.banks._store import Bank, Texts
from vestige.data import (
    NO_TARGET,
    TokenizedData,
    ask,
    describe_copies,
    load_queries,
    make_batch,
    plan_batches,
    token_groups,
    tokenize,
)
from vestige.errors import DataError, UserError
from vestige.indexes import batch_tokens, read_data, tokens_at_most
from vestige.jobs import is_one_of_several, is_worker, step_done, worker_command
from vestige.models import (
    LoadedModel,
    Lora,
    Recipe,
    Step,
    batch_sharing,
    load_model,
    save_trained,
    shuffle_batches,
    train,
    trainable_copy,
)
from vestige.progress import announce
from vestige.settings import BankSettings, with_settings
from vestige.storage import write_durably

_RECIPE = ("learning_rate", "optimizer", "momentum", "weight_decay", "schedule", "warmup", "clip")
_IDENTITY = ("epochs", "batch_size", *_RECIPE)
"""Settings that stand in a bank's identity as they were given."""
_LORA = ("lora_alpha", "lora_targets")
"""Settings that stand there where they are not the default: banks of earlier versions do not name them."""
_LEAST_DOUBT = 2.0**-52
"""A margin is the log-odds of a probability; one that float32 rounds to 1 counts as this far from it."""


@with_settings(BankSettings)
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
    queries = _read_queries(settings, loaded, data)
    _remove_old(settings)
    texts = _texts(data), _texts(queries)
    groups = _group(settings, data)
    design = _make_design(settings, texts[0], groups)
    subsets = design(settings.subsets if settings.leave_one_out is None else settings.leave_one_out + 1)
    steps = settings.steps or _count_steps(settings, subsets, len(data))
    identity = _identify(settings, loaded, data, queries, steps)
    by_lists = settings.leave_source_out or settings.leave_out_lists is not None
    if not by_lists and describe_copies(groups) is not None:
        identity["group"] = settings.group or "copies"
    names = {"model": loaded.name, "data": data.name}
    if (given := settings.queries) is not None:
        names["queries"] = given if isinstance(given, str) else type(given).__name__
    wanted = BankManifest(identity, list_subsets(subsets), settings.seeds, names)
    manifest, subsets = prepare_manifest(settings.out, wanted, design)
    parts = {"example": data} | ({} if queries is None else {"query": queries})
    budget = batch_tokens(settings, loaded)

    def train_member(run: Run) -> Measured:
        model = _train_member(settings, loaded, data, steps, run)
        found = {kind: measure(model, part, budget, mean=settings.loss == "mean") for kind, part in parts.items()}
        return {f"{kind}_{name}": values for kind, columns in found.items() for name, values in columns.items()}

    paired, keep = _leaves_out(settings), settings.keep_weights
    work = BankWork(settings.out, manifest, subsets, texts, settings.seed, train_member, paired, keep)
    if not is_worker():
        _announce(work, settings, steps)
        _announce_copies(settings, data, groups, subsets)
    return work.run(settings, worker_command(settings, "bank"))


def _remove_old(settings: BankSettings) -> None:
    if settings.overwrite and not is_worker():
        if is_one_of_several():
            raise UserError(
                "--overwrite under torchrun would have every rank delete what the others make. Delete the folder "
                "first, and run the command without --overwrite."
            )
        remove_bank(settings.out)


def _read_queries(settings: BankSettings, loaded: LoadedModel, data: TokenizedData) -> TokenizedData | None:
    """Read the queries, put to the model as the data are; None if there are none.

    Raises:
        DataError: One has no target token: a prompt without an answer has no loss.
    """
    if settings.queries is None:
        return None
    given = load_queries(settings.queries, on_bad_text=settings.on_bad_text)
    queries = tokenize(
        ask(given, data.examples, chat=settings.chat, tokenizer=loaded.tokenizer).queries,
        loaded.tokenizer,
        max_length=tokens_at_most(settings, loaded),
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


def _count_steps(settings: BankSettings, subsets: list[Subset], examples: int) -> int:
    """Return the number of optimizer steps of every member of the bank.

    The number does not depend on what is left out: removal at a fixed number of epochs would shorten the training by
    the size of what is removed, and a large source would seem to matter for its size alone.
    """
    size = len(subsets[0].rows) if _leaves_out(settings) else round(settings.fraction * examples)
    return (settings.passes or 0) * -(-size // settings.batch_size)


def _identify(
    settings: BankSettings, loaded: LoadedModel, data: TokenizedData, queries: TokenizedData | None, steps: int
) -> dict[str, Any]:
    """Return every setting and the fingerprint of every input that the numbers follow from, in JSON terms."""
    ways = {"leave_source_out": "sources", "leave_out_lists": "lists", "leave_one_out": "examples"}
    left_out = next((what for name, what in ways.items() if getattr(settings, name)), None)
    fields = BankSettings.model_fields
    return {
        "format": FORMAT,
        "model": loaded.fingerprint,
        "data": data.fingerprint,
        "queries": None if queries is None else queries.fingerprint,
        "examples": len(data),
        "query_count": 0 if queries is None else len(queries),
        "left_out": left_out,
        "fraction": None if left_out else settings.fraction,
        "seed": settings.seed,
        "steps": steps,
        "from_scratch": settings.from_scratch,
        "lora_rank": settings.lora_rank,
        **{name: value for name in _LORA if (value := getattr(settings, name)) != fields[name].default},
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "loss": settings.loss,
        **{name: getattr(settings, name) for name in _IDENTITY},
        # Not the setting as typed: a bank of the default length and one of three epochs are the same.
        "epochs": settings.passes,
    }


def _announce(work: BankWork, settings: BankSettings, steps: int) -> None:
    counts = f"{len(work.subsets)} subsets x {work.manifest.seeds} seeds"
    more = "" if work.manifest.seeds <= settings.seeds else " (as many as the bank has already)"
    announce(
        f"Bank {work.manifest.id}: {counts}{more}, {steps:,} steps of {settings.batch_size} examples each; "
        f"{len(work.texts[0].ids):,} examples and {len(work.texts[1].ids):,} queries, {len(MEASURES)} numbers of each."
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


def _train_member(settings: BankSettings, loaded: LoadedModel, data: TokenizedData, steps: int, run: Run) -> nn.Module:
    """Train a model for `run` and return it; its weights are saved if they are to be."""
    rank, every = settings.lora_rank, settings.checkpoint_every
    lora = None if rank is None else Lora(rank, settings.lora_alpha, targets=settings.lora_targets)
    model = trainable_copy(loaded, lora_rank=lora, from_scratch=settings.from_scratch, seed=run.seed)
    batches = shuffle_batches(data, run.rows, settings.batch_size, steps, run.seed)

    def after(step: Step) -> None:
        if every is not None and step.number % every == 0 and step.number < len(batches):
            content = io.BytesIO()
            torch.save({"bank": run.id, "seed": run.seed, "state": step.state()}, content)
            write_durably(run.checkpoint, [content.getbuffer()])
        step_done(1 / len(batches))

    recipe = Recipe(*(getattr(settings, name) for name in _RECIPE))
    train(model, data, batches, recipe, after, _read_state(run))
    model.requires_grad_(False)
    if run.weights is not None and not run.weights.is_dir():
        save_trained(model, loaded, run.weights)
    return model


def _read_state(run: Run) -> dict[str, Any] | None:
    """Read what an earlier attempt at the same run saved, None if there is nothing to go on from."""
    try:
        saved = torch.load(run.checkpoint, weights_only=True)
        # The seed identifies the run: one with the same name in another bank has another.
        return saved["state"] if (saved["bank"], saved["seed"]) == (run.id, run.seed) else None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
        return None


@torch.no_grad()
def measure(model: nn.Module, data: TokenizedData, token_budget: int, *, mean: bool) -> dict[str, np.ndarray]:
    """Measure loss, margin, gap and accuracy of each text, float64 [text].

    The loss is the cross-entropy summed over target tokens, or averaged if `mean`. With l the negative mean loss per
    target token, the margin is l - log(1 - e^l), the log-odds of the tokens' geometric mean probability (the output
    that TRAK measures). The gap is the target's logit minus the largest other logit, the accuracy whether it is above
    zero, both averaged over target tokens. Without a target token the loss is 0 and the rest NaN.
    """
    sums, counts = np.zeros((3, len(data))), data.target_counts
    for rows in plan_batches(data.lengths, token_budget, sharing=batch_sharing(model)):
        if counts[rows].any():
            sums[:, rows] = _sum_by_row(model, data, rows)
    averages = sums / np.where(counts > 0, counts, np.nan)
    loss = np.where(counts > 0, averages[0], 0.0) if mean else sums[0]
    return {"loss": loss, "margin": margin(averages[0]), "gap": averages[1], "accuracy": averages[2]}


def margin(mean_loss: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) where p = e^-loss."""
    return -mean_loss - np.log(np.maximum(-np.expm1(-mean_loss), _LEAST_DOUBT))


def _sum_by_row(model: nn.Module, data: TokenizedData, rows: np.ndarray) -> np.ndarray:
    """Sum losses, gaps and right answers over the target tokens of each row, float64 [3, example]."""
    batch = make_batch(data, rows).to(next(model.parameters()).device)
    wanted = batch.labels[:, 1:] != NO_TARGET
    chosen = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1][wanted].float()
    target = batch.labels[:, 1:][wanted][:, None]
    right = chosen.gather(1, target)[:, 0]
    losses = torch.logsumexp(chosen, dim=1) - right
    gaps = right - chosen.scatter(1, target, -torch.inf).amax(dim=1)
    owners = wanted.nonzero()[:, 0].cpu().numpy()

    def add_up(values: Tensor) -> np.ndarray:
        return np.bincount(owners, weights=values.double().cpu().numpy(), minlength=len(rows))

    return np.stack([add_up(each) for each in (losses, gaps, gaps > 0)])
