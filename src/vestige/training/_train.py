"""`vestige train`: from a model and data to a training that attribution and audit can read."""

import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from vestige.data import TokenizedData, describe_copies, token_groups
from vestige.errors import DataError, IndexMismatch, NonFinite, SpecError, UserError, differences, mismatch_message
from vestige.indexes import batch_tokens, read_data
from vestige.models import LoadedModel, Lora, load_model, quiet_transformers, trainable_copy
from vestige.progress import Progress, announce, progress
from vestige.runs import environment
from vestige.settings import TrainSettings, with_settings
from vestige.storage import check_disk, make_folder, remove_result, remove_strays, require_no_others
from vestige.tables import write_table
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes
from vestige.training._alarm import Alarm
from vestige.training._examples import (
    Rows,
    WeightedTrainer,
    announce_weights,
    members_of,
    only_answers,
    pad,
    read_weights,
    restore_randomness,
    with_weights,
)
from vestige.training._recorder import Recorder
from vestige.training._store import (
    FORMAT,
    KIND,
    MEMBERSHIP,
    RECORD,
    RESULT_FILES,
    CurrentStep,
    TrainingRun,
    checkpoint_folder,
    checkpoint_steps,
    identity_digest,
    plan_steps,
    read_record,
    remove_after,
    remove_step,
    write_record,
    write_step,
)

_SECONDS_BETWEEN_NOTES = 2.0
_OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}
_ELSEWHERE = (
    *("model", "data", "out", "tokenizer", "device", "token_budget", "limit", "where", "max_length", "chat"),
    *("overwrite", "checkpoints", "keep_optimizer", "precision", "group"),
)
"""Settings that do not stand in the identity as given: other entries of it say what came of them, or they change
nothing of the result."""


class TrainInputs(NamedTuple):
    """What a training begins with."""

    loaded: LoadedModel
    data: TokenizedData
    weights: np.ndarray | None
    """How much each example counts, float32 [example]; None where all count alike."""


@with_settings(TrainSettings)
def train(settings: TrainSettings) -> TrainingRun:
    """Train a model on the data, or on a random part, with checkpoints that load and a record of all losses.

    Interrupted at any moment, the same call goes on at the last checkpoint and gives the same weights, losses and
    alarm; another setting over an old training is refused, with the difference shown.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        NonFinite: A loss is not finite; the message names the examples.
    """
    loaded, data, weights = read_inputs(settings)
    if settings.overwrite:
        remove_result(settings.out, RESULT_FILES, RECORD)
    old = read_record(settings.out)
    groups = group_examples(settings, data, old)
    plan = make_plan(settings, data, weights, groups)
    identity = _identify(settings, loaded, data, plan)
    if (copies := describe_copies(groups, settings.group)) is not None:
        announce(copies)
        identity["group"] = settings.group or "copies"
    _prepare_folder(settings, old, identity, {"model": loaded.name, "data": data.name})
    done = checkpoint_steps(settings.out)
    if old is not None and "seconds" in old and done and done[-1] == plan.steps:
        announce(f"{settings.out}: this training is finished; nothing was done.")
        return TrainingRun.open(settings.out)
    write_table(settings.out / MEMBERSHIP, _tabulate_members(data, plan.members), compression="zstd")
    started = time.perf_counter()
    with torch.random.fork_rng(), restore_randomness(), quiet_transformers(), warnings.catch_warnings():
        # PEFT and torch warn of what is meant here: matrices beside a tied head, a scheduler that is loaded.
        warnings.simplefilter("ignore", UserWarning)
        _run(settings, loaded, data, plan)
    record = {**(read_record(settings.out) or {}), "versions": environment()}
    record |= {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
    record["peak_gpu_memory_bytes"] = peak_gpu_memory_bytes()
    write_record(settings.out, record)
    return TrainingRun.open(settings.out)


def read_inputs(settings: TrainSettings) -> TrainInputs:
    """Read the model and the data as a training takes them.

    Raises:
        UserError: Something about the model or the data needs the caller.
    """
    loaded = load_model(
        settings.model, tokenizer=settings.tokenizer, precision=settings.precision, device=settings.device
    )
    return TrainInputs(loaded, *read_learned(settings, loaded))


def read_learned(
    settings: TrainSettings, loaded: LoadedModel
) -> tuple[TokenizedData, Float[np.ndarray, "example"] | None]:
    """Read the data as a training with these settings learns them, with their weights; None if all are 1."""
    data = read_data(settings, settings.data, loaded)
    if settings.loss == "answer":
        data = only_answers(data, getattr(loaded.tokenizer, "eos_token_id", None))
    weights = read_weights(data)
    if weights is None:
        return data, None
    announce_weights(data, weights)
    return with_weights(data, weights), weights


def steps_per_epoch(examples: int, settings: TrainSettings) -> int:
    """Return the steps of the optimizer in a pass over that many examples, the last of them smaller."""
    batches = -(-examples // settings.batch_size)
    return -(-batches // settings.accumulation)


@dataclass(frozen=True)
class Plan:
    """Which examples a training takes, and how many steps."""

    members: np.ndarray
    """bool [example]: drawn to be trained on, and of a weight above 0."""
    rows: np.ndarray
    """Members that have something to learn."""
    weights: np.ndarray | None
    """float32 [example]; None if every member has weight 1."""
    steps: int
    checkpoints: list[int]


def group_examples(
    settings: TrainSettings, data: TokenizedData, old: dict[str, Any] | None
) -> Int[np.ndarray, "example"]:
    """Group the examples of which all are trained on or none; an old training by single rows continues like that."""
    by_row = old is not None and "group" not in (old.get("identity") or {}) and settings.group is None
    return np.arange(len(data)) if by_row or settings.split_fraction == 1 else token_groups(data, settings.group)


def make_plan(
    settings: TrainSettings, data: TokenizedData, weights: np.ndarray | None, groups: Int[np.ndarray, "example"]
) -> Plan:
    """Return the plan of a training.

    Raises:
        DataError: None of its examples has a token to learn.
    """
    members = members_of(groups, settings.split_fraction, settings.split_seed)
    if weights is not None:
        members &= weights > 0
        weights = None if (weights[members] == 1).all() else weights
    rows = np.flatnonzero(members & (data.target_counts > 0))
    if not len(rows):
        raise DataError(f"{data.name}: none of the {members.sum()} examples to train on has a token to learn.")
    if len(rows) < members.sum():
        announce(f"{members.sum() - len(rows):,} of {members.sum():,} examples to train on have no token to learn.")
    per_epoch = steps_per_epoch(len(rows), settings)
    steps = max(1, int(settings.epochs * per_epoch + 0.5))
    return Plan(members, rows, weights, steps, plan_steps(settings.checkpoint_epochs, per_epoch, steps))


def _tabulate_members(data: TokenizedData, members: np.ndarray) -> pa.Table:
    examples = list(data.examples)
    ids, *texts = ([getattr(example, name) for example in examples] for name in ("id", "source", "label"))
    columns = [pa.array(ids, pa.string()), pa.array(members), *(pa.array(text, pa.string()) for text in texts)]
    return pa.table(columns, names=["example_id", "member", "source", "label"])


def _identify(settings: TrainSettings, loaded: LoadedModel, data: TokenizedData, plan: Plan) -> dict[str, Any]:
    """Return everything that decides the result, in JSON terms; the length of the training and its checkpoints too.

    Two training runs that differ in epochs alone are different ones from the first step on, because the learning rate
    falls otherwise.
    """
    return {
        "format": FORMAT,
        "model": loaded.fingerprint,
        "data": data.fingerprint,
        "examples": len(data),
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        **{name: value for name, value in settings.record().items() if name not in _ELSEWHERE},
        "steps": plan.steps,
        "checkpoints": plan.checkpoints,
    }


def _prepare_folder(
    settings: TrainSettings, old: dict[str, Any] | None, identity: dict[str, Any], names: dict[str, str]
) -> None:
    """Prepare the folder with the record of this training, new or as an interrupted one has left it.

    Raises:
        IndexMismatch: It holds a training with other settings; nothing was changed.
        UserError: It holds something else.
    """
    folder = settings.out
    if old is None:
        require_no_others(folder, ())
    elif old.get("identity") is None:
        raise UserError(f"{folder} was recorded from a Trainer of your own. Give another --out.")
    elif found := differences(old["identity"], identity, old["names"], names):
        raise IndexMismatch(mismatch_message(f"The training in {folder}", found))
    make_folder(folder)
    remove_strays(folder)
    if old is None:
        record = {
            "format": FORMAT,
            "kind": KIND,
            "vestige": version("vestige"),
            "id": identity_digest(identity),
            "command": settings.command_line("train"),
            "config": settings.record(),
            "identity": identity,
            "names": names,
        }
        write_record(folder, record)


def _run(settings: TrainSettings, loaded: LoadedModel, data: TokenizedData, plan: Plan) -> None:
    model = make_model(settings, loaded)
    _announce(settings, model, plan, len(data))
    done = [step for step in checkpoint_steps(settings.out) if step]
    last = done[-1] if done else 0
    remove_after(settings.out, last)
    with progress(plan.steps - last, "Training", unit="steps") as bar:
        watcher = _Watcher(bar, settings.out, plan.steps - last)
        eval_size = max(1, batch_tokens(settings, loaded) // max(1, int(data.lengths.max())))
        trainer = make_trainer(settings, loaded.tokenizer, model, Rows(data, plan.rows, plan.weights), plan, eval_size)
        trainer.add_callback(watcher)
        watcher.recorder = Recorder(
            trainer,
            settings.out,
            checkpoints=settings.checkpoints,
            alarm=_make_alarm(settings),
            watch=Rows(data, range(len(data))) if settings.losses else None,
            keep_optimizer=settings.keep_optimizer,
            overwrite=True,
        )
        trainer.train(resume_from_checkpoint=str(checkpoint_folder(settings.out, last)) if last else None)
    watcher.recorder.release()
    remove_step(settings.out)


def make_model(settings: TrainSettings, loaded: LoadedModel) -> nn.Module:
    """Return a copy of the model as it is before the first step, with new LoRA matrices where they are trained."""
    lora = None
    if settings.lora_rank is not None:
        lora = Lora(settings.lora_rank, settings.lora_alpha, settings.lora_dropout, settings.lora_targets)
    return trainable_copy(loaded, lora_rank=lora, seed=settings.seed)


def make_trainer(
    settings: TrainSettings, tokenizer: Any, model: nn.Module, rows: Rows, plan: Plan, eval_size: int
) -> Trainer:
    """Return the Trainer that takes the steps of a plan."""
    device = next(model.parameters()).device
    if device.type == "cuda" and device.index:
        raise SpecError(
            f"--device {device}: the Trainer takes the first GPU. Type CUDA_VISIBLE_DEVICES={device.index}."
        )
    constant = "constant_with_warmup" if settings.warmup else "constant"
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=plan.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=eval_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        optim=_OPTIMIZERS[settings.optimizer],
        weight_decay=settings.weight_decay,
        lr_scheduler_type=constant if settings.schedule == "constant" else settings.schedule,
        warmup_steps=settings.warmup,
        max_grad_norm=settings.clip,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
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
    make = Trainer if plan.weights is None else WeightedTrainer
    trainer = make(model=model, args=arguments, train_dataset=rows, data_collator=pad, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _make_alarm(settings: TrainSettings) -> Alarm | None:
    if not settings.alarm:
        return None
    layer: Any = settings.alarm_layer
    names = ("measure", "below", "window", "threshold", "quantile")
    given = {name: getattr(settings, f"alarm_{name}") for name in names}
    return Alarm(**given, layer=int(layer) if layer.isdigit() else layer, seed=settings.seed)


class _Watcher(TrainerCallback):
    """Shows how far the training is, and stops it where a loss is not finite; called before the recorder."""

    recorder: Recorder

    def __init__(self, bar: Progress, folder: Path, steps: int) -> None:
        self._bar, self._folder, self._steps = bar, folder, steps
        self._begun = self._written = time.monotonic()
        self._done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        ids, losses = self.recorder.last_step
        if bad := [name for name, loss in zip(ids, losses, strict=True) if not np.isfinite(loss)]:
            raise NonFinite(
                f"The loss of {', '.join(map(repr, bad[:8]))} in step {state.global_step} is not finite. The last "
                "checkpoint is as it was. Lower --learning-rate, or check these examples."
            )
        self._bar.advance()
        self._bar.note(f"loss {np.mean(losses):.3f}")
        self._done += 1
        now = time.monotonic()
        if now - self._written >= _SECONDS_BETWEEN_NOTES and self._done < self._steps:
            self._written = now
            rate = self._done / (now - self._begun)
            write_step(self._folder, CurrentStep(state.global_step, state.max_steps, float(np.mean(losses)), rate))


def _announce(settings: TrainSettings, model: nn.Module, plan: Plan, examples: int) -> None:
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    saved = learning if hasattr(model, "peft_config") else [*model.parameters()]
    size = sum(weight.numel() * weight.element_size() for weight in saved)
    states = len(plan.checkpoints) if settings.keep_optimizer else 1
    trained = sum(weight.numel() for weight in learning)
    moments = 2 * 4 * trained if settings.optimizer == "adamw" else 0
    missing = len(plan.checkpoints) - len(checkpoint_steps(settings.out))
    check_disk(settings.out, missing * size + min(states, max(missing, 0)) * moments if missing > 0 else 0)
    announce(
        f"Training {trained:,} of {sum(weight.numel() for weight in model.parameters()):,} parameters on "
        f"{len(plan.rows):,} of {examples:,} examples: {plan.steps:,} steps, {len(plan.checkpoints)} checkpoints."
    )
