"""Training one language model of a bank, and measuring it."""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from vestige.banks._measure import measure
from vestige.banks._members import Measured
from vestige.banks._work import Run
from vestige.data import TokenizedData
from vestige.launch import step_done
from vestige.models import LoadedModel, Lora, Recipe, Step, save_trained, shuffled_batches, train, trainable_copy
from vestige.settings import BankSettings
from vestige.storage import write_durably


@dataclass(frozen=True)
class Trainer:
    """What every member of a bank of language models is trained with."""

    settings: BankSettings
    recipe: Recipe
    steps: int
    loaded: LoadedModel
    data: TokenizedData
    queries: TokenizedData | None
    token_budget: int
    """Most tokens in a batch that is only measured."""

    def member(self, run: Run) -> Measured:
        """Train a model for `run` and return its measurements; its weights are saved if they are to be."""
        rank = self.settings.lora_rank
        lora = None if rank is None else Lora(rank, self.settings.lora_alpha, targets=self.settings.lora_targets)
        model = trainable_copy(self.loaded, lora_rank=lora, from_scratch=self.settings.from_scratch, seed=run.seed)
        batches = shuffled_batches(self.data, run.rows, self.settings.batch_size, self.steps, run.seed)

        def after(step: Step) -> None:
            every = self.settings.checkpoint_every
            if every is not None and step.number % every == 0 and step.number < len(batches):
                _save_state(run, step)
            step_done(1 / len(batches))

        train(model, self.data, batches, self.recipe, after, _read_state(run))
        model.requires_grad_(False)
        if run.weights is not None and not run.weights.is_dir():
            save_trained(model, self.loaded, run.weights)
        return self._measured(model)

    def _measured(self, model: torch.nn.Module) -> Measured:
        texts = {"example": self.data} | ({} if self.queries is None else {"query": self.queries})
        mean = self.settings.loss == "mean"
        return {
            f"{kind}_{name}": values
            for kind, data in texts.items()
            for name, values in measure(model, data, self.token_budget, mean=mean).items()
        }


def _save_state(run: Run, step: Step) -> None:
    content = io.BytesIO()
    torch.save({"bank": run.id, "seed": run.seed, "state": step.state()}, content)
    write_durably(run.checkpoint, [content.getbuffer()])


def _read_state(run: Run) -> dict[str, Any] | None:
    """Read what an earlier attempt at the same run saved, None if there is nothing to go on from."""
    try:
        saved = torch.load(run.checkpoint, weights_only=True)
        # The seed identifies the run: one with the same name in another bank has another.
        return saved["state"] if (saved["bank"], saved["seed"]) == (run.id, run.seed) else None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
        return None
