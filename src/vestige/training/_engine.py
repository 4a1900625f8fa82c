"""The training engine: the Trainer of transformers under every model that Vestige trains, and what may be hooked in."""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vestige.data import NO_TARGET, TokenizedData
from vestige.errors import NonFinite, SpecError
from vestige.jobs import own_jobs
from vestige.models import LoadedModel, Lora, quiet_transformers, trainable_copy
from vestige.online import ID_KEY, CarriedIds, quietly, restore_randomness
from vestige.settings import LearningSettings

WEIGHT = "weight"
"""Field of an example, and key of a batch, that says how much it counts."""
LEARNED = "learned"
"""Key of a batch: 0 for an example that is in it and teaches nothing, 1 for the others."""
_OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True)
class Recipe:
    """How a model learns, but for the length of the training and its seed; `LearningSettings` name the same."""

    learning_rate: float
    """At its highest."""
    batch_size: int = 8
    """Examples in a forward pass."""
    accumulation: int = 1
    """Forward passes in a step."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: float = 0.0
    """Of sgd."""
    weight_decay: float = 0.0
    """Decoupled for adamw, an L2 penalty for the others; not of norms and biases."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to zero over the steps after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises linearly from zero."""
    clip: float = 1.0
    """Largest norm of a step's gradient; 0 does not clip."""
    bf16: bool = False
    """Compute in bfloat16, with weights as they are."""
    gradient_checkpointing: bool = False
    """Keep no activations of layers."""


class Rows(Dataset):
    """Rows of tokenised data as dictionaries: `id`, `input_ids`, `labels`, and how much each counts, if that differs.

    Args:
        data: Tokenised data.
        rows: Which of them, in which order; one may be there several times.
        weights: Of all examples, float32 [example]; None where all count alike.
        without: Examples that stay in their batches and teach nothing, bool [example]; None for none.
    """

    def __init__(
        self,
        data: TokenizedData,
        rows: Sequence[int] | np.ndarray,
        weights: np.ndarray | None = None,
        without: np.ndarray | None = None,
    ) -> None:
        self._data, self._rows = data, [int(row) for row in rows]
        self._weights, self._without = weights, without

    @property
    def count_alike(self) -> bool:
        """True where all rows have the same weight."""
        return self._weights is None and self._without is None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self._rows[place]
        ids, mask = np.asarray(self._data.input_ids[row]), self._data.targets[row]
        found = {
            "id": self._data.examples[row].id,
            "input_ids": ids.astype(np.int64),
            "labels": np.where(mask, ids, NO_TARGET).astype(np.int64),
        }
        if not self.count_alike:
            found[WEIGHT] = 1.0 if self._weights is None else self._weights[row]
        if self._without is not None:
            found[LEARNED] = float(not self._without[row])
        return found


def pad(features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return rows in one batch, filled on the right with token 0: no target, and no causal model attends to it."""
    width = max(1, *(len(row["input_ids"]) for row in features))
    ids = np.zeros((len(features), width), dtype=np.int64)
    labels = np.full((len(features), width), NO_TARGET, dtype=np.int64)
    for place, row in enumerate(features):
        ids[place, : len(row["input_ids"])] = row["input_ids"]
        labels[place, : len(row["labels"])] = row["labels"]
    batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
    for name in (WEIGHT, LEARNED):
        if all(name in row for row in features):
            batch[name] = torch.tensor([float(row[name]) for row in features])
    return batch


class Losses(NamedTuple):
    """What a model makes of some examples."""

    loss: Float[np.ndarray, "example"]
    """Mean cross-entropy per target token, nats, float64; NaN without a target."""
    gap: Float[np.ndarray, "example"]
    """Logit of the target minus the largest other one, averaged over targets; NaN without a target."""
    targets: Int[np.ndarray, "example"]
    accuracy: Float[np.ndarray, "example"]
    """Share of the targets that are likelier than any other token; NaN without a target."""


@torch.no_grad()
def example_losses(logits: Float[Tensor, "example token vocabulary"], labels: Int[Tensor, "example token"]) -> Losses:
    """Compute losses and gaps of each example of a batch, in float32 on the model's device.

    Args:
        logits: At position t, of the token that `labels` names at t + 1.
        labels: Unshifted, -100 where there is no target.
    """
    wanted = labels[:, 1:] != NO_TARGET
    owners, counts = wanted.nonzero()[:, 0], wanted.sum(1)
    chosen, target = logits[:, :-1][wanted].float(), labels[:, 1:][wanted]
    right = chosen.gather(1, target[:, None])[:, 0]
    losses = F.cross_entropy(chosen, target, reduction="none")
    gaps = right - chosen.scatter(1, target[:, None], -torch.inf).amax(1)
    sums = torch.zeros(3, len(labels), dtype=torch.float64)
    sums.index_add_(1, owners.cpu(), torch.stack([losses, gaps, (gaps > 0).float()]).double().cpu())
    numbers = counts.cpu().numpy()
    means = sums.numpy() / np.where(numbers > 0, numbers, np.nan)
    return Losses(means[0], means[1], numbers, means[2])


class WeightedTrainer(Trainer):
    """A Trainer whose loss is the weighted mean over the target tokens of a step.

    Of an example i with weight w and n target tokens, over all batches that a step accumulates:
    `sum_i w_i sum_t loss_it / sum_i w_i n_i`, in nats. Each row of a batch has its weight in `weight`; one whose
    `learned` is 0 is left out of the first sum alone.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # The loss is divided by the sum over the whole step, so the Trainer must not divide by the number of batches.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the batch's share in the loss of the step."""
        ours = ("labels", WEIGHT, LEARNED)
        labels, weights = inputs["labels"][:, 1:], inputs[WEIGHT]
        outputs = model(**{name: value for name, value in inputs.items() if name not in ours})
        wanted = labels != NO_TARGET
        losses = F.cross_entropy(outputs.logits[:, :-1][wanted].float(), labels[wanted], reduction="none")
        total = self._weight_of(inputs) if num_items_in_batch is None else num_items_in_batch
        if LEARNED in inputs:
            weights = weights * inputs[LEARNED]
        loss = (losses * weights[wanted.nonzero()[:, 0]]).sum() / total
        return (loss, outputs) if return_outputs else loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        """Return the sum of the weights of all target tokens of a step."""
        return torch.stack([self._weight_of(batch) for batch in batch_samples]).sum().to(device)

    @staticmethod
    def _weight_of(batch: dict[str, Any]) -> Tensor:
        return (batch[WEIGHT] * (batch["labels"][:, 1:] != NO_TARGET).sum(1)).sum()


@contextmanager
def leave_no_trace(model: nn.Module) -> Iterator[None]:
    """Run a detour that does not affect the training: evaluation mode, no gradients, every random state restored."""
    with quietly(model), torch.no_grad():
        yield


def make_model(settings: LearningSettings, loaded: LoadedModel, seed: int) -> nn.Module:
    """Return a copy of the model as it is before the first step, with random weights or LoRA matrices if requested."""
    lora = None
    if settings.lora_rank is not None:
        lora = Lora(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets)
    return trainable_copy(loaded, lora_rank=lora, from_scratch=settings.from_scratch, seed=seed)


class Step(NamedTuple):
    """Measurements of one step of a training."""

    number: int
    """Steps done, this one included."""
    loss: float
    """Mean over the target tokens of the step, nats, weighted as in training."""
    learning_rate: float
    """Of this step, in the optimizer's first group."""
    trainer: Trainer


Hook = Callable[[Trainer], Any]
"""Adds to a Trainer, before its first step, what is to happen while it trains."""


def fit(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe | LearningSettings,
    *,
    steps: int,
    seed: int,
    after_step: Callable[[Step], Any] = lambda _: None,
    hooks: Sequence[Hook] = (),
    resume: Path | None = None,
    tokenizer: Any = None,
    eval_size: int = 8,
) -> None:
    """Train the model's weights that require gradients, in place, on the mean loss over the target tokens of each step.

    The same model, rows, recipe, steps and seed give the same weights on the same hardware, thread count and versions,
    whatever random numbers the caller has drawn; those are as before afterwards.

    Args:
        model: As `make_model` returns it.
        rows: What it learns; each has a target token.
        recipe: How.
        steps: Steps of the optimizer.
        seed: Of the order of the rows, and of dropout.
        after_step: Called after each step; what it does to the model's mode or to random numbers is undone.
        hooks: Called with the Trainer, in order, before it trains.
        resume: Checkpoint of an earlier call with the same arguments, from which it continues.
        tokenizer: What checkpoints are to hold beside the model.
        eval_size: Rows in a batch that is only measured.

    Raises:
        NonFinite: A loss is not finite; the message names the examples.
        SpecError: The model is on a GPU that the Trainer does not take.
    """
    with torch.random.fork_rng(), restore_randomness(), quiet_transformers(), warnings.catch_warnings():
        # PEFT and torch warn of what is meant here: matrices beside a tied head, a scheduler that is loaded.
        warnings.simplefilter("ignore", UserWarning)
        with own_jobs():
            trainer = _make_trainer(model, rows, recipe, steps, seed, tokenizer, eval_size)
        _Steps(trainer, after_step)
        for hook in hooks:
            hook(trainer)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def _make_trainer(
    model: nn.Module,
    rows: Rows,
    recipe: Recipe | LearningSettings,
    steps: int,
    seed: int,
    tokenizer: Any,
    eval_size: int,
) -> Trainer:
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index:
        raise SpecError(
            f"--device {device}: the Trainer takes the first GPU. Type CUDA_VISIBLE_DEVICES={device.index}."
        )
    constant = "constant_with_warmup" if recipe.warmup else "constant"
    arguments = TrainingArguments(
        output_dir=tempfile.gettempdir(),  # where it writes nothing
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=eval_size,
        gradient_accumulation_steps=recipe.accumulation,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type=constant if recipe.schedule == "constant" else recipe.schedule,
        warmup_steps=recipe.warmup,
        max_grad_norm=recipe.clip,
        seed=seed,
        data_seed=seed,
        bf16=recipe.bf16,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recipe.gradient_checkpointing else None,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    # Other GPUs that are visible would be trained on too, on parts of each batch.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    given = {"lr": recipe.learning_rate} | ({"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {})
    make = Trainer if rows.count_alike else WeightedTrainer
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=pad,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(_OPTIMIZERS[recipe.optimizer], given),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Steps(TrainerCallback):
    """Stops a training whose loss is not finite, and calls a function after each of its other steps."""

    def __init__(self, trainer: Trainer, call: Callable[[Step], Any]) -> None:
        self._trainer, self._call, self._loss, self._rate = trainer, call, 0.0, 0.0
        self._model: Any = trainer.model
        self._carried = CarriedIds(trainer, "id", self._training_step)
        trainer.add_callback(self)

    def _training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        ids, tokens, labels = list(inputs[ID_KEY]), inputs["input_ids"], inputs["labels"]
        loss = self._carried.plain_step(model, inputs, num_items_in_batch)
        self._loss += float(loss)
        if not math.isfinite(self._loss):
            with leave_no_trace(self._model):
                device = next(self._model.parameters()).device
                found = example_losses(self._model(input_ids=tokens.to(device)).logits, labels.to(device)).loss
            bad = [name for name, each in zip(ids, found, strict=True) if not np.isfinite(each)] or ids
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise NonFinite(
                f"The loss of {', '.join(map(repr, bad[:8]))}{more} in step {self._trainer.state.global_step + 1} is "
                "not finite. What was saved before is as it was. Lower the learning rate (now "
                f"{self._trainer.args.learning_rate:g}), or check these examples."
            )
        return loss

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Note the rate of this step, before the scheduler changes it."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Call the function."""
        step, self._loss = Step(state.global_step, self._loss, self._rate, self._trainer), 0.0
        with leave_no_trace(self._model):
            self._call(step)
