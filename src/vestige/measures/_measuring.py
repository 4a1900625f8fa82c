"""The passes of an audit as work plans: the numbers do not depend on the process that computes a piece."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vestige.data import TokenizedData, plan_batches, tokenize
from vestige.indexes import tokens_at_most
from vestige.launch import Compute, PieceFiles, step_done
from vestige.measures._job import AuditJob
from vestige.measures._look import TOTAL_LOSS, Tensors, joined, look, total_losses
from vestige.measures._pieces import digest, ran
from vestige.measures._states import Round, is_measured, layer_files, layer_pieces, state_files
from vestige.measures._subjects import Subject
from vestige.models import batch_sharing
from vestige.storage import partial_folder

PIECE_TOKENS = 2**16
"""Tokens of a piece: minutes of work that a kill loses at most."""
Passes = list[Tensors]


@dataclass(frozen=True)
class LookPlan:
    """Every subject's measurements of every example; a piece is one subject and some batches."""

    job: AuditJob
    part: Round
    """Which subjects; the last round takes the reference model too."""
    unit: str = "examples"

    @property
    def name(self) -> str:
        """The name of the work."""
        return self.part.named("Measuring")

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects and the reference model, times groups of batches."""
        return (self._end - self.part.first) * len(self.groups)

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """Batches of each piece."""
        lengths = self.job.data.lengths
        return grouped(lengths, plan_batches(lengths, self.job.token_budget, sharing=self.job.sharing))

    def is_done(self, piece: int) -> bool:
        """Return whether the measurements are there, and the states too, unless these are needed no more."""
        number, group = self._place(piece)
        if not self.files.is_done(number * len(self.groups) + group):
            return False
        if number >= len(self.job.subjects) or not self.job.layers:
            return True
        return self._states(number).is_done(group) or is_measured(self.job, self._layer_files, number)

    def weight(self, piece: int) -> float:
        """Return the number of the piece's examples."""
        return sum(map(len, self.groups[piece % len(self.groups)]))

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open one model at a time."""
        prepared: dict[str, TokenizedData] = {}

        def compute(piece: int) -> None:
            number, group = self._place(piece)
            batches, place = self.groups[group], number * len(self.groups) + group
            if number < len(self.job.subjects):
                seen = self._looked(self.job.subjects[number], batches)
                states = {name: seen.pop(name) for name in [*seen] if name.startswith("states_")}
                if states:
                    self._states(number).write(group, {"rows": seen["rows"], **states})
                self.files.write(place, seen)
            else:
                if not prepared:
                    prepared["reference"] = self._reference_data()
                self.files.write(place, self._compared(prepared["reference"], np.concatenate(batches)))

        yield compute

    def reduce(self) -> Passes:
        """Return the measurements of each subject, and last of the reference model if there is one, in the rows' order.

        States of hidden layers are left on disk, for the measures by layer (`states`, `forget_states`).

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        return [self._read(number) for number in range(self.part.first, self._end)]

    def run(self) -> Passes:
        """Return the result; after a kill, the same call continues."""
        first, end, count = self.part.first, self._end, len(self.groups)
        self.files.forget_damaged(range(first * count, end * count))
        if self.job.layers:
            # A layer that is measured again needs the states again: that has to be known before the pass.
            self._layer_files.forget_damaged(layer_pieces(self.job, first, self.part.end))
            for number in range(first, self.part.end):
                self._states(number).forget_damaged(range(count))
        return ran(self)

    def forget_states(self) -> None:
        """Delete the states of this round from the disk."""
        for number in range(self.part.first, self.part.end):
            self._states(number).remove()

    def states(self, number: int, layer: int) -> np.ndarray:
        """Read hidden states of all examples at a layer, float32 [example hidden], in the order of the rows."""
        from safetensors import safe_open

        parts, rows = [], []
        for group in range(len(self.groups)):
            with safe_open(self._states(number).path(group), "pt") as file:
                parts.append(file.get_tensor(f"states_{layer}").numpy())
                rows.append(file.get_tensor("rows").numpy())
        whole = np.empty((len(self.job.data), parts[0].shape[1]), dtype=np.float32)
        whole[np.concatenate(rows)] = np.concatenate(parts)
        return whole

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the pieces."""
        return PieceFiles(self.folder / "measuring", digest(self.job, [list(map(len, group)) for group in self.groups]))

    @cached_property
    def _layer_files(self) -> PieceFiles:
        return layer_files(self.job)

    @property
    def _end(self) -> int:
        last = self.part.number == self.part.of
        return self.part.end + (last and self.job.needs("reference model"))

    def _place(self, piece: int) -> tuple[int, int]:
        """Return subject and group of batches."""
        turn, group = divmod(piece, len(self.groups))
        return self.part.first + turn, group

    def _states(self, number: int) -> PieceFiles:
        return state_files(self.job, number, self.files.input)

    def _looked(self, subject: Subject, batches: Sequence[np.ndarray]) -> Tensors:
        model = self.job.models.of(subject.source).model
        found = []
        for rows in batches:
            found.append({"rows": torch.from_numpy(rows), **look(model, self.job, rows)})
            step_done(len(rows))
        return joined(found)

    def _reference_data(self) -> TokenizedData:
        """Return the examples as the reference model's own tokenizer cuts them."""
        loaded = self.job.models.of(self.job.settings.reference_model)
        limit = tokens_at_most(self.job.settings, loaded)
        tokenizer = loaded.tokenizer or self.job.tokenizer
        return tokenize(
            self.job.data.examples,
            tokenizer,
            max_length=limit,
            name="reference",
            chat=bool(self.job.settings.chat),
            vocabulary=loaded.vocabulary,
        )

    def _compared(self, data: TokenizedData, rows: np.ndarray) -> Tensors:
        model = self.job.models.of(self.job.settings.reference_model).model
        losses = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        for places in plan_batches(data.lengths[rows], self.job.token_budget, sharing=batch_sharing(model)):
            losses[places] = total_losses(model, data, rows[places])
            step_done(len(places))
        # A text that either model saw a part of only is not the same text.
        whole = ~(data.truncated[rows] | self.job.data.truncated[rows]) & (data.target_counts[rows] > 0)
        return {"rows": torch.from_numpy(rows), TOTAL_LOSS: torch.where(torch.from_numpy(whole), losses, torch.nan)}

    def _read(self, number: int) -> Tensors:
        count = len(self.groups)
        parts = [self.files.read(piece) for piece in range(number * count, (number + 1) * count)]
        whole = joined(parts)
        rows = whole.pop("rows")
        return {name: torch.empty_like(values).index_copy_(0, rows, values) for name, values in whole.items()}


def grouped(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Return batches in groups of `PIECE_TOKENS` tokens, or a little more."""
    groups: list[list[np.ndarray]] = [[]]
    tokens = 0
    for rows in batches:
        if tokens >= PIECE_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(rows)
        tokens += int(lengths[rows].sum())
    return groups
