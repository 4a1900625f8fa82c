"""The passes of an audit as work plans: whoever looks at which examples, and whenever, leaves the same numbers."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vestige.audit._extraction import extraction, greedy
from vestige.audit._job import AuditJob
from vestige.audit._look import Tensors, joined, look, total_losses
from vestige.audit._subjects import Subject, is_adapter
from vestige.audit._weights import weight_norms
from vestige.data import TokenizedData, plan_batches, tokenize
from vestige.index import tokens_at_most
from vestige.launch import Compute, PieceFiles, phase, run_plan, step_done, worker_command
from vestige.settings import LaunchSettings

FORMAT = 1
"""Raised when a piece of the same settings changes its meaning."""
PIECE_TOKENS = 2**16
"""Tokens of a piece: minutes of work that a kill loses at most."""
_OF_THE_OUTPUT = frozenset(
    {"out", "overwrite", "bank", "bank_subset", "bank_value", "flag", "memorized_at", "choose_layer", "measures"}
)
"""Settings that decide no pass through a model."""

Passes = list[Tensors]


@dataclass(frozen=True)
class LookPlan:
    """Every subject's look at every example; a piece is one subject and some batches."""

    job: AuditJob
    name: str = "Measuring"
    unit: str = "examples"

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects and the reference model, times groups of batches."""
        return self._subjects * len(self.groups)

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """Batches of each piece."""
        return grouped(self.job.data.lengths, plan_batches(self.job.data.lengths, self.job.token_budget))

    def is_done(self, piece: int) -> bool:
        """Whether what was seen is there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Its examples."""
        return sum(map(len, self.groups[piece % len(self.groups)]))

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """One model at a time."""
        prepared: dict[str, TokenizedData] = {}

        def compute(piece: int) -> None:
            number, group = divmod(piece, len(self.groups))
            batches = self.groups[group]
            if number < len(self.job.subjects):
                self.files.write(piece, self._looked(self.job.subjects[number], batches))
            else:
                if not prepared:
                    prepared["reference"] = self._reference_data()
                self.files.write(piece, self._compared(prepared["reference"], np.concatenate(batches)))

        yield compute

    def reduce(self) -> Passes:
        """What was seen of each subject, and last of the reference model if there is one, in the order of the rows.

        States of hidden layers are left on disk, for whoever measures a layer.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        return [self._read(number) for number in range(self._subjects)]

    def run(self) -> Passes:
        """The result; killed before, the same call continues."""
        return ran(self, self.files)

    def states(self, number: int, layer: int) -> np.ndarray:
        """Hidden states of all examples at a layer, float32 [example hidden], in the order of the rows."""
        from safetensors import safe_open

        parts, rows = [], []
        for group in range(len(self.groups)):
            with safe_open(self.files.path(number * len(self.groups) + group), "pt") as file:
                parts.append(file.get_tensor(f"states_{layer}").numpy())
                rows.append(file.get_tensor("rows").numpy())
        whole = np.empty((len(self.job.data), parts[0].shape[1]), dtype=np.float32)
        whole[np.concatenate(rows)] = np.concatenate(parts)
        return whole

    @cached_property
    def files(self) -> PieceFiles:
        """Where pieces are."""
        return PieceFiles(self.folder / "measuring", digest(self.job, [list(map(len, group)) for group in self.groups]))

    @property
    def _subjects(self) -> int:
        return len(self.job.subjects) + ("perplexity_ratio" in self.job.wanted)

    def _looked(self, subject: Subject, batches: Sequence[np.ndarray]) -> Tensors:
        model = self.job.models.of(subject.source).model
        found = []
        for rows in batches:
            seen = look(model, self.job, rows)
            if "extraction" in self.job.wanted:
                seen |= self._extracted(model, rows)
            found.append({"rows": torch.from_numpy(rows), **seen})
            step_done(len(rows))
        return joined(found)

    def _extracted(self, model: torch.nn.Module, rows: np.ndarray) -> Tensors:
        settings = self.job.settings
        texts = [self.job.data.input_ids[row] for row in rows]
        found = extraction(texts, greedy(model), prefixes=settings.prefixes, continuation=settings.continuation)
        return {
            f"extraction_{prefix}": torch.from_numpy(values)
            for prefix, values in zip(found.prefixes, found.similarity, strict=True)
        }

    def _reference_data(self) -> TokenizedData:
        """The examples as the reference model's own tokenizer cuts them."""
        loaded = self.job.models.of(self.job.settings.reference_model)
        limit = tokens_at_most(self.job.settings, loaded)
        tokenizer = loaded.tokenizer or self.job.tokenizer
        return tokenize(
            self.job.data.examples, tokenizer, max_length=limit, name="reference", chat=self.job.settings.chat
        )

    def _compared(self, data: TokenizedData, rows: np.ndarray) -> Tensors:
        model = self.job.models.of(self.job.settings.reference_model).model
        losses = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        for places in plan_batches(data.lengths[rows], self.job.token_budget):
            losses[places] = total_losses(model, data, rows[places])
            step_done(len(places))
        # A text that either model saw a part of only is not the same text.
        whole = ~(data.truncated[rows] | self.job.data.truncated[rows]) & (data.target_counts[rows] > 0)
        return {"rows": torch.from_numpy(rows), "total_loss": torch.where(torch.from_numpy(whole), losses, torch.nan)}

    def _read(self, number: int) -> Tensors:
        count = len(self.groups)
        parts = [self.files.read(piece) for piece in range(number * count, (number + 1) * count)]
        names = [name for name in parts[0] if not name.startswith("states_")]
        whole = joined({name: part[name] for name in names} for part in parts)
        rows = whole.pop("rows")
        return {name: torch.empty_like(values).index_copy_(0, rows, values) for name, values in whole.items()}


@dataclass(frozen=True)
class NormsPlan:
    """Norms of every subject's weights and of their change since the first."""

    job: AuditJob
    name: str = "Norms"
    unit: str = "models"

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects."""
        return len(self.job.subjects)

    def is_done(self, piece: int) -> bool:
        """Whether the subject's norms are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:  # noqa: ARG002
        """One model."""
        return 1

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """The first subject's weights are kept for as long as others are compared with them."""
        start: dict[str, Tensor] = {}

        def compute(piece: int) -> None:
            if piece and not start:
                start.update(self._weights(0))
            weights = self._weights(piece)
            norms, _ = weight_norms(weights)
            found = {"norms": torch.tensor(norms, dtype=torch.float64)}
            if piece:
                found["change"] = torch.tensor(weight_norms(weights, start)[0], dtype=torch.float64)
            self.files.write(piece, found)
            step_done(1)

        yield compute

    def reduce(self) -> Passes:
        """Norms, and change, of each subject.

        Raises:
            CorruptFile: One is missing or damaged.
        """
        return [self.files.read(piece) for piece in range(self.pieces)]

    def run(self) -> Passes:
        """The result; killed before, the same call continues."""
        return ran(self, self.files)

    @cached_property
    def files(self) -> PieceFiles:
        """Where pieces are."""
        return PieceFiles(self.folder / "norms", digest(self.job, "norms"))

    def _weights(self, number: int) -> dict[str, Tensor]:
        """LoRA matrices if there are any, else every weight; copies, for the model may be let go."""
        model = self.job.models.of(self.job.subjects[number].source).model
        adapter = is_adapter(model)
        return {
            name: weight.detach().cpu().clone()
            for name, weight in model.named_parameters()
            if not adapter or "lora_" in name
        }


def grouped(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Batches in groups of `PIECE_TOKENS` tokens, or a little more."""
    groups: list[list[np.ndarray]] = [[]]
    tokens = 0
    for rows in batches:
        if tokens >= PIECE_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(rows)
        tokens += int(lengths[rows].sum())
    return groups


def ran(plan: Any, files: PieceFiles) -> Any:
    """The plan's result; what an earlier run left and is damaged is made again."""
    settings = plan.job.settings
    files.forget_damaged(range(plan.pieces))
    with phase(plan.name, plan.unit) as done:
        done.extend(round(plan.weight(piece)) for piece in range(plan.pieces) if not plan.is_done(piece))
        return run_plan(plan, settings, worker_command(settings, "audit"))


def digest(job: AuditJob, more: Any) -> str:
    """sha256 of everything that decides what is seen."""
    ignored = _OF_THE_OUTPUT | set(LaunchSettings.model_fields)
    recorded = {name: value for name, value in job.settings.record().items() if name not in ignored}
    looked = [each for each in job.wanted if each in ("extraction", "perplexity_ratio", "smi", "psmi", "mahalanobis")]
    subjects = [each.fingerprint for each in job.subjects]
    choices = hashlib.sha256(
        job.choices.place.tobytes() + job.choices.tokens.tobytes() + job.classes.tobytes()
    ).hexdigest()
    models = (subjects, job.reference_fingerprint)
    parts = (FORMAT, version("vestige"), recorded, looked, models, job.data.fingerprint, choices, job.layers, more)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def partial_folder(out: Path) -> Path:
    """Where what has been seen is kept until the run is written."""
    whole = Path(out).absolute()
    return whole.with_name(f".{whole.name}.partial")
