"""The one pass of `vestige evaluate components`: every distinct gradient is computed once, by any worker.

The queries' gradients are kept on disk as factors (a few vectors a token, less than the gradients themselves) while the
candidates' are computed, piece by piece, and multiplied with them. What stays is a table of products by component.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from pydantic import FiniteFloat
from safetensors import safe_open
from torch import Tensor

from vestige.data import Batch, make_batch
from vestige.errors import CorruptFile, NonFinite
from vestige.evaluate._components_inputs import Compared, Portion, digest
from vestige.gradients import (
    CausalLoss,
    FormingBudget,
    GradientPass,
    Gradients,
    HeldGradients,
    KeepingSink,
    OneHot,
    Piece,
    count_formed,
    matrices_of,
    numbers,
    products,
    square_norms,
)
from vestige.jobs import Compute, PieceFiles, Pieces, step_done
from vestige.methods import PooledOutputs, backbone, pool_states, tap_modules, taps_of
from vestige.parsing import as_record, parse_object
from vestige.storage import make_folder, write_durably

KINDS = ("values", "outputs", "projected", "published")
"""Gradients by component, outputs by module, projections as they should be and as they were published."""
_FORMED_BYTES = 2**29
"""Most bytes of matrices formed from the factors of one piece of queries."""
_DENSE = 0.25
"""Share of a block's pairs from which all of them are computed at once."""

Result = TypeVar("Result")


class _Passed(NamedTuple):
    """What is known of the examples of a batch after their one pass."""

    gradients: list[Gradients]
    norms: Float[Tensor, "component example"]
    """Squared."""
    outputs: list[Float[Tensor, "example _width"]]
    """Of each module, averaged over the positions that predict a target; the last hidden state at the end."""
    projected: list[Float[Tensor, "example _k"]]
    seconds: Mapping[str, float]


_RunPass = Callable[[np.ndarray], _Passed]


@contextmanager
def _open_pass(compared: Compared) -> Iterator[_RunPass]:
    """Yield the function that runs one pass over some rows; the model is tapped while the context lasts."""
    model = compared.loaded.model
    with ExitStack() as stack:
        # Entering it runs the model once, on tokens of no example.
        gradients = stack.enter_context(GradientPass(model, compared.components, CausalLoss(compared.loss)))
        modules = output_modules(compared)
        taps = [tap for tap in taps_of(compared.components) if tap.module in modules]
        outputs = stack.enter_context(tap_modules(model, taps, "mean"))
        hidden = _HiddenState()
        stack.callback(backbone(model).register_forward_hook(hidden).remove)
        yield partial(_run_pass, compared, gradients, outputs, hidden)


def output_modules(compared: Compared) -> list[str]:
    """Return the modules whose outputs are compared: all with a component, but no head that runs at targets alone."""
    head = CausalLoss(compared.loss).head_module(compared.loaded.model)
    return [tap.module for tap in taps_of(compared.components) if tap.module != head]


class _HiddenState:
    """Pools the last hidden state when the backbone returns it."""

    def begin(self, batch: Batch) -> None:
        self._labels, self.state = batch.labels, torch.zeros(len(batch.rows), 0)

    def __call__(self, _module: object, _arguments: object, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if state is not None:
            self.state = pool_states(state.detach(), self._labels, "mean")


def _run_pass(
    compared: Compared, gradient_pass: GradientPass, pooling: PooledOutputs, hidden: _HiddenState, rows: np.ndarray
) -> _Passed:
    started = time.perf_counter()
    sink = KeepingSink(compared.components)
    sink.begin(len(rows))
    batch = make_batch(compared.data, rows).to(next(compared.loaded.model.parameters()).device)
    pooling.begin(batch)
    hidden.begin(batch)
    gradient_pass.run(batch, sink)
    gradients = [_shrink(one) for one in sink.finish()]
    norms = torch.stack([square_norms(one).cpu() for one in gradients])
    outputs = [one.cpu() for one in [*pooling.collect(), hidden.state]]
    seconds = {"gradients": time.perf_counter() - started}
    projected = []
    for one in compared.projections:
        started = time.perf_counter()
        projected.append(one.apply(gradients))
        seconds[f"projection {one.plan.name}"] = time.perf_counter() - started
    if not bool(norms.isfinite().all()):
        bad = int((~norms.isfinite().all(0)).nonzero()[0, 0])
        raise NonFinite(
            f"The gradient of example {int(batch.rows[bad])} is NaN or infinite. Run `vestige doctor` with the "
            "same --model and --data, which names the cause."
        )
    return _Passed(gradients, norms, outputs, projected, seconds)


def _shrink(gradients: Gradients) -> Gradients:
    """Return the same gradients as factors or as matrices, whichever takes fewer numbers."""
    if gradients.zero or numbers(gradients) <= count_formed(gradients):
        return gradients
    return Gradients(gradients.examples, gradients.shape, (), matrices_of(gradients, slice(0, gradients.examples)))


def _one_example(gradients: Gradients, place: int) -> Gradients:
    part = slice(place, place + 1)
    if gradients.matrices is not None:
        return Gradients(1, gradients.shape, (), gradients.matrices[part])
    inside = [piece.within(part) for piece in gradients.pieces]
    return Gradients(1, gradients.shape, tuple(Piece(found[0], *found[1]) for found in inside if found is not None))


def _as_tensors(passed: _Passed, name: str) -> dict[str, Tensor]:
    """Return everything as named tensors, for a file; `_read_passed` undoes it."""
    tensors = {f"{name}.norms": passed.norms}
    tensors |= {f"{name}.output.{number}": one for number, one in enumerate(passed.outputs)}
    tensors |= {f"{name}.projected.{number}": one for number, one in enumerate(passed.projected)}
    for number, gradients in enumerate(passed.gradients):
        if gradients.matrices is not None:
            tensors[f"{name}.{number}.matrices"] = gradients.matrices
            continue
        for place, piece in enumerate(gradients.pieces):
            key = f"{name}.{number}.{place}"
            if isinstance(piece.left, OneHot):
                tensors[f"{key}.ids"] = piece.left.ids
            else:
                tensors[f"{key}.left"] = piece.left
            tensors[f"{key}.right"] = piece.right
            tensors[f"{key}.examples"] = torch.tensor([piece.examples.start, piece.examples.stop])
    # Tensors that share memory (one input of several layers) are written as what they are: tensors of their own.
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def _read_passed(tensors: Mapping[str, Tensor], name: str, compared: Compared) -> _Passed:
    device, norms = next(compared.loaded.model.parameters()).device, tensors[f"{name}.norms"]
    gradients = []
    for number, component in enumerate(compared.components):
        matrices = tensors.get(f"{name}.{number}.matrices")
        pieces: list[Piece] = []
        while matrices is None and (key := f"{name}.{number}.{len(pieces)}") + ".right" in tensors:
            ids, right = tensors.get(f"{key}.ids"), tensors[f"{key}.right"].to(device)
            left = tensors[f"{key}.left"].to(device) if ids is None else OneHot(ids.to(device), component.shape[0])
            pieces.append(Piece(slice(*tensors[f"{key}.examples"].tolist()), left, right))
        whole = None if matrices is None else matrices.to(device)
        gradients.append(Gradients(norms.shape[1], component.shape, tuple(pieces), whole))
    outputs, projected = (
        [tensors[f"{name}.{kind}.{number}"] for number in range(sum(f".{kind}." in key for key in tensors))]
        for kind in ("output", "projected")
    )
    return _Passed(gradients, norms, outputs, projected, {})


class OnePass:
    """Both jobs: the gradients of all queries as factors on disk, and the products of the candidates with them."""

    def __init__(self, compared: Compared) -> None:
        self._compared, self._checked = compared, set[int]()
        whole = compared.identity
        kept = {name: value for name, value in whole.items() if name != "pairs"}
        self._factors = PieceFiles(compared.folder / "gradients", digest(kept))
        self._table = PieceFiles(compared.folder / "products", digest(whole))
        self._sizes = [sum(map(len, batches)) for batches in compared.held]
        self._portions = [len(one.rows) for one in compared.portions]
        self.queries = self._make("Query gradients", self._factors, self._sizes, self._keep, lambda: None)
        self.products = self._make("Products", self._table, self._portions, self._multiply, self._finish)

    def _make(
        self,
        name: str,
        files: PieceFiles,
        weights: Sequence[int],
        compute: Callable[[int, _RunPass], None],
        finish: Callable[[], Result],
    ) -> Pieces[Result]:
        """Return pieces that are computed on one tapped model."""

        @contextmanager
        def open_pass() -> Iterator[Compute]:
            with _open_pass(self._compared) as run:
                yield lambda piece: compute(piece, run)

        folder = self._compared.folder
        return Pieces(name=name, folder=folder, weights=weights, is_done=files.is_done, open=open_pass, reduce=finish)

    def forget_damaged(self) -> None:
        """Undo the pieces whose bytes have changed."""
        self._factors.forget_damaged(range(len(self._sizes)))
        self._table.forget_damaged(range(len(self._portions)))

    def _keep(self, piece: int, run: _RunPass) -> None:
        """Write the gradients of one piece of queries."""
        tensors: dict[str, Tensor] = {}
        spent = []
        for number, batch in enumerate(self._compared.held[piece]):
            passed = run(batch)
            tensors |= _as_tensors(passed, str(number))
            spent.append(passed.seconds)
            step_done(len(batch))
        self._factors.write(piece, tensors)
        _write_seconds(self._compared.folder, f"queries-{piece:05d}", self._sizes[piece], spent)

    def _multiply(self, piece: int, run: _RunPass) -> None:
        """Write the products of one portion of candidates, whose gradients are never kept."""
        compared, portion = self._compared, self._compared.portions[piece]
        if portion.held is None:
            found = [run(batch) for batch in portion.batches]
        else:
            found = self._read(portion.held, range(len(portion.batches)))
        tables = _Tables(compared, portion, found)
        for number, batches in enumerate(compared.held):
            some = [
                place
                for place, rows in enumerate(batches)
                if piece == 0 or compared.wanted[np.ix_(rows, portion.rows)].any()
            ]
            for place, passed in zip(some, self._read(number, some) if some else [], strict=True):
                tables.add(batches[place], passed)
        self._table.write(piece, tables.tensors(with_queries=piece == 0))
        fresh, spent = (len(portion.rows), found) if portion.held is None else (0, [])
        seconds = [*(one.seconds for one in spent), {"products": tables.seconds}]
        _write_seconds(compared.folder, f"candidates-{piece:05d}", fresh, seconds)
        step_done(len(portion.rows))

    def _read(self, piece: int, batches: Sequence[int]) -> list[_Passed]:
        """Read some batches of a piece of queries; its bytes are compared with its marker once in a process."""
        if piece not in self._checked:
            self._factors.check(piece)
            self._checked.add(piece)
        found = []
        with safe_open(self._factors.path(piece), "pt") as file:
            for number in batches:
                keys = [key for key in file.keys() if key.startswith(f"{number}.")]  # noqa: SIM118 (not a dict)
                found.append(_read_passed({key: file.get_tensor(key) for key in keys}, str(number), self._compared))
        return found

    def _finish(self) -> list[dict[str, Tensor]]:
        """Return the tables of all pieces; delete the queries' gradients."""
        tables = [self._table.read(piece) for piece in range(len(self._portions))]
        self._factors.remove()
        return tables


class _Tables:
    """Products of a portion of candidates with all queries, in memory until they are a file."""

    def __init__(self, compared: Compared, portion: Portion, found: Sequence[_Passed]) -> None:
        self._portion, self._found = portion, found
        self._wanted = compared.wanted[:, portion.rows]
        self._weights = [one.weights_as_published().square() for one in compared.projections]
        squares = [self._squares(passed) for passed in found]
        self._norms = {kind: torch.cat([one[kind] for one in squares], dim=1) for kind in KINDS}
        shapes = {kind: (len(norms), *self._wanted.shape) for kind, norms in self._norms.items()}
        self._products = {kind: torch.zeros(shapes[kind], dtype=norms.dtype) for kind, norms in self._norms.items()}
        self._query_norms = {
            kind: torch.zeros(len(norms), len(self._wanted), dtype=norms.dtype) for kind, norms in self._norms.items()
        }
        self.seconds = 0.0

    def _vectors(self, passed: _Passed) -> dict[str, list[tuple[Tensor, Tensor | float]]]:
        """Return everything but gradients as vectors, each with the factors of its numbers in a product."""
        projected = [one.double() for one in passed.projected]
        return {
            "outputs": [(one.double(), 1.0) for one in passed.outputs],
            "projected": [(one, 1.0) for one in projected],
            "published": list(zip(projected, self._weights, strict=True)),
        }

    def _squares(self, passed: _Passed) -> dict[str, Tensor]:
        """Return squared norms of everything, [representation, example]."""
        empty = torch.zeros(0, passed.norms.shape[1], dtype=torch.float64)
        small = {
            kind: torch.stack([(one.square() * weight).sum(1) for one, weight in vectors]) if vectors else empty
            for kind, vectors in self._vectors(passed).items()
        }
        return {"values": passed.norms, **small}

    def add(self, rows: Int[np.ndarray, " row"], queries: _Passed) -> None:
        """Add the products of a batch of queries with all candidates."""
        started, place = time.perf_counter(), torch.as_tensor(rows)
        for kind, norms in self._squares(queries).items():
            self._query_norms[kind][:, place] = norms
        memory = FormingBudget(_FORMED_BYTES)
        held = [HeldGradients(one, memory, len(self._found)) for one in queries.gradients]
        start = 0
        for batch, passed in zip(self._portion.batches, self._found, strict=True):
            columns = slice(start, start + len(batch))
            start += len(batch)
            wanted = self._wanted[rows, columns]
            if not wanted.any():
                continue
            for kind, vectors in self._vectors(passed).items():
                for number, (one, weight) in enumerate(self._vectors(queries)[kind]):
                    self._products[kind][number][place, columns] = (one * weight) @ vectors[number][0].T
            values = self._products["values"]
            if wanted.mean() >= _DENSE:
                blocks = [one.products(mine).T.cpu() for one, mine in zip(held, passed.gradients, strict=True)]
                values[:, place, columns] = torch.stack(blocks).to(values.dtype)
                continue
            for query, candidate in np.argwhere(wanted).tolist():
                pairs = zip(queries.gradients, passed.gradients, strict=True)
                single = [products(_one_example(a, query), _one_example(b, candidate)).cpu() for a, b in pairs]
                values[:, rows[query], columns.start + candidate] = torch.stack(single)[:, 0, 0].to(values.dtype)
        self.seconds += time.perf_counter() - started

    def tensors(self, *, with_queries: bool) -> dict[str, Tensor]:
        """Return the tensors to write: products of the wanted pairs, ordered by query and candidate, and norms."""
        query, column = np.nonzero(self._wanted)
        rows = self._portion.rows
        pairs = np.stack([query, rows[column]], axis=1)
        widths = torch.tensor([output.shape[1] for output in self._found[0].outputs])
        tensors = {"pairs": torch.as_tensor(pairs), "rows": torch.as_tensor(rows), "widths": widths}
        for kind, table in self._products.items():
            tensors[kind] = table[:, torch.as_tensor(query), torch.as_tensor(column)]
            tensors[f"{kind}.example"] = self._norms[kind]
            if with_queries:
                tensors[f"{kind}.query"] = self._query_norms[kind]
        return tensors


class _Spent(NamedTuple):
    computed: int
    seconds: dict[str, FiniteFloat]


def _add_seconds(spent: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in spent for name in one)
    return {name: sum(one.get(name, 0.0) for one in spent) for name in names}


def _write_seconds(folder: Path, name: str, computed: float, spent: Sequence[Mapping[str, float]]) -> None:
    """Write the cost of a piece beside the pieces: their bytes depend on no clock."""
    make_folder(folder / "seconds")
    content = json.dumps({"computed": int(computed), "seconds": _add_seconds(spent)})
    write_durably(folder / "seconds" / f"{name}.json", [content.encode()])


def read_seconds(folder: Path) -> tuple[int, dict[str, float]]:
    """Return how many gradients were computed for the result that is there, and the seconds of everything.

    Raises:
        CorruptFile: A file is not what Vestige writes.
    """
    found = []
    for path in sorted((folder / "seconds").glob("*.json")):
        try:
            found.append(as_record(_Spent, parse_object(path.read_bytes())))
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{path} is damaged ({error}). Delete it: it says only what the work cost.") from None
    return sum(one.computed for one in found), _add_seconds([one.seconds for one in found])
