"""The one pass from beginning to end: what is in the folder is used, what is missing is computed."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vestige.errors import UserError
from vestige.evaluate._component_compared import Compared
from vestige.evaluate._component_inputs import Candidates, ComponentInputs, read_component_inputs
from vestige.evaluate._component_pass import HIDDEN, output_taps
from vestige.evaluate._component_plan import CandidateProducts, QueryGradients, read_seconds
from vestige.evaluate._component_products import ComponentProducts
from vestige.evaluate._component_tables import Table, tables_of
from vestige.evaluate._kept import require_same
from vestige.launch import is_worker, run_plan, worker_command
from vestige.settings import ComponentsSettings
from vestige.storage import check_disk, is_temporary, make_folder, write_durably

_IDENTITY = "compared.json"
_LAUNCH = "launch"


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


def one_pass_result(settings: ComponentsSettings) -> OnePassResult:
    """Return the products, computed now or found in `settings.out`: each distinct gradient exactly once.

    Raises:
        IndexMismatch: The folder holds products of something else; nothing was changed.
        UserError: The folder holds other files, the disk is too small, or an input needs the caller.
    """
    inputs = read_component_inputs(settings)
    compared = inputs.compared
    queries = QueryGradients(compared)
    candidates = CandidateProducts(compared, queries)
    if not is_worker():
        _open_folder(compared)
        queries.files.forget_damaged(range(queries.pieces))
        candidates.files.forget_damaged(range(candidates.pieces))
    command = worker_command(settings, "evaluate components")
    if not all(map(candidates.is_done, range(candidates.pieces))):
        if not is_worker():
            check_disk(settings.out, int(compared.factor_bytes(np.arange(compared.queries)).sum()))
        run_plan(queries, settings, command)
    number, tables = tables_of(compared.wanted, run_plan(candidates, settings, command))
    computed, seconds = read_seconds(settings.out)
    gradients, outputs, projected, published = _all_products(inputs, number, tables)
    return OnePassResult(inputs, gradients, outputs, projected, published, computed, seconds)


def _open_folder(compared: Compared) -> None:
    folder = compared.folder
    path = folder / _IDENTITY
    if path.exists():
        require_same(path, compared.identity)
        return
    if folder.exists() and (not folder.is_dir() or any(map(_is_foreign, folder.iterdir()))):
        raise UserError(f"{folder} holds other files. Give a new or empty folder as --out.")
    make_folder(folder)
    write_durably(path, [json.dumps(compared.identity, indent=1).encode()])


def _is_foreign(path: Path) -> bool:
    return path.name not in (_LAUNCH, _IDENTITY) and not is_temporary(path)


def _all_products(
    inputs: ComponentInputs, number: np.ndarray, tables: dict[str, Table]
) -> tuple[dict[str, ComponentProducts], ...]:
    compared = inputs.compared
    modules = [tap.module for tap in output_taps(compared.loaded.model, compared.components, compared.loss)]
    plans = [one.plan for one in compared.projections]
    sizes = [sum(plan.sizes) for plan in plans]
    names = {
        "values": ([part.name for part in compared.components], [part.size for part in compared.components]),
        "outputs": ([*modules, HIDDEN], tables["outputs"].widths.tolist()),
        "projected": ([plan.name for plan in plans], sizes),
        "published": ([plan.name for plan in plans], sizes),
    }
    return tuple(
        {
            words: _products(inputs, number, tables[kind], candidates, *names[kind])
            for words, candidates in inputs.candidates.items()
        }
        for kind in ("values", "outputs", "projected", "published")
    )


def _products(
    inputs: ComponentInputs,
    number: np.ndarray,
    table: Table,
    candidates: Candidates,
    names: list[str],
    sizes: list[int],
) -> ComponentProducts:
    """Return one kind of products for one choice of candidates."""
    place = np.where(candidates.rows >= 0, inputs.example_place[candidates.rows], -1)
    pair = np.where(place >= 0, number[inputs.query_place[:, None], place], -1)
    values = np.where(pair >= 0, table.values[:, pair], 0)
    query = table.query[:, inputs.query_place]
    return ComponentProducts(tuple(names), np.array(sizes, dtype=np.int64), values, query, table.example, place)
