"""`vestige train`: from a model and data to a training that attribution and audit can read."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int
from torch import nn
from transformers import Trainer

from vestige.data import TokenizedData, describe_copies, token_groups
from vestige.errors import DataError, IndexMismatch, UserError, differences, mismatch_message
from vestige.indexes import batch_tokens
from vestige.jobs import is_follower
from vestige.models import LoadedModel
from vestige.online import Attached, OnlineLog, attach, write_in_run_influence
from vestige.progress import Progress, announce, progress
from vestige.runs import environment
from vestige.settings import LearningSettings, TrainSettings, list_epochs, with_settings
from vestige.storage import (
    check_disk,
    make_folder,
    remove_result,
    remove_strays,
    remove_tree,
    require_no_others,
    write_durably,
)
from vestige.tables import write_table
from vestige.timing import peak_gpu_memory_bytes, peak_memory_bytes
from vestige.training._alarm import Alarm
from vestige.training._engine import Rows, Step, fit, make_model
from vestige.training._examples import TrainInputs, members_of, read_inputs
from vestige.training._recorder import Recorder
from vestige.training._store import (
    FORMAT,
    IN_RUN,
    IN_RUN_LOG,
    MEMBERSHIP,
    RECORD,
    RESULT_FILES,
    RESULTS,
    STEP,
    CurrentStep,
    TrainingRun,
    begin_record,
    checkpoint_folder,
    checkpoint_steps,
    identity_digest,
    last_resumable,
    plan_steps,
    read_record,
    remove_after,
    write_record,
    write_step,
)
from vestige.training._tracking import Tracking, open_tracking

_SECONDS_BETWEEN_NOTES = 2.0
_ELSEWHERE = (
    *("model", "data", "out", "tokenizer", "device", "token_budget", "limit", "where", "max_length", "chat"),
    *("overwrite", "checkpoints", "keep_optimizer", "precision", "group", "steps", "validation"),
    "score_optimizer",
    "report_to",
)
"""Settings that do not stand in the identity as given: other entries of it say what came of them, or they change
nothing of the result."""


@with_settings(TrainSettings)
def train(
    settings: TrainSettings, on_step: Callable[[], object] = lambda: None, group: str | None = None
) -> TrainingRun:
    """Train a model on the data, or on a random part, with checkpoints that load and a record of all losses.

    Interrupted at any moment, the same call goes on at the last checkpoint and gives the same weights, losses and
    alarm; another setting over an old training is refused, with the difference shown.

    Args:
        settings: Model, data, folder and how to learn.
        on_step: Called after each step of the optimizer.
        group: What trackers list it under, with others.

    Raises:
        UserError: Something about the model, the data, the settings or the disk needs the caller.
        NonFinite: A loss is not finite; the message names the examples.
    """
    inputs = read_inputs(settings)
    loaded, data, weights, validation = inputs
    if settings.overwrite:
        remove_result(settings.out, RESULT_FILES, RECORD)
    old = read_record(settings.out)
    groups = group_examples(settings, data, old)
    plan = make_plan(settings, data, weights, groups)
    identity = _identify(settings, loaded, data, plan)
    if validation is not None:
        identity |= {"validation": validation.fingerprint, "score_optimizer": settings.score_optimizer}
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
    _run(settings, inputs, plan, on_step, group)
    if validation is not None and not (settings.out / IN_RUN).exists():
        write_in_run_influence(settings.out / IN_RUN_LOG, data, validation, settings.out / IN_RUN)
        _write_losses(settings.out)
    record = {**(read_record(settings.out) or {}), "versions": environment()}
    record |= {"epochs": plan.epochs, "seconds": time.perf_counter() - started}
    record["peak_memory_bytes"] = peak_memory_bytes()
    record["peak_gpu_memory_bytes"] = peak_gpu_memory_bytes()
    write_record(settings.out, record)
    return TrainingRun.open(settings.out)


def _write_losses(folder: Path) -> None:
    """Write the losses before every step, nats: of the batch, as the model returned it, and of the validation examples.

    The keys are those of GhostSuite's results; there is no test set beside the validation examples.
    """
    log = OnlineLog.open(folder / IN_RUN_LOG).table().group_by("step", use_threads=False)
    steps = log.aggregate([("loss", "mean"), ("validation_loss", "max")]).to_pylist()
    content = [
        {
            "step": one["step"],
            "train_loss": one["loss_mean"],
            "eval_loss": one["validation_loss_max"],
            "test_loss": None,
        }
        for one in steps
    ]
    write_durably(folder / RESULTS, [(json.dumps(content, indent=1) + "\n").encode()])


def steps_per_epoch(examples: int, settings: LearningSettings) -> int:
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
    epochs: float
    """The same in passes over the rows."""
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
    """Return the plan of a training."""
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
    steps = settings.count_steps(per_epoch)
    epochs = settings.passes or steps / per_epoch
    saved = plan_steps(list_epochs(settings.checkpoints, epochs), per_epoch, steps)
    return Plan(members, rows, weights, steps, epochs, saved)


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
        **({} if settings.passes is None else {"epochs": settings.passes}),
        "steps": plan.steps,
        "checkpoints": plan.checkpoints,
    }


def _prepare_folder(
    settings: TrainSettings, old: dict[str, Any] | None, identity: dict[str, Any], names: dict[str, str]
) -> None:
    """Prepare the folder with the record of this training, new or as an interrupted one has left it."""
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
        command, config = settings.command_line("train"), settings.record()
        begin_record(
            folder, id=identity_digest(identity), command=command, config=config, identity=identity, names=names
        )


def _run(
    settings: TrainSettings, inputs: TrainInputs, plan: Plan, on_step: Callable[[], object], group: str | None
) -> None:
    loaded, data = inputs.loaded, inputs.data
    model = make_model(settings, loaded, settings.seed)
    _announce(settings, model, plan, len(data))
    last = last_resumable(settings.out)
    remove_after(settings.out, last)
    if not last:
        remove_tree(settings.out / IN_RUN_LOG)
    reported = () if is_follower() else settings.report_to
    config = settings.record() | {"parameters": sum(each.numel() for each in model.parameters()), "steps": plan.steps}
    with (
        open_tracking(reported, settings.out, config, group=group, step=last) as tracking,
        progress(plan.steps - last, "Training", unit="steps") as bar,
    ):
        watcher = _Watcher(settings, inputs, plan, tracking, bar, on_step)
        fit(
            model,
            Rows(data, plan.rows, plan.weights),
            settings,
            steps=plan.steps,
            seed=settings.seed,
            hooks=[watcher.begin],
            after_step=watcher.note,
            resume=checkpoint_folder(settings.out, last) if last else None,
            tokenizer=loaded.tokenizer,
            eval_size=max(1, batch_tokens(settings, loaded) // max(1, int(data.lengths.max()))),
        )
    watcher.recorder.release()
    (settings.out / STEP).unlink(missing_ok=True)


def _make_alarm(settings: TrainSettings) -> Alarm | None:
    if not settings.alarm:
        return None
    layer: Any = settings.alarm_layer
    names = ("measure", "below", "window", "threshold", "quantile")
    given = {name: getattr(settings, f"alarm_{name}") for name in names}
    return Alarm(**given, layer=int(layer) if layer.isdigit() else layer, seed=settings.seed)


@dataclass
class _Watcher:
    """Records a training, scores its steps if there are validation examples, and shows how far it is."""

    settings: TrainSettings
    inputs: TrainInputs
    plan: Plan
    tracking: Tracking
    bar: Progress
    on_step: Callable[[], object]
    recorder: Recorder = field(init=False)
    scores: Attached | None = None
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    written: float = field(default_factory=time.monotonic)

    def begin(self, trainer: Trainer) -> None:
        """Record this Trainer, and score its steps."""
        settings, data = self.settings, self.inputs.data
        self.recorder = Recorder(
            trainer,
            settings.out,
            checkpoints=settings.checkpoints,
            alarm=_make_alarm(settings),
            watch=Rows(data, range(len(data))) if settings.losses else None,
            keep_optimizer=settings.keep_optimizer,
            overwrite=True,
            on_losses=lambda step, found: self.tracking.log({"train/data_loss": float(np.nanmean(found.loss))}, step),
        )
        if self.inputs.validation is not None:
            self.scores = attach(
                trainer,
                self.inputs.validation,
                out=settings.out / IN_RUN_LOG,
                select=settings.select,
                score_optimizer=settings.score_optimizer,
                token_budget=batch_tokens(settings, self.inputs.loaded),
            )

    def note(self, step: Step) -> None:
        """Report a step, before the recorder saves a checkpoint behind it."""
        if self.scores is None:
            self.tracking.log_step(step)
        else:
            self.tracking.log_step(step, validation_loss=self.scores.engine.validation_loss)
            if step.number in self.plan.checkpoints:
                self.scores.engine.flush()
        loss = float(np.mean(self.recorder.last_step[1]))
        self.bar.advance()
        self.bar.note(f"loss {loss:.3f}")
        self.done += 1
        now = time.monotonic()
        if now - self.written >= _SECONDS_BETWEEN_NOTES and step.number < self.plan.steps:
            self.written = now
            rate = self.done / (now - self.begun)
            write_step(self.settings.out, CurrentStep(step.number, self.plan.steps, loss, rate))
        self.on_step()


def _announce(settings: TrainSettings, model: nn.Module, plan: Plan, examples: int) -> None:
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    saved = learning if hasattr(model, "peft_config") else [*model.parameters()]
    size = sum(weight.numel() * weight.element_size() for weight in saved)
    states = len(plan.checkpoints) if settings.keep_optimizer else 1
    trained = sum(weight.numel() for weight in learning)
    moments = 2 * 4 * trained if settings.optimizer == "adamw" else 0
    missing = max(0, len(plan.checkpoints) - len(checkpoint_steps(settings.out)))
    check_disk(settings.out, missing * size + min(states, missing) * moments)
    announce(
        f"Training {trained:,} of {sum(weight.numel() for weight in model.parameters()):,} parameters on "
        f"{len(plan.rows):,} of {examples:,} examples: {plan.steps:,} steps, {len(plan.checkpoints)} checkpoints."
    )
