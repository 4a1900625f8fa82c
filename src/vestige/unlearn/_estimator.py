"""UnTrac in a few lines of Python: a configuration, scores of texts, the top of the list."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.data import TokenizedData, load_examples, tokenize
from vestige.errors import SpecError
from vestige.indexes import tokens_at_most
from vestige.models import LoadedModel, load_model
from vestige.settings import AscentOptimizer, UntracSettings
from vestige.unlearn._job import make_job
from vestige.unlearn._untrac import Scored


@dataclass(frozen=True)
class UnTracConfig:
    """How texts are scored; the names are those of the UnTrac reproduction."""

    model_name: Any = "gpt2"
    """Hub id, folder or a live module."""
    tokenizer: Any = None
    """When it does not lie beside the model."""
    optimizer: AscentOptimizer = "adam"
    unlearning_rate: float | None = None
    """None chooses it without ground truth."""
    unlearning_steps: int = 5
    batch_size: int = 256
    max_train_samples: int = 10_000
    max_test_samples: int = 100
    top_k_influences: int = 50
    max_length: int | None = None
    """Tokens after which texts are cut; None for the model's context."""
    device: str = "auto"
    precision: str = "auto"
    seed: int = 42
    gradient_checkpointing: bool = False
    lora_rank: int | None = None


class Influence(NamedTuple):
    """One training text in a ranking."""

    rank: int
    """From 1."""
    position: int
    """Position among the training texts."""
    score: float
    text: str


class UnTrac:
    """Scores of training texts for test texts by UnTrac-Inv: unlearn the test texts, see whose loss rises.

        untrac = UnTrac(UnTracConfig(model_name="gpt2"))
        scores = untrac.compute_influence_scores("This is what the model said.", texts)
        for influence in untrac.top_k("This is what the model said.", texts, k=10):
            print(influence.rank, influence.score, influence.text)

    The model is loaded once, and is bit for bit the same after every call.
    """

    def __init__(self, config: UnTracConfig | None = None) -> None:
        self.config = config or UnTracConfig()
        self._loaded: LoadedModel | None = None

    @property
    def loaded(self) -> LoadedModel:
        """The model, loaded when it is first needed."""
        if self._loaded is None:
            config = self.config
            self._loaded = load_model(
                config.model_name,
                tokenizer=config.tokenizer,
                precision=config.precision,  # type: ignore[arg-type]
                device=config.device,
            )
        return self._loaded

    def compute_influence_scores(self, test: str | list[str], train_texts: list[str]) -> Float[np.ndarray, "text"]:
        """Return the rise of each training text's loss in nats when the test texts are unlearnt; positive: it helps.

        Raises:
            SpecError: There is no text, or more than `max_train_samples` or `max_test_samples`.
            UserError: Something about the model or the texts needs the caller.
        """
        tests = [test] if isinstance(test, str) else list(test)
        _require(len(tests), self.config.max_test_samples, "test", "max_test_samples")
        _require(len(train_texts), self.config.max_train_samples, "training", "max_train_samples")
        with tempfile.TemporaryDirectory() as folder:
            settings = self._settings(Path(folder) / "run")
            train = self._tokens([{"text": text} for text in train_texts], settings, "train_texts")
            queries = self._tokens([{"text": text, "source": "test"} for text in tests], settings, "test")
            return Scored(make_job(settings, self.loaded, train, queries)).scores[0]

    def top_k(self, test: str | list[str], train_texts: list[str], k: int | None = None) -> list[Influence]:
        """Return the `k` training texts whose score is highest (`top_k_influences` if not given), highest first."""
        scores = self.compute_influence_scores(test, train_texts)
        order = np.argsort(-scores, kind="stable")[: k or self.config.top_k_influences]
        return [
            Influence(rank, int(index), float(scores[index]), train_texts[index])
            for rank, index in enumerate(order, start=1)
        ]

    def _settings(self, out: Path) -> UntracSettings:
        config = self.config
        same = ("optimizer", "batch_size", "max_length", "seed", "gradient_checkpointing", "lora_rank")
        given: dict[str, Any] = {name: getattr(config, name) for name in same}
        given |= {"learning_rate": config.unlearning_rate, "steps": config.unlearning_steps}
        given |= {"data": "train_texts", "queries": "test", "out": out, "level": "example"}
        return UntracSettings(model=self.loaded.model, **given)

    def _tokens(self, rows: list[dict[str, str]], settings: UntracSettings, name: str) -> TokenizedData:
        return tokenize(
            load_examples(rows), self.loaded.tokenizer, max_length=tokens_at_most(settings, self.loaded), name=name
        )


def _require(number: int, most: int, what: str, setting: str) -> None:
    if not 1 <= number <= most:
        raise SpecError(f"{number} {what} texts, expected 1 to {most}. Give other texts, or a larger {setting}.")
