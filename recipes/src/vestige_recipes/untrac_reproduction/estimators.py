"""The estimators of the UnTrac reproduction by their names, with its defaults, on Vestige's own.

What differs: the test text is unlearnt by ascent, where the published code descends, so that a high score means help;
texts are measured one by one, without padding; a quantised model moves LoRA matrices, for packed weights cannot.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

import vestige
from vestige import methods
from vestige.progress import announce, quiet

Values = Float[np.ndarray, "text"]
_TOKENS = 512
_RANK = 8
"""Of the LoRA matrices that a quantised model moves."""


@dataclass
class UnTracConfig:
    """The published settings with their defaults: one step of plain gradient ascent on one text at a time."""

    model_name: Any = "gpt2"
    unlearning_rate: float = 5e-5
    unlearning_steps: int = 1
    batch_size: int = 1
    max_train_samples: int = 10_000
    """Further texts are cut off, which is announced."""
    max_test_samples: int = 100
    top_k_influences: int = 50
    device: str = "auto"
    seed: int = 42
    gradient_checkpointing: bool = False


class UnTracInfluenceEstimator:
    """Scores training texts by the rise of their loss when a test text is unlearnt; positive: the text helps it."""

    def __init__(self, config: UnTracConfig | None = None) -> None:
        self.config = config or UnTracConfig()

    @cached_property
    def estimator(self) -> methods.UnTrac:
        """Vestige's own estimator with these settings."""
        return methods.UnTrac(methods.UnTracConfig(**self._settings()))

    def _settings(self) -> dict[str, Any]:
        return {**vars(self.config), "optimizer": "sgd", "loss": "mean", "max_length": _TOKENS}

    def compute_influence_scores(
        self, test_text: str | Sequence[str], train_texts: Sequence[str], show_progress: bool = True
    ) -> Values:
        """Return the rise of each training text's mean loss, nats per token, in the order of the texts kept."""
        tests = [test_text] if isinstance(test_text, str) else test_text
        tests = cut_texts(tests, self.config.max_test_samples, "max_test_samples")
        kept = cut_texts(train_texts, self.config.max_train_samples, "max_train_samples")
        with quiet(not show_progress):
            return self.estimator.compute_influence_scores(tests, kept)

    def get_top_k_influences(
        self, test_text: str | Sequence[str], train_texts: Sequence[str], k: int | None = None
    ) -> list[tuple[int, float, str]]:
        """Return position, score and text of the `k` highest, highest first (`top_k_influences` if not given)."""
        scores = self.compute_influence_scores(test_text, train_texts)
        order = np.argsort(-scores, kind="stable")[: k or self.config.top_k_influences]
        return [(int(row), float(scores[row]), train_texts[int(row)]) for row in order]


class MemoryEfficientUnTracEstimator(UnTracInfluenceEstimator):
    """The same for large models: maps packed in 4 or 8 bits beside LoRA matrices, which are what moves."""

    def __init__(self, config: UnTracConfig | None = None, use_quantization: bool = False, quant_bits: int = 4) -> None:
        super().__init__(config)
        self._packed = {"quantize": quant_bits, "lora_rank": _RANK} if use_quantization else {}

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | self._packed

    def compute_influence_scores_batched(
        self, test_text: str | Sequence[str], train_texts: Sequence[str], batch_size: int = 8
    ) -> Values:
        """Return `compute_influence_scores`: texts share passes as the memory allows, and no loss depends on that."""
        announce(f"batch_size={batch_size} is not used: batches follow from the memory, and scores never from batches.")
        return self.compute_influence_scores(test_text, train_texts)


class TracInBaseline:
    """Inner products of the gradients of the test text and of each training text, at the model's weights."""

    def __init__(self, model: Any, tokenizer: Any = None, device: str = "auto") -> None:
        self.model, self.tokenizer, self.device = model, tokenizer, str(device)

    def compute_influence_scores(self, test_text: str, train_texts: Sequence[str]) -> Values:
        """Return the inner product for each training text; positive: a step on it lowers the test text's loss."""
        with tempfile.TemporaryDirectory() as folder:
            found = vestige.attribute(
                model=self.model,
                tokenizer=self.tokenizer,
                device=self.device,
                data=[{"text": text} for text in train_texts],
                queries=[{"text": test_text}],
                method="grad-dot",
                components=("all",),
                loss="mean",
                max_length=_TOKENS,
                dense=True,
                trust=False,
                out=Path(folder) / "run",
            )
            return np.asarray(found.dense()[0], dtype=np.float64)


def cut_texts(texts: Sequence[str], most: int, setting: str) -> list[str]:
    """Return the first `most` texts, and announce what was cut."""
    if len(texts) > most:
        announce(f"The first {most:,} of {len(texts):,} texts are used ({setting}={most}).")
    return list(texts[:most])
