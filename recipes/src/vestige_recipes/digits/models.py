"""Handwritten digits, a small network that reads them, and the gradients of its losses."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from vestige.curvature import BatchSink, CurvatureData
from vestige.gradients import FunctionObjective, GradientPass, GradientSink
from vestige.models import select_components

PIXELS, CLASSES = 64, 10
BATCH = 50
RECIPE = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "batch_size": BATCH}
_PASSED_AT_ONCE = 100


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Float[Tensor, "example"]:
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
        for rows in np.array_split(np.arange(len(images.labels)), -(-len(images.labels) // _PASSED_AT_ONCE)):
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
        return cls(model, components, TensorDataset(*images), _PASSED_AT_ONCE)

    @cached_property
    def groups(self) -> list[list[np.ndarray]]:
        """One piece."""
        count = len(self.data)
        return [np.array_split(np.arange(count), -(-count // _PASSED_AT_ONCE))]

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
