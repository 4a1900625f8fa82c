"""Settings that several commands share: where work runs, how text becomes tokens, and what is attributed to."""

import math
import re
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from vestige.distributed import FSDP
from vestige.errors import SpecError
from vestige.settings._base import (
    BAD_TEXT,
    Basic,
    Common,
    Input,
    Named,
    OnBadText,
    OnlyWith,
    Settings,
    Size,
    Value,
    parse_bytes,
)
from vestige.storage import local_result


def one_or_several(value: Any) -> Any:
    """Return one word, path or number as a tuple of it."""
    return (value,) if isinstance(value, str | Path | int | float) else value


ModelName = Annotated[Any, Basic(), Input("vestige.models:require_model")]
"""A hub id, a folder or a file of a model; in Python also a live module."""
TokenizerName = Annotated[Any, Input("vestige.models:require_place")]
"""A hub id or a folder with a tokenizer; in Python also a live one."""
DataName = Annotated[Any, Basic(), Input("vestige.data:require_data", each=False)]
"""Files, folders or a hub id of rows; in Python also rows."""
QueriesName = Annotated[Any, Basic(), Input("vestige.data:require_queries", each=False)]
"""As `DataName`, or the questions themselves."""
ResultFolder = Annotated[Value, BeforeValidator(local_result)]
"""The folder of a result, or `hub:owner/name`, which becomes that of its copy here."""
IndexFolder = Annotated[Value, BeforeValidator(local_result), Basic(), Input("vestige.indexes:require_index")]
RunFolder = Annotated[Value, BeforeValidator(local_result), Basic(), Input("vestige.runs:require_run")]
"""The folder of scores that `vestige attribute` left."""
BankFolder = Annotated[Value, Basic(), Input("vestige.banks:require_bank")]
TrainingFolder = Annotated[Value, Input("vestige.training:require_training")]
"""The folder that `vestige train` left."""
Paths = Annotated[tuple[Path, ...], BeforeValidator(one_or_several)]
RowLists = Annotated[Paths, Input("vestige.data:require_row_list")]
"""Files that name rows."""


def _names_of_compressors(spec: Any) -> list[str]:
    """Return the names in a spec that are in the language of today; older spellings are left to its parser."""
    return re.findall(r"(?:^|\|)\s*([a-z]+)\s*:", str(spec))


_SLURM = ("partition", "account", "gres", "time", "mem", "setup", "container", "wait")
_RAY = ("address", "gpus_per_worker")
_SHARD = re.compile(r"(\d+)/(\d+)")


class LaunchSettings(Settings):
    """Where the work runs."""

    only_with: ClassVar[OnlyWith] = {
        **dict.fromkeys(_SLURM, ("engine", ("slurm",))),
        **dict.fromkeys(_RAY, ("engine", ("ray",))),
    }

    workers: Common[PositiveInt] = Field(
        default=1, description="Processes that share the work, each with a model of its own; 1 works in this process."
    )
    engine: str = Field(
        default="local",
        description="Where workers run: local processes, slurm for a batch array, ray for actors of a Ray cluster.",
    )
    shard: str | None = Field(
        default=None,
        description="Do only part i of n of the pieces, written i/n, from 1/n to n/n, under your own scheduler.",
    )
    threads: PositiveInt = Field(default=1, description="Processor threads of each of several workers.")
    retries: NonNegativeInt = Field(
        default=2, description="How often a piece that failed or lost its worker is tried again."
    )
    partition: str | None = Field(default=None, description="slurm: partition of the jobs.")
    account: str | None = Field(default=None, description="slurm: account that the jobs are charged to.")
    gres: str | None = Field(default=None, description="slurm: resources of each worker, such as gpu:1.")
    time: str | None = Field(
        default=None, description="slurm: time limit of each job, such as 4:00:00; unfinished work is queued again."
    )
    mem: str | None = Field(default=None, description="slurm: memory of each worker, such as 32G.")
    setup: str | None = Field(
        default=None, description="slurm: shell line to run before the work, such as 'module load cuda'."
    )
    container: str | None = Field(default=None, description="slurm: Apptainer image that holds Vestige.")
    wait: bool = Field(
        default=True, description="slurm: stay, show progress and finish; --no-wait returns once submitted."
    )
    address: str | None = Field(
        default=None,
        description="ray: address of the cluster, such as 10.0.0.1:6379. Not given: the one of RAY_ADDRESS, else of "
        "this machine; where there is none, Ray is started here.",
    )
    gpus_per_worker: NonNegativeFloat | None = Field(
        default=None,
        description="ray: GPUs of each worker, 0.5 where two share one. Not given: 1 if the cluster has any.",
    )

    @field_validator("engine")
    @classmethod
    def _is_installed(cls, engine: str) -> str:
        # The registry stands on the settings; the names are known without importing an engine.
        names = sorted(entry_points(group="vestige.engines").names) if engine != "local" else [engine]
        if engine not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return engine

    @field_validator("shard")
    @classmethod
    def _shard_is_a_part(cls, shard: str | None) -> str | None:
        match = None if shard is None else _SHARD.fullmatch(shard)
        if shard is not None and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("i/n with i from 1 to n, such as 1/4")
        return shard

    @field_validator("partition", "account", "gres", "time", "mem")
    @classmethod
    def _is_one_word(cls, value: Any) -> Any:
        if isinstance(value, str) and (not value.strip() or "\n" in value):
            raise ValueError("a value as sbatch takes it")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _is_a_share_or_whole(cls, cards: float | None) -> float | None:
        if cards is not None and cards > 1 and cards != int(cards):
            raise ValueError("a whole number, or one below 1 where several workers share a GPU")
        return cards

    @property
    def part(self) -> tuple[int, int] | None:
        """`shard` as (zero-based part, number of parts)."""
        if self.shard is None:
            return None
        number, parts = self.shard.split("/")
        return int(number) - 1, int(parts)


Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
StoredType = Literal["float16", "bfloat16", "float32", "int8"]
Reduction = Literal["sum", "mean"]
Scope = Literal["component", "model"]

SHARED_COMPRESSION = "tensorsketch:4096 | sjlt:4096"
"""What the whole model is compressed with where nothing else is requested."""


Patterns = Annotated[tuple[str, ...], BeforeValidator(one_or_several)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(one_or_several)]


def _parse_named_values(value: Any) -> Any:
    """Convert words such as "labels=data" to a mapping, and leave a mapping as it is."""
    if isinstance(value, Mapping):
        return dict(value)
    found: dict[str, str] = {}
    for word in [value] if isinstance(value, str) else value or ():
        name, equals, given = str(word).partition("=")
        if not name or not equals:
            raise ValueError(f"name=value, such as labels=data, where {str(word)!r} was given")
        if found.setdefault(name, given) != given:
            raise ValueError(f"one value for {name}, and {found[name]!r} and {given!r} were given")
    return found


Options = Annotated[dict[str, Any], BeforeValidator(_parse_named_values)]
"""Values by name: a mapping, or words `name=value`; the receiver checks names and types."""
WHERE = "Use only rows whose columns have these values, written column=value, such as source=web."


SWEPT_DAMPING = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""The values that `sweep` stands for: below, float32 matrices lose their digits; above, curvature has no effect."""


def _one_or_several_dampings(value: Any) -> Any:
    """Convert to a number, or several in ascending order: from a list, words such as "0.01,0.1,1", or `sweep`."""
    if value == "sweep":
        return SWEPT_DAMPING
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    try:
        numbers = sorted({float(word) for word in words})
    except (TypeError, ValueError):
        raise ValueError("a number, several such as 0.01,0.1,1, or sweep") from None
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise ValueError("a damping above zero")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


Damping = Annotated[Any, BeforeValidator(_one_or_several_dampings)]
"""A float, or a tuple of several."""


class ReadingSettings(Settings):
    """How text becomes tokens, and where and how the model runs."""

    files: ClassVar[tuple[str, ...]] = ("data",)
    runs_sharded: ClassVar[bool] = False
    """Whether the command can run a model that is sharded over a process group, `--device fsdp`."""
    loss: Reduction = Field("sum", description="An example's loss: sum or mean over its target tokens.")
    max_length: PositiveInt | None = Field(
        None, description="Cut examples after this many tokens. Not given: the model's context."
    )
    chat: bool = Field(
        False, description="Put prompt and completion into the model's chat template, as user and assistant."
    )
    limit: Common[PositiveInt | None] = Field(None, description="Use only the first N examples.")
    where: Options = Field({}, description=WHERE)
    token_budget: PositiveInt | None = Field(
        None, description="Maximum tokens per batch, padding included; changes speed and memory, never scores."
    )
    precision: Precision = Field("auto", description="Number format in which the model runs.")
    device: Common[str] = Field(
        "auto",
        description="Where the model runs: auto, cpu, cuda, cuda:1, mps; balanced, balanced_low_0, sequential, which "
        "spread its layers over all GPUs of a process; or fsdp: each process of torchrun holds a part of every layer.",
    )
    quantize: Literal[4, 8] | None = Field(
        None,
        description="Keep the maps of the model in 4 or 8 bits, by bitsandbytes; a LoRA adapter is then attributed to.",
    )
    tokenizer: TokenizerName = Field(
        None, description="Hub id or folder of the tokenizer, when it is not beside the model."
    )
    on_bad_text: OnBadText = Field("refuse", description=BAD_TEXT)

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `load_examples` that say which rows are read, and how."""
        return {"limit": self.limit, "where": self.where, "on_bad_text": self.on_bad_text}

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `load_model` that say how a model is read, and where it runs."""
        return {name: getattr(self, name) for name in ("tokenizer", "precision", "device", "quantize")}

    @model_validator(mode="after")
    def _check_sharded(self) -> Self:
        if self.device != FSDP:
            return self
        if self.quantize is not None:
            raise SpecError(f"--quantize does not work with --device {FSDP}: packed weights are not cut. Drop one.")
        if not self.runs_sharded:
            raise SpecError(
                f"--device {FSDP} works with vestige index and vestige attribute. Here type --device balanced, which "
                "spreads the layers over all GPUs of one process."
            )
        if getattr(self, "workers", 1) > 1 or getattr(self, "engine", "local") != "local":
            raise SpecError(
                f"With --device {FSDP} the processes are those of torchrun: drop --workers and --engine. For several "
                "groups of processes start torchrun several times, each with its --shard i/n."
            )
        return self


class QuestionSettings(ReadingSettings):
    """How questions are put."""

    chat: bool | None = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        None,
        description="Put questions, and prompts with completions of the data, into the model's chat template, or do "
        "not. Not given: questions follow the data; those to conversations become a user turn, with the system prompt "
        "that most of the data has.",
    )


class CompressionSettings(Settings):
    """What is attributed to, and how it is compressed."""

    components: Common[Patterns] = Field(
        ("default",),
        description="Parameters to attribute to: attention, mlp, embedding, norm, lora, adapter, all, 'layers 0-3', "
        "globs over parameter names or whole parts of them such as mlp.c_fc, or @FILE with one of these on each line.",
    )
    compress: Annotated[str, Basic(), Named("vestige.compressors", "compressor", _names_of_compressors)] = Field(
        "tensorsketch:256",
        description="How to compress gradients, such as tensorsketch:256, 'mask:32x32 | sjlt:256', none, or auto. "
        f"With --compress-scope model and nothing given: '{SHARED_COMPRESSION}'.",
    )
    compress_scope: Scope = Field(
        "component",
        description="Keep a compressed gradient of each component, or their sum: one of the whole model, which needs a "
        "last stage that components can share, such as sjlt:4096.",
    )
    disk: Size | None = Field(None, description="Disk budget for --compress auto, such as 20GB.")
    dtype: StoredType = Field("float16", description="Number format of the compressed gradients on disk.")
    seed: int = Field(0, description="Seed of every random choice.")

    @model_validator(mode="before")
    @classmethod
    def _default_of_the_scope(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and given.get("compress_scope") == "model":
            return {"compress": SHARED_COMPRESSION, **given}
        return given

    @property
    def disk_bytes(self) -> int | None:
        """The disk budget in bytes."""
        return None if self.disk is None else parse_bytes(self.disk)


Schedule = Literal["linear", "cosine", "constant"]
TrainedOn = Literal["completion", "answer"]


class TrackingSettings(Settings):
    """Where a training or an evaluation is reported to."""

    report_to: Annotated[
        Patterns, Named("vestige.trackers", "tracker", one_or_several), Input("vestige.training:require_tracker")
    ] = Field(
        (),
        description="Report what goes on to wandb, tensorboard, trackio, or several of them; pip install "
        "'vestige[tracking]'.",
    )


class LearningSettings(TrackingSettings):
    """How a model is trained."""

    steps: PositiveInt | None = Field(None, description="Length of the training in optimizer steps, not in --epochs.")
    from_scratch: bool = Field(False, description="Begin with random weights, drawn from the seed of the training.")
    lora_rank: Common[PositiveInt | None] = Field(
        None, description="Train LoRA matrices of this rank instead of all weights."
    )
    lora_alpha: PositiveFloat | None = Field(None, description="Scale of LoRA. Not given: twice the rank.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout in front of LoRA's matrices.")
    lora_targets: Patterns = Field(
        ("all-linear",),
        description="Layers that get LoRA's matrices, by the end of their name, such as q_proj v_proj lm_head; "
        "all-linear is every linear layer but the head.",
    )
    learning_rate: Common[PositiveFloat] = Field(5e-5, description="Learning rate at its highest.")
    batch_size: Common[PositiveInt] = Field(8, description="Examples in each forward pass of training.")
    accumulation: PositiveInt = Field(1, description="Forward passes in each step of the optimizer.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="adamw, adam or sgd.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of sgd.")
    weight_decay: NonNegativeFloat = Field(0.0, description="Weight decay: decoupled for adamw, L2 for the others.")
    schedule: Schedule = Field("linear", description="How the learning rate falls to zero, or constant.")
    warmup: NonNegativeInt = Field(0, description="Steps in which the learning rate rises from zero.")
    clip: NonNegativeFloat = Field(1.0, description="Largest norm of a step's gradient; 0 does not clip.")
    bf16: bool = Field(False, description="Compute in bfloat16, with weights as they are.")
    gradient_checkpointing: bool = Field(False, description="Keep no activations of layers: less memory, slower.")

    @model_validator(mode="after")
    def _learning_fits(self) -> Self:
        if getattr(self, "epochs", None) is not None and self.steps is not None:
            raise SpecError("--epochs and --steps both say how long to train. Give one of them.")
        if self.momentum and self.optimizer != "sgd":
            raise SpecError(f"--momentum is for --optimizer sgd; {self.optimizer} has its own.")
        if self.from_scratch and self.lora_rank is not None:
            raise SpecError("--lora-rank adapts trained weights; with --from-scratch there are none.")
        if self.lora_rank is None and (given := self.flags_given("lora_alpha", "lora_dropout", "lora_targets")):
            raise SpecError(f"{given}: of LoRA, which --lora-rank turns on. Give a rank, or leave it out.")
        return self


class MemberSettings(LearningSettings):
    """How each of several models is trained."""

    epochs: Common[PositiveInt | None] = Field(
        None,
        description="Length of the training: passes over a random subset, or, where something is left out, as many "
        "steps as passes over all data take. Not given: 3, or what --steps says.",
    )
    learn: TrainedOn = Field(
        "completion", description="Learn the whole completion (of a text all of it), or its answer without the end."
    )
    drop_by: Literal["row", "weight"] = Field(
        "row",
        description="row: a model does not read what it is trained without; weight: it reads everything in the same "
        "order and batches, where what it is trained without counts nothing.",
    )

    @property
    def passes(self) -> int | None:
        """Epochs that decide the length, None if `steps` does."""
        return self.epochs or (3 if self.steps is None else None)
