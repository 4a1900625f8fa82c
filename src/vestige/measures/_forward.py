"""The forward passes of an audit: one pass of a model over a batch feeds every measure, in pieces that a kill spares.

Hidden states are written by the passes, read layer by layer, and gone as soon as they are measured. A round has as many
checkpoints as `ROUND_BYTES` hold, and their layers are measured before the next round. That depends on nothing but the
job, so that every worker, on every machine, has the same rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.data import NO_TARGET, TokenizedData, make_batch, plan_batches, tokenize
from vestige.gradients import FittingBatches
from vestige.jobs import PieceFiles, Tensors, group_items, is_worker, step_done
from vestige.measures._choices import encoding_of
from vestige.measures._extraction import greedy, predict
from vestige.measures._job import AuditJob
from vestige.measures._measure import (
    MEASURES,
    TOTAL_LOSS,
    Batch,
    ChoiceLogits,
    Generation,
    States,
    TokenScores,
    token_scores,
)
from vestige.measures._pieces import piece_files, run_audit_pieces
from vestige.models import batch_sharing
from vestige.storage import check_disk, partial_folder

Batches = list[np.ndarray]

PIECE_TOKENS = 2**16
"""Tokens of a piece: minutes of work that a kill loses at most."""
ROUND_BYTES = 2**33
"""States that lie on disk at once, those of one checkpoint apart, which may be more."""
_CHUNK_NUMBERS = 2**24
"""Logits that are measured in float64 at once."""
_NUMBER_BYTES = 4


@torch.no_grad()
def measure_batch(model: nn.Module, job: AuditJob, rows: Int[np.ndarray, "row"]) -> Tensors:
    """Compute measures of some examples, float64 [row], their states at the layers, float32 [row hidden], and `rows`.

    Loss summed over target tokens is always among them. NaN where an example has no target, no answer or no choices.
    """
    batch = make_batch(job.data, rows).to(next(model.parameters()).device)
    output: Any = model(input_ids=batch.input_ids, output_hidden_states=bool(job.layers), use_cache=False)
    # Position t of these predicts the token at position t + 1.
    logits, labels = output.logits[:, :-1], batch.labels[:, 1:]
    scores = score_targets(logits, labels)
    first, last = (torch.from_numpy(each[rows]).to(labels.device)[:, None] for each in job.answers)
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)[None]
    given = Batch(scores, (positions >= first) & (positions < last), _choice_logits(logits, job, rows))
    found = {TOTAL_LOSS: -scores.log_probability.sum(1)}
    for each in job.at("pass"):
        found |= each.columns(each.compute(given))
    texts = [job.data.input_ids[row] for row in rows]
    for each in job.at("generation"):
        found |= each.columns(each.compute(Generation(texts, greedy(model), predict(model), job.settings)))
    found = {name: values.double().cpu() for name, values in found.items()}
    found["rows"] = torch.from_numpy(rows)
    predicting = torch.from_numpy(_predicting_positions(job, rows))
    for layer in job.layers:
        states = output.hidden_states[layer]
        found[f"states_{layer}"] = states[torch.arange(len(rows)), predicting.to(states.device)].float().cpu()
    return found


@torch.no_grad()
def total_losses(
    model: nn.Module, data: TokenizedData, rows: Int[np.ndarray, "row"], token_budget: int
) -> Float[Tensor, "row"]:
    """Return the loss of each example summed over its target tokens, nats, float64; batch by batch."""
    losses = torch.full((len(rows),), torch.nan, dtype=torch.float64)
    device, fitting = next(model.parameters()).device, FittingBatches(data.lengths)

    def run(part: Int[np.ndarray, "row"]) -> Float[Tensor, "row"]:
        batch = make_batch(data, part).to(device)
        logits: Any = model(input_ids=batch.input_ids, use_cache=False).logits
        return -score_targets(logits[:, :-1], batch.labels[:, 1:]).log_probability.sum(1).cpu()

    for chosen in plan_batches(data.lengths[rows], token_budget, sharing=batch_sharing(model)):
        losses[chosen] = torch.cat(fitting.run(rows[chosen], run))
        step_done(len(chosen))
    return losses


def score_targets(
    logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]
) -> TokenScores:
    """Score the targets, few of them in float64 at once."""
    wanted = labels != NO_TARGET
    step = max(1, _CHUNK_NUMBERS // logits.shape[-1])
    chunks = zip(logits[wanted].split(step), labels[wanted].split(step), strict=True)
    parts = [torch.cat(token_scores(values[None], targets[None])[:3]) for values, targets in chunks]
    filled = torch.zeros((3, *labels.shape), dtype=torch.float64, device=labels.device)
    filled[:, wanted] = torch.cat(parts, dim=1)
    log_probability, standardised, gap = filled
    return TokenScores(log_probability, standardised, gap, wanted)


def _choice_logits(logits: Tensor, job: AuditJob, rows: np.ndarray) -> ChoiceLogits:
    """Return the logits of the choices of the rows that have some."""
    choices = job.choices
    known = np.flatnonzero(choices.known[rows])
    chosen = rows[known]
    positions = torch.from_numpy(choices.position[chosen] - 1)
    at = logits[torch.from_numpy(known).to(logits.device), positions.to(logits.device)].double().cpu()
    tokens, right, offered = (
        torch.from_numpy(each[chosen]) for each in (choices.tokens, choices.right, choices.offered)
    )
    return ChoiceLogits(known, at.gather(1, tokens), right, offered)


def _predicting_positions(job: AuditJob, rows: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    """Return the position whose state is measured: before the deciding token, the answer, or a text's last token."""
    first, known, targets = job.answers[0][rows], job.choices.known[rows], job.data.targets
    ends = np.array([int(np.flatnonzero(targets[row])[-1]) if targets[row].any() else 1 for row in rows])
    return np.where(known, job.choices.position[rows], np.where(first > 0, first, ends)) - 1


def join(parts: Sequence[Tensors]) -> Tensors:
    """Join the tensors of several batches into those of one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def run_passes(job: AuditJob) -> tuple[list[Tensors], list[dict[int, Tensors]], Tensors | None]:
    """Measure every example under every subject, and the reference model; what is done already is not done again.

    Returns:
        Measures of every subject; those of its hidden states, by layer; and those of the reference model. All are in
        the order of the rows.

    Raises:
        DiskSpaceError: Hidden states of a round do not fit on the disk.
    """
    total, lengths = len(job.subjects), job.data.lengths
    batches = plan_batches(lengths, job.token_budget, sharing=job.sharing)
    groups = group_items(batches, lambda rows: int(lengths[rows].sum()), PIECE_TOKENS)
    files = piece_files(job, "measuring", [list(map(len, each)) for each in groups])
    size = max(1, ROUND_BYTES // max(_NUMBER_BYTES * len(job.data) * sum(job.widths), 1))
    turns = [range(first, min(first + size, total)) for first in range(0, total, size)]
    rounds = [
        _Round(job, groups, files, turn, f" {number} of {len(turns)}" if len(turns) > 1 else "")
        for number, turn in enumerate(turns, 1)
    ]
    if job.layers and not is_worker():
        advice = (
            f"These are hidden states of {len(job.data):,} examples at {len(job.layers)} layers, gone once they are "
            "measured. Free space, choose another --out, name fewer --layers, or measure none: --measures loss "
            "logit_gap."
        )
        check_disk(partial_folder(job.settings.out), max(each.missing_bytes() for each in rounds), advice)
    subjects, layers = list[Tensors](), list[dict[int, Tensors]]()
    for each in rounds:
        subjects += each.run_passes()
        layers += each.measure_layers() if job.layers else [{} for _ in each.subjects]
        for number in each.subjects:
            each.state_files(number).remove()
    reference = subjects.pop() if job.needs("reference model") else None
    return subjects, layers, reference


@dataclass(frozen=True)
class _Round:
    """Subjects whose passes and layers are measured, and whose states are removed, before others; the last has more."""

    job: AuditJob
    groups: Sequence[Batches]
    files: PieceFiles
    subjects: range
    suffix: str
    """Of the names of its work, where there are several rounds."""

    def run_passes(self) -> list[Tensors]:
        """Measure each subject of the round, and with the last one the reference model."""
        job, count = self.job, len(self.groups)
        end = self.subjects.stop + (self.subjects.stop == len(job.subjects) and job.needs("reference model"))
        reference = cache(self._tokenize_for_reference)

        def compute(number: int) -> Tensors:
            turn, place = divmod(number, count)
            if turn == len(job.subjects):
                return self._compare(reference(), np.concatenate(self.groups[place]))
            return self._measure(turn, place)

        def is_complete(number: int) -> bool:
            turn, place = divmod(number, count)
            if turn == len(job.subjects) or not job.layers:
                return True
            return self.state_files(turn).is_done(place) or self._is_measured(turn)

        if job.layers:
            # A layer that is measured again needs the states again: that has to be known before the pass.
            self._layer_files.forget_damaged(self._layer_numbers(self.subjects))
            for turn in self.subjects:
                self.state_files(turn).forget_damaged(range(count))
        numbers = range(self.subjects.start * count, end * count)
        name = f"Measuring{self.suffix}"
        found = run_audit_pieces(job, name, "examples", self.files, numbers, compute, self._count_examples, is_complete)
        return [_in_order(found[begin : begin + count]) for begin in range(0, len(found), count)]

    def measure_layers(self) -> list[dict[int, Tensors]]:
        """Measure the states of the round's subjects, layer by layer; they are on disk."""
        layers = self.job.layers

        def compute(number: int) -> Tensors:
            turn, position = divmod(number, len(layers))
            return self._measure_layer(self._read_states(turn, layers[position]))

        numbers = self._layer_numbers(self.subjects)
        name = f"Layers{self.suffix}"
        found = iter(run_audit_pieces(self.job, name, "layers", self._layer_files, numbers, compute))
        return [{layer: next(found) for layer in layers} for _ in self.subjects]

    def state_files(self, turn: int) -> PieceFiles:
        """Return the files of one subject's states, in the pieces in which the examples are measured."""
        return PieceFiles(partial_folder(self.job.settings.out) / "states" / f"{turn:05d}", self.files.input)

    def missing_bytes(self) -> int:
        """Return the size of the states that are not on disk and still needed."""
        sizes = [_NUMBER_BYTES * sum(map(len, each)) * sum(self.job.widths) for each in self.groups]
        wanted = [self.state_files(turn) for turn in self.subjects if not self._is_measured(turn)]
        return sum(size for files in wanted for place, size in enumerate(sizes) if not files.is_done(place))

    @cached_property
    def _layer_files(self) -> PieceFiles:
        """The files of the measures of states: a piece for each subject and layer."""
        return piece_files(self.job, "layers", ["layers", self.job.settings.choose_layer])

    def _layer_numbers(self, turns: range) -> range:
        return range(turns.start * len(self.job.layers), turns.stop * len(self.job.layers))

    def _is_measured(self, turn: int) -> bool:
        """Return whether the subject's states are no longer needed."""
        return all(map(self._layer_files.is_done, self._layer_numbers(range(turn, turn + 1))))

    def _count_examples(self, number: int) -> int:
        return sum(map(len, self.groups[number % len(self.groups)]))

    def _measure(self, turn: int, place: int) -> Tensors:
        """Measure one piece of one subject, and write its states."""
        model = self.job.models.of(self.job.subjects[turn].source).model
        fitting, parts = FittingBatches(self.job.data.lengths), list[Tensors]()
        for rows in self.groups[place]:
            parts += fitting.run(rows, lambda part: measure_batch(model, self.job, part))
            step_done(len(rows))
        found = join(parts)
        states = {name: found.pop(name) for name in [*found] if name.startswith("states_")}
        if states:
            self.state_files(turn).write(place, {"rows": found["rows"], **states})
        return found

    def _measure_layer(self, values: np.ndarray) -> Tensors:
        """Return the measures of states, fitted on the data's own examples; and what is known of the layer itself."""
        job, choice = self.job, self.job.settings.choose_layer
        measures = job.at("states")
        if choice != "last" and choice not in [each.name for each in measures]:
            measures.append(MEASURES.find(choice))
        states = States(values, job.held_out, job.classes, not job.no_classes, job.settings)
        found: dict[str, np.ndarray] = {"layer": np.zeros(1)}
        for each in measures:
            found |= each.columns(each.compute(states))
        return {name: torch.from_numpy(column) for name, column in found.items()}

    def _read_states(self, turn: int, layer: int) -> np.ndarray:
        """Read hidden states of all examples at a layer, float32 [example hidden], in the order of the rows."""
        from safetensors import safe_open

        parts = []
        for place in range(len(self.groups)):
            with safe_open(self.state_files(turn).path(place), "pt") as file:
                parts.append({"rows": file.get_tensor("rows"), "states": file.get_tensor(f"states_{layer}")})
        return _in_order(parts)["states"].numpy()

    def _tokenize_for_reference(self) -> TokenizedData:
        """Return the examples as the reference model's own tokenizer cuts them."""
        job = self.job
        loaded = job.models.of(job.settings.reference_model)
        tokenizer = loaded.tokenizer or job.tokenizer
        return tokenize(job.data.examples, tokenizer, name="reference", **encoding_of(job.settings, loaded))

    def _compare(self, data: TokenizedData, rows: np.ndarray) -> Tensors:
        """Return the losses of some examples under the reference model; NaN for one that either model saw partly."""
        job = self.job
        losses = total_losses(job.models.of(job.settings.reference_model).model, data, rows, job.token_budget)
        whole = ~(data.truncated[rows] | job.data.truncated[rows]) & (data.target_counts[rows] > 0)
        return {"rows": torch.from_numpy(rows), TOTAL_LOSS: torch.where(torch.from_numpy(whole), losses, torch.nan)}


def _in_order(parts: Sequence[Tensors]) -> Tensors:
    """Join the pieces of one subject and put them in the order of the rows."""
    whole = join(parts)
    rows = whole.pop("rows")
    return {name: torch.empty_like(values).index_copy_(0, rows, values) for name, values in whole.items()}
