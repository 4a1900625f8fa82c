"""The one pass of `vestige evaluate components`: every distinct gradient is computed once, by any worker.

The queries' gradients are kept on disk as factors (a few vectors a token, less than the gradients themselves) while the
candidates' are computed, piece by piece, and multiplied with them. What stays is a table of products by component.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import FiniteFloat, TypeAdapter
from safetensors.torch import load_file
from torch import Tensor

from vestige.data import make_batch
from vestige.errors import CorruptFile, NonFinite
from vestige.evaluate._component_inputs import ComponentInputs, digest, read_component_inputs
from vestige.evaluate._component_sets import ComponentProducts
from vestige.evaluate._result import open_folder
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
from vestige.jobs import PieceFiles, Tensors, is_worker, run_pieces, step_done, tensor_pieces, worker_command
from vestige.methods import backbone, pool_states, tap_modules, taps_of
from vestige.settings import ComponentsSettings
from vestige.storage import check_disk, make_folder, write_durably

HIDDEN = "last hidden state"
"""Name of the output that `rep-sim` compares."""
_FORMED_BYTES = 2**29
"""Most bytes of matrices formed from the factors of one piece of queries."""
_DENSE = 0.25
"""Share of a block's pairs from which all of them are computed at once."""
_EXAMPLES = "examples"
_COSTS = TypeAdapter(dict[str, FiniteFloat])
Spent = defaultdict[str, float]
"""Of a piece: seconds by kind of work, and the number of `examples` whose gradients were computed."""


class OnePassResult(NamedTuple):
    """Products of everything with everything that was requested; every similarity follows from them."""

    inputs: ComponentInputs
    gradients: dict[str, ComponentProducts]
    """By the number of candidates that was requested, such as `5`."""
    outputs: dict[str, ComponentProducts]
    """The same of layer outputs: a module each, its width in place of the parameters; the last hidden state last."""
    projected: dict[str, ComponentProducts]
    """Of projections: one each, with the numbers kept in place of the parameters."""
    published: dict[str, ComponentProducts]
    """Of the same projections in the published form, which lacks the factor 1/sqrt(k) of each tensor."""
    computed: int
    """Gradients that were computed for this."""
    seconds: dict[str, float]
    """Of the passes of the model (`gradients`), of `products`, and of each projection, over all processes."""
    is_read: bool = False
    """Whether they were read from files of other software: then nothing is known of the model and of costs."""


def one_pass_result(settings: ComponentsSettings) -> OnePassResult:
    """Return the products, computed now or found in `settings.out`: each distinct gradient exactly once.

    Raises:
        IndexMismatch: The folder holds products of something else; nothing was changed.
        UserError: The folder holds other files, the disk is too small, or an input needs the caller.
    """
    inputs = read_component_inputs(settings)
    work = _OnePass(inputs)
    if not is_worker():
        open_folder(settings.out, inputs.identity, "launch")
        work.factors.forget_damaged(range(work.queries.count))
        work.table.forget_damaged(range(work.products.count))
    command = worker_command(settings, "evaluate components")
    if work.products.missing():
        if not is_worker():
            check_disk(settings.out, int(inputs.factor_bytes[: len(inputs.wanted)].sum()))
        run_pieces(work.queries, settings, command)
    pieces = run_pieces(work.products, settings, command)
    work.factors.remove()
    parts = {part.name: part.size for part in inputs.components}
    outputs = dict(zip([*_output_modules(inputs), HIDDEN], pieces[0]["widths"].tolist(), strict=True))
    projections = {one.name: sum(one.sizes) for one in inputs.projections}
    sizes = [parts, outputs, projections, projections]
    ends = np.cumsum(list(map(len, sizes))).tolist()
    kinds = [_collect_products(inputs, pieces, end, one) for end, one in zip(ends, sizes, strict=True)]
    spent = _read_costs(settings.out)
    return OnePassResult(inputs, *kinds, computed=round(spent.pop(_EXAMPLES, 0)), seconds=dict(spent))


def _collect_products(
    inputs: ComponentInputs, pieces: Sequence[Mapping[str, Tensor]], end: int, sizes: Mapping[str, int]
) -> dict[str, ComponentProducts]:
    """Return one kind of products, those before `end` in all pieces, for each choice of candidates."""
    kind, counts = slice(end - len(sizes), end), np.array([*sizes.values()], dtype=np.int64)
    pairs, rows = (np.concatenate([one[name].numpy() for one in pieces]) for name in ("pairs", "rows"))
    number = np.full(inputs.wanted.shape, -1, dtype=np.int64)
    number[pairs[:, 0], pairs[:, 1]] = np.arange(len(pairs))
    values, norms = (np.concatenate([one[name][kind].numpy() for one in pieces], 1) for name in ("products", "norms"))
    example = np.zeros((len(norms), len(inputs.data)))
    example[:, rows] = norms
    query = pieces[0]["query_norms"][kind].numpy()[:, inputs.query_place]
    found = {}
    for words, candidates in inputs.candidates.items():
        place = np.where(candidates.rows >= 0, inputs.example_place[candidates.rows], -1)
        pair = np.where(place >= 0, number[inputs.query_place[:, None], place], -1)
        listed = np.where(pair >= 0, values[:, pair], 0)
        found[words] = ComponentProducts(tuple(sizes), counts, listed, query, example, place)
    return found


def _output_modules(inputs: ComponentInputs) -> list[str]:
    """Return the modules whose outputs are compared: all with a component, but no head that runs at targets alone."""
    head = CausalLoss(inputs.settings.loss).head_module(inputs.loaded.model)
    return [tap.module for tap in taps_of(inputs.components) if tap.module != head]


class _Passed(NamedTuple):
    """Everything that is compared, of the examples of a batch, after their one pass.

    Behind the components come vectors, each as the gradient of a component of one row: of each module its output,
    averaged over the positions that predict a target; the last hidden state; projections, and these as published.
    """

    gradients: list[Gradients]
    norms: Float[Tensor, "component example"]
    """Squared."""


_RunPass = Callable[[np.ndarray], _Passed]


@contextmanager
def _open_pass(inputs: ComponentInputs, spent: Spent) -> Iterator[_RunPass]:
    """Yield the function that runs one pass over some rows; the model is tapped while the context lasts."""
    model, sink, hidden = inputs.loaded.model, KeepingSink(inputs.components), list[Tensor]()
    modules = _output_modules(inputs)

    def keep_state(_module: object, _arguments: object, output: Any) -> None:
        if (state := getattr(output, "last_hidden_state", None)) is not None:
            hidden[:] = [state.detach()]

    with ExitStack() as stack:
        # Entering it runs the model once, on tokens of no example.
        objective = CausalLoss(inputs.settings.loss)
        gradient_pass = stack.enter_context(GradientPass(model, inputs.components, objective))
        taps = [tap for tap in taps_of(inputs.components) if tap.module in modules]
        pooling = stack.enter_context(tap_modules(model, taps, "mean"))
        stack.callback(backbone(model).register_forward_hook(keep_state).remove)

        def run(rows: np.ndarray) -> _Passed:
            with _timing(spent, "gradients"):
                batch = make_batch(inputs.data, rows).to(next(model.parameters()).device)
                sink.begin(len(rows))
                pooling.begin(batch)
                hidden.clear()
                gradient_pass.run(batch, sink)
                gradients = [_shrink(one) for one in sink.finish()]
                norms = [square_norms(one) for one in gradients]
                state = pool_states(hidden[0], batch.labels, "mean") if hidden else torch.zeros(len(rows), 0)
                vectors = [*pooling.collect(), state]
            published = []
            for one in inputs.projections:
                with _timing(spent, f"projection {one.name}"):
                    vectors.append(one.apply(gradients))
                    published.append(vectors[-1].double() * one.weights_as_published())
            own = [part.cpu().double()[:, None] for part in (*vectors, *published)]
            gradients += [Gradients(len(rows), (1, part.shape[2]), (), part) for part in own]
            norms += [part.square().sum((1, 2)) for part in own]
            squared = torch.stack([one.cpu().double() for one in norms])
            spent[_EXAMPLES] += len(rows)
            if not bool(squared.isfinite().all()):
                bad = int((~squared.isfinite().all(0)).nonzero()[0, 0])
                raise NonFinite(
                    f"The gradient of example {int(batch.rows[bad])} is NaN or infinite. Run `vestige doctor` with the "
                    "same --model and --data, which names the cause."
                )
            return _Passed(gradients, squared)

        yield run


@contextmanager
def _timing(spent: Spent, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - started


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


def _as_tensors(passed: _Passed) -> Tensors:
    """Return everything as named tensors, for a file; `_read_passed` undoes it."""
    tensors = {"norms": passed.norms}
    for number, gradients in enumerate(passed.gradients):
        if gradients.matrices is not None:
            tensors[f"{number}.matrices"] = gradients.matrices
        for place, (examples, left, right) in enumerate(gradients.pieces):
            key = f"{number}.{place}"
            tensors |= {f"{key}.ids": left.ids} if isinstance(left, OneHot) else {f"{key}.left": left}
            tensors |= {f"{key}.right": right, f"{key}.examples": torch.tensor([examples.start, examples.stop])}
    # Tensors that share memory (one input of several layers) are written as what they are: tensors of their own.
    return {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}


def _read_passed(tensors: Tensors, inputs: ComponentInputs) -> _Passed:
    device, norms = next(inputs.loaded.model.parameters()).device, tensors["norms"]
    gradients = []
    for number in range(len(norms)):
        matrices, pieces = tensors.get(f"{number}.matrices"), list[Piece]()
        # Vectors are matrices of one row, on the CPU.
        of_component = number < len(inputs.components)
        shape = inputs.components[number].shape if of_component or matrices is None else (1, matrices.shape[2])
        while (key := f"{number}.{len(pieces)}") + ".right" in tensors:
            ids, right = tensors.get(f"{key}.ids"), tensors[f"{key}.right"].to(device)
            left = tensors[f"{key}.left"].to(device) if ids is None else OneHot(ids.to(device), shape[0])
            pieces.append(Piece(slice(*tensors[f"{key}.examples"].tolist()), left, right))
        whole = None if matrices is None else matrices.to(device if of_component else "cpu")
        gradients.append(Gradients(norms.shape[1], shape, tuple(pieces), whole))
    return _Passed(gradients, norms)


class _OnePass:
    """Both jobs: the gradients of all queries as factors on disk, and the products of the candidates with them."""

    def __init__(self, inputs: ComponentInputs) -> None:
        self._inputs, self._checked, self._spent = inputs, set[int](), Spent(float)
        kept = {name: value for name, value in inputs.identity.items() if name != "pairs"}
        self.factors = PieceFiles(inputs.settings.out / "gradients", digest(kept | {"piece": "a batch"}))
        self.table = PieceFiles(inputs.settings.out / "products", digest(inputs.identity))
        self._number = {int(batch[0]): number for number, batch in enumerate(inputs.query_batches)}
        queries, candidates = list(map(len, inputs.query_batches)), [sum(map(len, one)) for one in inputs.portions]
        keep, multiply = partial(self._open, self._keep), partial(self._open, self._multiply)
        # Every product needs the gradients of queries, so a share of the products does not wait for other shares.
        self.queries = replace(
            tensor_pieces("Query gradients", self.factors, queries, keep, lambda _: None), for_all=True
        )
        self.products = tensor_pieces("Products", self.table, candidates, multiply, list[Tensors])

    @contextmanager
    def _open(self, compute: Callable[[_RunPass, int], Tensors]) -> Iterator[Callable[[int], Tensors]]:
        with _open_pass(self._inputs, self._spent) as run:
            yield partial(compute, run)

    def _keep(self, run: _RunPass, piece: int) -> Tensors:
        """Return the gradients of one batch of queries."""
        batch = self._inputs.query_batches[piece]
        tensors = _as_tensors(run(batch))
        step_done(len(batch))
        self._write_costs(f"queries-{piece:05d}")
        return tensors

    def _multiply(self, run: _RunPass, piece: int) -> Tensors:
        """Return the products of one portion of candidates, whose gradients are never kept, with all queries."""
        inputs, batches = self._inputs, self._inputs.portions[piece]
        known = [self._number.get(int(batch[0])) for batch in batches]
        found = [run(batch) if one is None else self._read(one) for batch, one in zip(batches, known, strict=True)]
        rows, norms = np.concatenate(batches), torch.cat([one.norms for one in found], dim=1)
        wanted = inputs.wanted[:, rows]
        table, query_norms = norms.new_zeros(len(norms), *wanted.shape), norms.new_zeros(len(norms), len(wanted))
        for number, own in enumerate(inputs.query_batches):
            if piece == 0 or wanted[own].any():
                queries = self._read(number)
                query_norms[:, own] = queries.norms
                with _timing(self._spent, "products"):
                    table[:, own] = _multiply_batches(queries, found, wanted[own])
        self._write_costs(f"candidates-{piece:05d}")
        step_done(len(rows))
        query, column = map(torch.as_tensor, np.nonzero(wanted))
        outputs = found[0].gradients[len(inputs.components) : len(norms) - 2 * len(inputs.projections)]
        return {
            "pairs": torch.stack([query, torch.as_tensor(rows)[column]], dim=1),
            "rows": torch.as_tensor(rows),
            "widths": torch.tensor([each.shape[1] for each in outputs]),
            "products": table[:, query, column],
            "norms": norms,
            "query_norms": query_norms if piece == 0 else query_norms[:0],
        }

    def _read(self, piece: int) -> _Passed:
        """Read a batch of queries; its bytes are compared with its marker once in a process."""
        if piece not in self._checked:
            self.factors.check(piece)
            self._checked.add(piece)
        return _read_passed(load_file(self.factors.path(piece)), self._inputs)

    def _write_costs(self, name: str) -> None:
        """Write the cost of a piece beside the pieces: their bytes depend on no clock."""
        folder = self._inputs.settings.out / "seconds"
        make_folder(folder)
        write_durably(folder / f"{name}.json", [json.dumps(self._spent).encode()])
        self._spent.clear()


def _multiply_batches(
    queries: _Passed, found: Sequence[_Passed], wanted: np.ndarray
) -> Float[Tensor, "part query row"]:
    """Return the wanted products of a batch of queries with batches of candidates, zero in place of others."""
    memory, table = FormingBudget(_FORMED_BYTES), queries.norms.new_zeros(len(queries.norms), *wanted.shape)
    held = [HeldGradients(one, memory, len(found)) for one in queries.gradients]
    starts = np.cumsum([one.norms.shape[1] for one in found])[:-1]
    blocks = zip(found, np.split(wanted, starts, axis=1), table.tensor_split(starts.tolist(), dim=2), strict=True)
    for passed, own, block in blocks:
        if own.mean() >= _DENSE:
            for part, (one, mine) in enumerate(zip(held, passed.gradients, strict=True)):
                block[part] = one.products(mine).T
            continue
        for query, candidate in np.argwhere(own).tolist():
            for part, (one, mine) in enumerate(zip(queries.gradients, passed.gradients, strict=True)):
                block[part, query, candidate] = products(_one_example(one, query), _one_example(mine, candidate))
    return table


def _read_costs(folder: Path) -> Spent:
    """Return how many gradients were computed for the result that is there, and the seconds of everything."""
    total = Spent(float)
    for path in sorted((folder / "seconds").glob("*.json")):
        try:
            for name, amount in _COSTS.validate_json(path.read_bytes()).items():
                total[name] += amount
        except (OSError, ValueError) as error:
            raise CorruptFile(f"{path} is damaged ({error}). Delete it: it says only what the work cost.") from None
    return total
