"""Compressors that are trained: `vestige index` finds the coordinates of a stage that names no file of them.

They are trained before the index has a manifest, one component after another, from whole gradients of some examples
under the model that is indexed. The result is one file in the index's folder, which moves with it; the spec in the
manifest names it with the digest of its content, so that rows and queries never meet other coordinates.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.compress import CompressionSpec, Stage, Stream, parse_spec, permutation
from vestige.data import make_batch, plan_batches
from vestige.distributed import FSDP
from vestige.errors import DataError, SpecError, UserError, WorkElsewhere
from vestige.gradients import CausalLoss, FittingBatches, GradientPass, GradientSink
from vestige.indexes._inputs import Inputs, batch_tokens
from vestige.indexes._work import BEGUN, TRAINED
from vestige.jobs import PieceFiles, Pieces, Tensors, cut_ranges, run_pieces, step_done, tensor_pieces
from vestige.models import Component, batch_sharing
from vestige.progress import announce, format_bytes
from vestige.settings import IndexSettings
from vestige.storage import require_no_others

_FORMAT = 1
"""Raised when the same settings come to other coordinates."""
_GROUP_NUMBERS = 2**26
"""Numbers of whole gradients that are held at once, unless one component has more."""


def train_spec(
    settings: IndexSettings,
    inputs: Inputs,
    spec: CompressionSpec,
    begun: CompressionSpec | None,
    command: Sequence[str] | None,
) -> CompressionSpec:
    """Train the stage of the spec that has to be trained, and return the spec with the file of it.

    What was trained for the spec of an index that is there already, `begun`, is used again.

    Raises:
        DataError: There are too few examples, or a component has no gradient to choose from.
        SpecError: Another stage stands before the one to train, or the model is sharded.
        UserError: The folder holds other files, or the gradients do not fit into memory.
        WorkElsewhere: Other shares of the command have components to train.
    """
    if begun is not None:
        # A spec that differs is refused with the settings that differ, before anything is trained for it.
        return begun if begun.forget_trained() == spec else spec
    number, stage = next((number, stage) for number, stage in enumerate(spec.stages) if stage.is_untrained)
    _require_first(stage, number, settings)
    require_no_others(settings.out, BEGUN)
    file = _Training(settings, inputs, stage)
    try:
        note = run_pieces(file.pieces(), settings, command)
    except WorkElsewhere as elsewhere:
        raise WorkElsewhere(f"{elsewhere} Or start every share again: each then computes its rows.") from None
    if note:
        announce(note)
    stages = [f"{stage.text},file=@{TRAINED}/{file.path.name}", *(other.text for other in spec.stages[1:])]
    return parse_spec(" | ".join(stages), settings.out)


def _require_first(stage: Stage, number: int, settings: IndexSettings) -> None:
    if number:
        raise SpecError(
            f"'{stage.text}' is trained on whole gradients, and another stage stands before it. Put it first, or name "
            "a file of coordinates of what that stage keeps."
        )
    if settings.device == FSDP:
        raise SpecError(
            f"'{stage.text}' is trained on whole gradients, which --device {FSDP} holds in parts. Train it with "
            f"--device balanced, and name the file here: '{stage.text},file=OTHER-INDEX/{TRAINED}/...'."
        )


class _Training:
    """The training of one stage for every component that it shrinks."""

    def __init__(self, settings: IndexSettings, inputs: Inputs, stage: Stage) -> None:
        self._settings, self._inputs, self._stage = settings, inputs, stage
        drawn = permutation(Stream(settings.seed, "trained on"), len(inputs.data))[: stage.training.examples]
        self._data = inputs.data.subset(drawn.sort().values.numpy())
        self._parts = [part for part in inputs.selection.components if stage.shrinks(part.shape)]
        named = [[part.name, *part.shape] for part in self._parts]
        decides = [_FORMAT, stage.text, inputs.loaded.fingerprint, self._data.fingerprint, named, settings.seed]
        self._input = hashlib.sha256(json.dumps([*decides, settings.loss]).encode()).hexdigest()
        self.path: Path = settings.out / TRAINED / f"{stage.name}-{self._input[:16]}.safetensors"

    def pieces(self) -> Pieces[str]:
        """Return the work: a piece passes the examples through the model once, for some components."""
        groups = _group(self._parts, len(self._data))
        files = PieceFiles(self.path.with_suffix(""), self._input)
        write = self._stage.kind.write
        assert write is not None, "a kind that is trained writes what was trained"

        @contextmanager
        def open_training() -> Iterator[Callable[[int], Tensors]]:
            yield lambda piece: self._train([self._parts[place] for place in groups[piece]])

        def collect(found: Iterator[Tensors]) -> str:
            if self.path.exists():
                return ""
            note = write(self.path, {key: tensor for piece in found for key, tensor in piece.items()})
            files.remove()
            return note

        name, weights = f"Training {self._stage.name}", [len(group) for group in groups]
        options = {"unit": "components", "folder": self._settings.out}
        work = tensor_pieces(name, files, weights, open_training, collect, **options)
        return replace(work, is_done=lambda piece: self.path.exists() or files.is_done(piece))

    def _train(self, parts: Sequence[Component]) -> Tensors:
        """Return what was trained for these components, under their names."""
        train = self._stage.kind.train
        assert train is not None, "a stage of a kind that is trained"
        found: Tensors = {}
        for part, gradients in zip(parts, self._measure(parts), strict=True):
            stream = Stream(self._settings.seed, part.name, 0, self._stage.name)
            try:
                trained = train(gradients, self._stage.size, stream, self._stage.training)
            except DataError as error:
                raise DataError(f"{part.name}: {error}") from error
            found |= {f"{part.name}/{key}": tensor for key, tensor in trained.items()}
            step_done(1)
        return found

    def _measure(self, parts: Sequence[Component]) -> list[Float[Tensor, "example _out _in"]]:
        """Return whole gradients of the examples for each component, on the CPU."""
        model, lengths = self._inputs.loaded.model, self._data.lengths
        device = next(model.parameters()).device
        found = [torch.empty(len(self._data), *part.shape) for part in parts]
        sink = GradientSink(parts)
        most = max(1, _GROUP_NUMBERS // sum(part.size for part in parts))
        budget = batch_tokens(self._settings, self._inputs.loaded)
        with GradientPass(model, parts, CausalLoss(self._settings.loss)) as gradient_pass:

            def run(rows: Int[np.ndarray, "example"]) -> None:
                sink.begin(len(rows), device)
                gradient_pass.run(make_batch(self._data, rows).to(device), sink)
                for kept, gradients in zip(found, sink.gradients, strict=True):
                    kept[torch.from_numpy(rows)] = gradients.cpu()

            fitting = FittingBatches(lengths)
            for rows in plan_batches(lengths, budget, most, sharing=batch_sharing(model)):
                fitting.run(rows, run)
        return found


def _group(parts: Sequence[Component], examples: int) -> list[range]:
    """Return places of components, group by group, whose gradients of the examples are held at once.

    UserError if those of one component, and as much again to train on, do not fit into memory.
    """
    free = psutil.virtual_memory().available
    for part in parts:
        if (needed := 8 * examples * part.size) > free:
            raise UserError(
                f"To train on {examples} whole gradients of {part.name} takes {format_bytes(needed)} of memory, "
                f"and {format_bytes(free)} are free. Write a smaller examples=N into the spec, select other "
                "--components, or keep random coordinates with 'mask'."
            )
    return cut_ranges([examples * part.size for part in parts], _GROUP_NUMBERS)
