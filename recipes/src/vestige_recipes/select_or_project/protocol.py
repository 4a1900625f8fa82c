"""Tables of a component search, and the published protocol of Select or Project beside the one pass: counted, timed.

Three jobs for each setting (arXiv 2601.16651): similarities of whole gradients, products by parameter, and projections
to two sizes. Each computes the gradients of every query and of its candidates again, projections once for each size; a
query with 5 candidates costs 24 backward passes in a setting. Where every original is asked about once in each of two
settings, that is 16 times the number of distinct gradients.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vestige.data import TokenizedData, make_batch
from vestige.evaluate import Estimate, Evaluation, OnePassResult, Projection, one_pass_result
from vestige.gradients import Gradients, token_losses
from vestige.jobs import is_follower
from vestige.models import Component, LoadedModel, load_model, trainable_copy
from vestige.progress import progress
from vestige.settings import ComponentsSettings
from vestige.storage import is_temporary, sha256_of, write_durably
from vestige_recipes.common.texts import package_folder
from vestige_recipes.studies import Gate, show_interval

_RECORD = "part.json"
_NO_RESULTS = ("launch", "__pycache__")
"""Folders that hold no result."""


class Part(NamedTuple):
    """What one part of a study found."""

    rows: Sequence[Sequence[Any]]
    gates: Sequence[Gate]
    details: Mapping[str, Any]


def keep_part(folder: Path, made_of: Mapping[str, Any], work: Callable[[], Part]) -> Part:
    """Return what `work` returns, or returned when it was last done for this folder.

    It is done again when anything in `made_of` is another, when this is another version of vestige, or when a file in
    the folder is missing, new or does not hold what it held; `work` itself finds what is finished inside it.

    Args:
        folder: Where `work` leaves all its files.
        made_of: Everything that decides the result, in JSON terms.
        work: Does the work.
    """
    path = folder / _RECORD
    fingerprint = _digest({**made_of, "vestige": version("vestige")})
    if (found := _read(path, fingerprint)) is not None and found["files"] == _files(folder):
        gates = [Gate(**gate) for gate in found["gates"]]
        return Part([tuple(row) for row in found["rows"]], gates, found["details"])
    done = work()
    if not is_follower():
        content = {
            "made_of": fingerprint,
            "files": _files(folder),
            "rows": [list(row) for row in done.rows],
            "gates": [asdict(gate) for gate in done.gates],
            "details": done.details,
        }
        written = json.dumps(content)
        write_durably(path, [json.dumps({"sha256": _digest(json.loads(written)), "part": content}, indent=1).encode()])
    return done


def package_digest(modules: Sequence[str]) -> str:
    """sha256 over the files of installed packages.

    Raises:
        MissingExtra: One is not installed.
    """
    return _digest({module: _files(package_folder(module)) for module in modules})


def _read(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """Return the record, if it is whole and of this fingerprint."""
    try:
        record = json.loads(path.read_bytes())
        part = record["part"]
        whole = record["sha256"] == _digest(part) and part["made_of"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return part if whole else None


def _files(folder: Path) -> dict[str, str]:
    """sha256 of every file by its place, but for the record and what holds no result."""
    found = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        is_result = place.name != _RECORD and not set(place.parts) & set(_NO_RESULTS)
        if is_result and path.is_file() and not is_temporary(path):
            found[place.as_posix()] = sha256_of(path)
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


FULL = "full gradient"
COLUMNS = (
    "data",
    "candidates",
    "representation",
    "accuracy",
    "95 % interval",
    "minus full",
    "95 % interval",
    "agreement",
    "centred",
    "parameters",
    "backward",
    "bytes",
    "seconds",
)


def component_rows(part: str, found: Evaluation) -> list[tuple[Any, ...]]:
    """Every representation, and the best and the median component by itself."""
    rows = []
    for words, each in found.details["candidates"].items():
        rows += [(part, words, *_cells(one)) for one in each["representations"]]
        single = sorted(each["components"], key=lambda one: one["accuracy"].value)
        # Shares are of all parameters of the model, also of those that no component holds.
        total = sum(one["parameters"] for one in single) / _representation(found, words, FULL)["parameters"]
        for label, one in (("best", single[-1]), ("median", single[len(single) // 2]), ("worst", single[0])):
            name = f"{label} component, all queries: {one['name'].removesuffix('.weight')}"
            size = one["parameters"]
            known = {"name": name, "parameters": size / total, "bytes": 4 * size, "seconds": None, "against_full": None}
            rows.append((part, words, *_cells(one | known)))
    return rows


def _cells(one: Mapping[str, Any]) -> tuple[Any, ...]:
    against = one["against_full"]
    shares = [one["parameters"], one["backward"]]
    return (
        one["name"],
        one["accuracy"].value,
        show_interval(one["accuracy"]),
        "" if against is None else against.value,
        "" if against is None else show_interval(against),
        *(
            "" if (each := one[name]) is None else float(each.value if isinstance(each, Estimate) else each)
            for name in ("agreement", "centred")
        ),
        *("" if share is None else f"{share:.2%}" for share in shares),
        "" if one["bytes"] is None else one["bytes"],
        "" if one["seconds"] is None else f"{one['seconds']:.1f}",
    )


def gates_of_sets(part: str, found: Evaluation, words: str, tolerance: float) -> list[Gate]:
    """Return what was published: a few components do as well as all; here they were chosen on other queries."""
    names = ("best component, held out", "greedy for accuracy, held out")
    gains = [(name, ahead_of(found, words, name, FULL)) for name in names]
    agreeing = _representation(found, words, "greedy for agreement, held out")
    # Of those that take part: LoRA's are a few hundredths of all.
    share = agreeing["parameters"] / _representation(found, words, FULL)["parameters"]
    return [
        *(Gate(f"{part}, {words}: {name}, minus full", gain, ">=", -tolerance) for name, gain in gains),
        Gate(f"{part}, {words}: parameters of the set that agrees", share, "<=", 0.1),
        Gate(f"{part}, {words}: agreement of that set, held out", agreeing["agreement"].value, ">=", 0.99),
    ]


def ahead_of(found: Evaluation, words: str, name: str, other: str) -> float:
    """Accuracy of one representation minus that of another one."""
    one, opponent = (_representation(found, words, each)["accuracy"].value for each in (name, other))
    return one - opponent


def _representation(found: Evaluation, words: str, name: str) -> Mapping[str, Any]:
    each = found.details["candidates"][words]["representations"]
    return next(one for one in each if one["name"] == name)


class OneByOne:
    """Gradients by automatic differentiation, one example at a time, nothing kept."""

    def __init__(self, loaded: LoadedModel, components: Sequence[Component], data: TokenizedData) -> None:
        self._model = trainable_copy(loaded)
        named = dict(self._model.named_parameters())
        self._parameters = [named[component.name] for component in components]
        self._data = data
        self.passes = 0
        """Counted."""

    def parts(self, place: int) -> list[Tensor]:
        """Return the gradient of one example, tensor by tensor."""
        self.passes += 1
        batch = make_batch(self._data, np.array([place]))
        loss = token_losses(self._model, batch.to(self._parameters[0].device)).sum()
        return list(torch.autograd.grad(loss, self._parameters))


def direct_gradients(result: OnePassResult, words: str, queries: int) -> dict[str, float]:
    """Compute the first queries and their candidates again, one by one, by automatic differentiation.

    Return the number of `examples`, the `seconds` of one (a batch of one, all weights), and the `largest_difference` of
    a cosine from the sum of components' products and one of two whole gradients.
    """
    products, inputs = result.gradients[words], result.inputs
    gradients, rows = OneByOne(inputs.loaded, inputs.components, inputs.data), products.rows[:queries]
    places = {*inputs.query_place[:queries].tolist(), *rows[rows >= 0].tolist()}
    started = time.perf_counter()
    kept = {place: [torch.cat([part.flatten() for part in gradients.parts(place)]).double()] for place in places}
    spent = time.perf_counter() - started
    apart = np.abs(_pair_by_pair(result, rows, kept.__getitem__) - products.of(range(queries)).cosine())
    return {
        "examples": gradients.passes,
        "seconds": spent / max(gradients.passes, 1),
        "largest_difference": float(apart[rows >= 0].max(initial=0.0)),
    }


def projection_errors(result: OnePassResult, words: str) -> dict[str, dict[str, float]]:
    """Mean absolute differences of cosines over all listed pairs, for every projection.

    `to_full`: of the projection from the full gradient's; `off`: of the published form from the full gradient's;
    `apart`: of that from the cosine in which a tensor counts as often as numbers are kept of it.
    """
    products, listed = result.gradients[words], result.gradients[words].listed
    full = products.cosine()
    found = {}
    for number, one in enumerate(result.inputs.projections):
        weights = np.array(one.sizes, dtype=np.float64)
        values, query, example = (
            np.tensordot(weights, part, axes=1) for part in (products.values, products.query, products.example)
        )
        lengths = query[:, None] * example[products.rows]
        weighted = values / np.sqrt(np.maximum(lengths, np.finfo(np.float64).tiny))
        right, published = (form[words].cosine([number]) for form in (result.projected, result.published))
        pairs = {"to_full": (right, full), "off": (published, full), "apart": (published, weighted)}
        found[one.name] = {name: float(np.abs(a - b)[listed].mean()) for name, (a, b) in pairs.items()}
    return found


_WHOLE = "similarities"


def replay(settings: ComponentsSettings) -> dict[str, Any]:
    """Both ways for what the settings ask; the one pass leaves its products in `settings.out`, which has to be new.

    The published jobs project with the map that the one pass projects with, and load the model once, not once a job;
    their seconds are from loading the model to the last similarity. `largest_difference` is between cosines of whole
    gradients: one by one, and from the one pass.
    """
    started = time.perf_counter()
    result = one_pass_result(settings)
    seconds = time.perf_counter() - started
    inputs = result.inputs
    started = time.perf_counter()
    direct = OneByOne(load_model(settings.model, precision=settings.precision), inputs.components, inputs.data)
    jobs, cosine = _run_published_jobs(result, settings.candidates[0], direct)
    published = time.perf_counter() - started
    ours = result.gradients[settings.candidates[0]].cosine()
    return {
        "queries": len(result.inputs.queries),
        "distinct_examples": len(inputs.data),
        "published_passes": direct.passes,
        "passes": result.computed,
        "published_seconds": published,
        "seconds": seconds,
        "passes_ratio": direct.passes / result.computed,
        "seconds_ratio": published / seconds,
        "published_jobs": jobs,
        "largest_difference": float(np.abs(cosine - ours).max()),
    }


def _run_published_jobs(
    result: OnePassResult, words: str, direct: OneByOne
) -> tuple[dict[str, dict[str, float]], Float[np.ndarray, "query candidate"]]:
    """Return passes and seconds of every job, and the similarities of whole gradients."""
    components, projections = result.inputs.components, result.inputs.projections
    jobs: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
        _WHOLE: lambda parts: [torch.cat([part.flatten() for part in parts])],
        "products by parameter": lambda parts: [part.flatten() for part in parts],
        **{f"projection {one.name}": partial(_project, one, components) for one in projections},
    }
    spent: dict[str, dict[str, float]] = {}
    cosines: dict[str, np.ndarray] = {}
    rows = result.gradients[words].rows
    with progress(len(jobs) * (len(rows) + int((rows >= 0).sum())), "Published protocol", unit="gradients") as counter:

        def vectors(place: int, form: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
            counter.advance()
            return form(direct.parts(place))

        for name, form in jobs.items():
            started, before = time.perf_counter(), direct.passes
            cosines[name] = _pair_by_pair(result, rows, partial(vectors, form=form))
            spent[name] = {"passes": direct.passes - before, "seconds": time.perf_counter() - started}
    return spent, cosines[_WHOLE]


def _pair_by_pair(
    result: OnePassResult, rows: Int[np.ndarray, "query candidate"], vectors: Callable[[int], list[Tensor]]
) -> Float[np.ndarray, "query candidate"]:
    """Cosines of the first queries with their candidates, from products of parts, each asked for pair by pair."""
    found = np.zeros(rows.shape)
    for query, places in enumerate(rows.tolist()):
        mine = vectors(int(result.inputs.query_place[query]))
        for number, place in enumerate(places):
            if place >= 0:
                other = vectors(place)
                products = [
                    # In float32 the sum over a whole gradient is wrong in the fourth digit.
                    sum(float((a * b).sum(dtype=torch.float64)) for a, b in zip(*pair, strict=True))
                    for pair in ((mine, other), (mine, mine), (other, other))
                ]
                found[query, number] = products[0] / max((products[1] * products[2]) ** 0.5, 1e-300)
    return found


def _project(projection: Projection, components: Sequence[Component], parts: list[Tensor]) -> list[Tensor]:
    shaped = [
        Gradients(1, component.shape, (), part.reshape(1, *component.shape))
        for component, part in zip(components, parts, strict=True)
    ]
    return list(projection.apply(shaped))
