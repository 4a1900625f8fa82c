"""Two models that are no language models of text, their data, and how they are trained.

A ResNet-9 reads handwritten digits, and a transformer with relative attention continues melodies. Both are plain
modules: all that Vestige is given is a function from a model and a batch to one loss per example.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vestige.errors import DataError
from vestige_recipes.common.texts import install_again, package_folder
from vestige_recipes.digits.scores import CLASSES, digits, losses_of

Batch = tuple[Tensor, Tensor]
"""Inputs and labels, examples first."""


class Task(NamedTuple):
    """A model, its data and its training."""

    name: str
    train: Batch
    queries: Batch
    build: Callable[[], nn.Module]
    """A fresh model; its weights come from torch's generator."""
    losses: Callable[[nn.Module, Batch], Float[Tensor, "example"]]
    """Mean loss of each example's labels, in nats; no example's depends on the others."""
    recipe: dict[str, Any]
    """Epochs, size of a batch, and the arguments of Adam."""

    @property
    def digest(self) -> str:
        """Names the numbers of the data."""
        content = b"".join(part.numpy().tobytes() for side in (self.train, self.queries) for part in side)
        return hashlib.sha256(content).hexdigest()[:16]

    def fit(self, rows: Int[np.ndarray, "row"], seed: int) -> nn.Module:
        """Return a model that was trained on these rows; the seed draws its weights and the order of its batches."""
        recipe = dict(self.recipe)
        epochs, size = recipe.pop("epochs"), recipe.pop("batch_size")
        inputs, labels = (part[torch.as_tensor(rows)] for part in self.train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            optimizer = torch.optim.Adam(model.parameters(), **recipe)
            steps = epochs * -(-len(rows) // size)
            falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps)
            for _ in range(epochs):
                for places in torch.randperm(len(rows)).split(size):
                    optimizer.zero_grad()
                    self.losses(model, (inputs[places], labels[places])).mean().backward()
                    optimizer.step()
                    falling.step()
        return model.eval()

    def query_losses(self, model: nn.Module) -> Float[np.ndarray, "query"]:
        """Return the loss of each query."""
        with torch.no_grad():
            return self.losses(model, self.queries).double().numpy()


def digits_task(examples: int, queries: int, epochs: int, width: int, seed: int) -> Task:
    """Return the ResNet-9 on scikit-learn's 1,797 digits of 8 x 8 pixels."""
    train, asked = ((images.inputs.view(-1, 1, 8, 8), images.labels) for images in digits(examples, queries, seed))
    recipe = {"epochs": epochs, "batch_size": 50, "lr": 3e-3, "weight_decay": 1e-4}
    return Task(f"ResNet-9 of width {width}", train, asked, lambda: resnet9(width), losses_of, recipe)


def resnet9(width: int) -> nn.Module:
    """Return a ResNet of nine layers for images [image, 1, 8, 8], with GroupNorm in place of BatchNorm.

    Statistics of a batch would make an example's loss depend on the others.
    """
    return nn.Sequential(
        _convolution(1, width),
        _convolution(width, 2 * width),
        nn.MaxPool2d(2),
        _Residual(2 * width),
        _convolution(2 * width, 4 * width),
        nn.MaxPool2d(2),
        _convolution(4 * width, 4 * width),
        _Residual(4 * width),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, CLASSES),
    )


def _convolution(wide_in: int, wide_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False), nn.GroupNorm(4, wide_out), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(_convolution(width, width), _convolution(width, width))

    def forward(self, images: Tensor) -> Tensor:
        return images + self.layers(images)


def melodies_task(
    examples: int, queries: int, epochs: int, width: int, length: int, vocabulary: int, seed: int
) -> Task:
    """Return the music transformer on the beginnings of tunes."""
    tunes = read_tunes(length + 1)
    if len(tunes) < examples + queries:
        raise DataError(f"There are {len(tunes)} tunes of {length + 1} notes, and {examples + queries} are needed.")
    order = np.random.default_rng(seed).permutation(len(tunes))[: examples + queries]
    chosen = [tunes[place] for place in order]
    counted = Counter(note for tune in chosen for note in tune)
    # Number 0 stands for all the rest.
    numbers = {note: place for place, (note, _) in enumerate(counted.most_common(vocabulary - 1), 1)}
    tokens = torch.tensor([[numbers.get(note, 0) for note in tune] for tune in chosen])
    train, asked = (
        (part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in (tokens[:examples], tokens[examples:])
    )

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)

    return Task(
        f"music transformer of width {width}",
        train,
        asked,
        lambda: MusicTransformer(vocabulary, width, 2, 4, length),
        losses,
        {"epochs": epochs, "batch_size": 16, "lr": 3e-3},
    )


_BOOKS = ("oneills1850", "ryansMammoth")
"""Folders of two printed collections of dance tunes, of 1903 and 1883."""
_NOTE = re.compile(r"[_=^]*[A-Ga-gz][,']*\d*(?:/\d*)?|\|")
_NO_NOTES = re.compile(r"%.*|\"[^\"]*\"|\{[^}]*\}|![^!]*!|\[[A-Z]:[^]]*\]")
"""Comments, chords, grace notes, decorations and fields in ABC notation."""
_FIELD = re.compile(r"[A-Za-z+]:")


def read_tunes(notes: int) -> list[list[str]]:
    """Return the first `notes` notes, rests and bars of every tune of the package that has as many, copies once.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It holds no such tunes.
    """
    folder = package_folder("music21") / "corpus"
    found: dict[tuple[str, ...], None] = {}
    for path in (path for book in _BOOKS for path in sorted(folder.glob(f"{book}/*.abc"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        for tune in re.split(r"^X:", text, flags=re.MULTILINE)[1:]:
            lines = [_NO_NOTES.sub("", line) for line in tune.splitlines()[1:] if not _FIELD.match(line)]
            read = _NOTE.findall(" ".join(lines))
            if len(read) >= notes:
                found.setdefault(tuple(read[:notes]))
    if not found:
        raise DataError(f"{folder} holds no tunes of {notes} notes. {install_again('music21')}")
    return [list(tune) for tune in found]


class MusicTransformer(nn.Module):
    """A causal transformer whose attention scores have a learned term for every distance.

    Huang et al. 2019, arXiv:1809.04281.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.notes = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Layer(width, heads, length) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, notes: Int[Tensor, "tune note"]) -> Float[Tensor, "tune note vocabulary"]:
        """Return logits of the note that follows each."""
        hidden = self.notes(notes)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.sides, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.distance = nn.Embedding(length, width // heads)
        self.wide, self.narrow = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden: Float[Tensor, "tune note width"]) -> Float[Tensor, "tune note width"]:
        hidden = hidden + self._attend(self.before(hidden))
        return hidden + self.narrow(torch.relu(self.wide(self.between(hidden))))

    def _attend(self, hidden: Float[Tensor, "tune note width"]) -> Float[Tensor, "tune note width"]:
        tunes, length, width = hidden.shape
        sides = self.sides(hidden).view(tunes, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = sides.unbind(0)
        steps = torch.arange(length)
        # A look-up for each tune, though all are alike: its gradient is then each example's own.
        by_distance = query @ self.distance(steps.expand(tunes, -1)).mT.unsqueeze(1)
        back = (steps[:, None] - steps).clamp(min=0).expand(tunes, self.heads, -1, -1)
        scores = (query @ key.mT + by_distance.gather(3, back)) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(steps > steps[:, None], float("-inf"))
        return self.out((torch.softmax(scores, -1) @ value).transpose(1, 2).reshape(tunes, length, width))
