"""Digits, a small network that reads them, and scores of every gradient method from its whole gradients in memory."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from vestige.compress import compress_gradient
from vestige.curvature import DAMPING, BatchSink, CurvatureData, DataInf, ekfac_of, kfac_of, mean_eigenvalues
from vestige.evaluate import Family, quality
from vestige.gradients import FunctionObjective, GradientPass, GradientSink
from vestige.methods import doubt
from vestige.models import select_components
from vestige_recipes.common.halves import (
    AT_ONCE,
    Scored,
    cosines,
    fisher_of_rows,
    score_solved,
    solve_rows,
    time_scores,
)

PIXELS, CLASSES = 64, 10
BATCH = 50
RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": BATCH}


def losses_of(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Float[Tensor, "example"]:
    """Cross-entropy of each image's label, in nats."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


OBJECTIVE = FunctionObjective(losses_of)


class Images(NamedTuple):
    """Images and the digits that they show."""

    inputs: Float[Tensor, "example pixel"]
    labels: Int[Tensor, "example"]

    def at(self, rows: np.ndarray) -> "Images":
        """Return some of them."""
        chosen = torch.as_tensor(rows)
        return Images(self.inputs[chosen], self.labels[chosen])


class Digits(NamedTuple):
    """What models are trained on, and what they are asked about."""

    train: Images
    queries: Images

    @property
    def digest(self) -> str:
        """Names the numbers."""
        content = b"".join(part.numpy().tobytes() for side in self for part in side)
        return hashlib.sha256(content).hexdigest()[:16]


def digits(examples: int, queries: int, seed: int) -> Digits:
    """Disjoint draws from scikit-learn's 1,797 images of 8 x 8 pixels, brightness between 0 and 1."""
    from sklearn.datasets import load_digits

    inputs, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    whole = Images(torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(labels))
    return Digits(whole.at(order[:examples]), whole.at(order[examples : examples + queries]))


def network(images: Images, seed: int, epochs: int, hidden: tuple[int, int]) -> nn.Module:
    """Return an MLP of two hidden layers trained by stochastic gradient descent; the seed draws weights and order."""
    first, second = hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(PIXELS, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, CLASSES)
        )  # fmt: skip
        optimiser = torch.optim.SGD(
            model.parameters(),
            lr=RECIPE["learning_rate"],
            momentum=RECIPE["momentum"],
            weight_decay=RECIPE["weight_decay"],
        )
        for _ in range(epochs):
            for rows in torch.randperm(len(images.labels)).split(BATCH):
                optimiser.zero_grad()
                losses_of(model, (images.inputs[rows], images.labels[rows])).mean().backward()
                optimiser.step()
    return model.eval()


def query_losses(model: nn.Module, images: Images) -> Float[np.ndarray, "query"]:
    """Loss of each image, float64."""
    with torch.no_grad():
        return losses_of(model, images).double().numpy()


def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images that are read rightly."""
    with torch.no_grad():
        return float((model(images.inputs).argmax(1) == images.labels).float().mean())


def gradients(model: nn.Module, images: Images) -> list[Float[Tensor, "example n"]]:
    """Every example's whole gradient, flattened, component by component."""
    components = select_components(model, ("all",)).components
    sink, parts = GradientSink(components), []
    dtype = next(model.parameters()).dtype
    with GradientPass(model, components, OBJECTIVE) as gradient_pass:
        for rows in np.array_split(np.arange(len(images.labels)), -(-len(images.labels) // AT_ONCE)):
            sink.begin(len(rows), "cpu", dtype)
            gradient_pass.run(images.at(rows), sink)
            parts.append([part.flatten(1) for part in sink.gradients])
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


@dataclass(frozen=True)
class ImageCurvature(CurvatureData):
    """Curvature over images instead of texts; the labels are those that the images are given with."""

    # A TensorDataset of inputs and labels: of the base class's data only the length is asked for.
    data: Any

    @classmethod
    def over(cls, model: nn.Module, images: Images) -> "ImageCurvature":
        """Over all of them, all weights."""
        components = select_components(model, ("all",)).components
        return cls(model, components, TensorDataset(*images), AT_ONCE)

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """One piece."""
        count = len(self.data)
        return [np.array_split(np.arange(count), -(-count // AT_ONCE))]

    def stream_piece(self, piece: int, sink: BatchSink, advance: Callable[[int], None]) -> None:
        """Stream the factors of the images."""
        images = Images(*self.data.tensors)
        with GradientPass(self.model, self.components, OBJECTIVE) as gradient_pass:
            for rows in self.groups[piece]:
                sink.begin(len(rows))
                gradient_pass.run(images.at(rows), sink)
                sink.finish()
                advance(len(rows))


def with_sampled_labels(model: nn.Module, images: Images, seed: int) -> Images:
    """Return the same images with labels drawn from the model: of them the Fisher matrix is the true one."""
    with torch.no_grad():
        probabilities = torch.softmax(model(images.inputs), 1)
    drawn = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(seed))[:, 0]
    return images._replace(labels=drawn)


GRID = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
SKETCHES = {"Gauss": "gauss:K", "SJLT": "sjlt:K", "GraSS x4": "mask:4K | sjlt:K", "mask": "mask:K"}
EXACT = "influence, exact"
ENSEMBLE_SIZE = 1024
"""Numbers kept of a gradient where several models are averaged."""


class Gradients(NamedTuple):
    """Of one model, flattened over components."""

    train: Float[Tensor, "example n"]
    queries: Float[Tensor, "query n"]
    seconds: float


def measure_gradients(model: nn.Module, digits: Digits) -> Gradients:
    """Whole gradients of everything."""
    started = time.perf_counter()
    sides = [torch.cat(gradients(model, images), dim=1) for images in digits]
    return Gradients(sides[0], sides[1], time.perf_counter() - started)


def opponents(model: nn.Module, digits: Digits, found: Gradients, seed: int) -> Iterator[Scored]:
    """Inner products, cosines, similarity of the last hidden layer, and chance."""
    train, queries, seconds = found
    yield score_solved("grad-dot", lambda: queries, train, seconds)
    yield time_scores("grad-cos", lambda: cosines(queries, train), train.shape[1], seconds)
    assert isinstance(model, nn.Sequential)
    body, head = model[:-1], model[-1]
    assert isinstance(head, nn.Linear)

    def compare_states() -> Tensor:
        with torch.no_grad():
            states = [nn.functional.normalize(body(images.inputs), dim=1) for images in digits]
        return states[1] @ states[0].T

    yield time_scores("rep-sim", compare_states, head.in_features)
    shape = len(queries), len(train)
    yield Scored("random", np.random.default_rng(seed).standard_normal(shape), 0.0, 0)


def exact_influence(found: Gradients) -> tuple[dict[float, Scored], float]:
    """With the empirical Fisher matrix of the whole gradient, at every damping, the default one first.

    Return also the seconds of all of them, for which the matrix is measured once.
    """
    begun = time.perf_counter()
    train, queries, seconds = found
    fisher = fisher_of_rows(train)
    shared, scored = seconds + time.perf_counter() - begun, {}
    for damping in sorted(GRID, key=lambda each: each != DAMPING):
        solve = partial(fisher.precondition, queries, damping)
        scored[damping] = score_solved(f"{EXACT}, damping {damping:g}", solve, train, shared)
    return scored, seconds + time.perf_counter() - begun


def compress_influence(found: Gradients, sizes: Sequence[int], seed: int, draws: int) -> Iterator[Scored]:
    """`draws` sketches of the whole gradient of every kind and size, at the default damping.

    That is relative to the mean eigenvalue, which grows as fewer numbers share the same trace. Where a sketch is as
    long as those of `average_models`, it is also scored with the damping of exact influence, added as it is.
    """
    exact = (found.queries @ found.train.T).double()
    lengths = (found.queries.norm(dim=1)[:, None] * found.train.norm(dim=1)).double()
    unit = float(found.train.double().square().mean())
    for (kind, template), size, draw in product(SKETCHES.items(), sizes, range(draws)):
        train, queries, seconds = _sketch(found, template, size, seed + draw)
        name = f"influence, {kind} {size}"
        own = {"nrmse": float(quality((queries @ train.T).double(), exact, lengths).nrmse), "draw": draw}
        yield score_solved(name, partial(solve_rows, queries, train), train, seconds)._replace(**own)
        if size == ENSEMBLE_SIZE:
            solve = partial(solve_rows, queries, train, DAMPING * unit)
            yield score_solved(f"{name}, exact's damping", solve, train, seconds)._replace(**own)


def _sketch(found: Gradients, template: str, size: int, seed: int) -> Gradients:
    started = time.perf_counter()
    compressor = Family(template).at(size).build("model", (found.train.shape[1], 1), seed)
    train, queries = (compress_gradient(compressor, side[:, :, None]) for side in (found.train, found.queries))
    return Gradients(train, queries, found.seconds + time.perf_counter() - started)


def layer_methods(model: nn.Module, digits: Digits, found: Gradients, seed: int) -> Iterator[Scored]:
    """Curvature layer by layer: K-FAC and EK-FAC of the true Fisher matrix, DataInf of the empirical one."""
    sampled = ImageCurvature.over(model, with_sampled_labels(model, digits.train, seed))
    given = ImageCurvature.over(model, digits.train)
    parts = list(found.queries.split([part.size for part in given.components], dim=1))
    solvers: dict[str, Callable[[], list[Tensor]]] = {
        "ekfac": lambda: ekfac_of(sampled).precondition(parts, DAMPING),
        "kfac": lambda: kfac_of(sampled).eigenbases().precondition(parts, DAMPING),
        "datainf": lambda: DataInf.with_damping(given, mean_eigenvalues(given), DAMPING).precondition(parts),
    }
    for name, solve in solvers.items():
        yield score_solved(name, partial(_join_parts, solve), found.train, found.seconds)


def _join_parts(solve: Callable[[], list[Tensor]]) -> Float[Tensor, "query n"]:
    return torch.cat(solve(), dim=1)


def average_models(models: Sequence[nn.Module], digits: Digits, seed: int, suffix: str) -> Iterator[Scored]:
    """TRAK and sketched influence, the mean over models; `phi = P grad log(p / (1 - p))` for TRAK.

    TRAK's scores are `mean[phi(query)^T (Phi^T Phi / n + d I)^-1 phi(example)] mean[1 - p(example)]`, d relative to the
    mean eigenvalue.
    """
    sketches = [
        _sketch(measure_gradients(model, digits), SKETCHES["SJLT"], ENSEMBLE_SIZE, seed + number)
        for number, model in enumerate(models)
    ]
    shared, numbers = sum(each.seconds for each in sketches), sum(each.train.shape[1] for each in sketches)

    def trak() -> Float[Tensor, "query example"]:
        kernels, doubts = [], []
        for model, (train, queries, _) in zip(models, sketches, strict=True):
            unsure, asked = (doubt(torch.from_numpy(query_losses(model, images))).to(train) for images in digits)
            phi = train / unsure[:, None]
            kernels.append((solve_rows(queries / asked[:, None], phi) @ phi.T).double())
            doubts.append(unsure.double())
        return torch.stack(kernels).mean(0) * torch.stack(doubts).mean(0)

    def influence() -> Float[Tensor, "query example"]:
        kernels = [solve_rows(queries, train) @ train.T for train, queries, _ in sketches]
        return torch.stack(kernels).double().mean(0)

    yield time_scores(f"trak, {suffix}", trak, numbers, shared)
    if len(models) > 1:
        yield time_scores(f"influence, SJLT {ENSEMBLE_SIZE}, {suffix}", influence, numbers, shared)
