"""The settings of every verb, defined once for the Python functions, the command line and the config files.

A field is the argument of the Python function, the key in `--config run.yaml` and, with dashes, the flag of
the command; its description is the help text.
"""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from vestige.errors import SpecError
from vestige.settings._base import Settings, parse_bytes

Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
StoredType = Literal["float16", "bfloat16", "float32", "int8"]
Reduction = Literal["sum", "mean"]
AnswerSource = Literal["auto", "generate", "given"]


_SHARD = re.compile(r"(\d+)/(\d+)")


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]


class ReadingSettings(Settings):
    """How text becomes tokens, and where and how the model runs."""

    loss: Reduction = Field("sum", description="An example's loss: sum or mean over its target tokens.")
    max_length: PositiveInt | None = Field(
        None, description="Cut examples after this many tokens. Not given: the model's context."
    )
    chat: bool = Field(
        False, description="Put prompt and completion into the model's chat template, as user and assistant."
    )
    limit: PositiveInt | None = Field(None, description="Use only so many examples, the first ones, of the data.")
    token_budget: PositiveInt | None = Field(
        None, description="Most tokens in a batch, padding included; changes speed and memory, never scores."
    )
    precision: Precision = Field("auto", description="Number format in which the model runs.")
    device: str = Field("auto", description="Where the model runs: auto, cpu, cuda, cuda:1 or mps.")
    tokenizer: Any = Field(None, description="Hub id or folder of the tokenizer, when it is not beside the model.")


class CompressionSettings(Settings):
    """What is attributed to, and how it is compressed."""

    components: Patterns = Field(
        ("default",),
        description="Parameters to attribute to: attention, mlp, embedding, norm, lora, all, 'layers 0-3', "
        "or globs over parameter names.",
    )
    compress: str = Field(
        "tensorsketch:256",
        description="How to compress gradients, such as tensorsketch:256, 'mask:32x32 | sjlt:256', none, or auto.",
    )
    disk: str | None = Field(None, description="Disk budget for --compress auto, such as 20GB.")
    dtype: StoredType = Field("float16", description="Number format of the compressed gradients on disk.")
    seed: int = Field(0, description="Seed of every random choice.")

    @field_validator("disk")
    @classmethod
    def _disk_is_a_size(cls, disk: str | None) -> str | None:
        if disk is not None:
            parse_bytes(disk)
        return disk

    @property
    def disk_bytes(self) -> int | None:
        """The disk budget in bytes."""
        return None if self.disk is None else parse_bytes(self.disk)


class IndexSettings(ReadingSettings, CompressionSettings):
    """What `vestige index` takes."""

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Path = Field(description="Folder of the index; an interrupted run continues in it.")
    shard: str | None = Field(None, description="Compute only part i of n of the shards, written i/n, from 1/n to n/n.")
    append: bool = Field(False, description="Add the rows that the data gained since; old shards stay untouched.")
    overwrite: bool = Field(False, description="Delete an index that is already there instead of continuing it.")

    @field_validator("shard")
    @classmethod
    def _shard_is_a_part(cls, shard: str | None) -> str | None:
        match = None if shard is None else _SHARD.fullmatch(shard)
        if shard is not None and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise ValueError("i/n with i from 1 to n, such as 1/4")
        return shard

    @property
    def part(self) -> tuple[int, int] | None:
        """`shard` as (zero-based part, number of parts)."""
        if self.shard is None:
            return None
        number, parts = self.shard.split("/")
        return int(number) - 1, int(parts)


class AttributeSettings(ReadingSettings):
    """What `vestige attribute` takes."""

    repeatable: ClassVar[tuple[str, ...]] = ("queries",)
    index: Any = Field(None, description="Folder of an index made by `vestige index`.")
    model: Any = Field(None, description="Without an index: the model, as for `vestige index`.")
    data: Any = Field(None, description="Without an index: the training data, streamed once and not stored.")
    queries: Any = Field(description="What to explain: a file with prompts or answers, or the questions themselves.")
    method: str = Field(
        "influence",
        description="How to score: influence, grad-dot, grad-cos, ekfac, kfac, datainf, cg, lissa, arnoldi, rep-sim, "
        "activation-dot, bm25 or random.",
    )
    out: Path = Field(description="Folder of the run: scores, examples and what they mean.")
    k: PositiveInt = Field(20, description="Proponents, and as many opponents, to keep for each query.")
    tokens: bool = Field(False, description="Also score every training token; they sum to the example's score.")
    components: Patterns = Field(
        ("default",), description="Without an index: parameters to attribute to, as for `vestige index`."
    )
    damping: PositiveFloat = Field(
        1.0, description="Damping of the curvature, relative to its mean eigenvalue, for methods that have one."
    )
    self_influence: bool = Field(False, description="Also score every training example against itself.")
    dense: bool = Field(False, description="Also store the score of every training example for every query.")
    answer: AnswerSource = Field(
        "auto",
        description="Explain the answer given with the query, or generate it; auto generates missing ones.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Longest answer to generate.")
    layer: int | None = Field(None, description="rep-sim: number of the hidden state to compare. Not given: last.")
    trust: bool = Field(True, description="Run the free checks that say how far the scores can be trusted.")
    seed: int = Field(0, description="Seed of every random choice.")
    overwrite: bool = Field(False, description="Replace a run that is already in the folder.")

    @model_validator(mode="after")
    def _index_or_data(self) -> Self:
        if self.index is None:
            # Whether a model is needed depends on the method: lexical ones read text alone.
            if self.data is None:
                raise SpecError(
                    "Neither `index` nor `data` was given. Type --index FOLDER (made by `vestige index`), or "
                    "--model MODEL --data FILE to score without an index."
                )
        elif self.data is not None:
            raise SpecError("`index` and `data` were both given, but an index holds its data. Drop one of them.")
        elif self.components != ("default",):
            raise SpecError("`components` are fixed by the index. Drop --components, or make another index with it.")
        return self


class DoctorSettings(ReadingSettings, CompressionSettings):
    """What `vestige doctor` takes."""

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The training data: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")


class ReportSettings(Settings):
    """What `vestige report` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(description="Folder of a run made by `vestige attribute`.")
    out: Path | None = Field(None, description="The HTML file to write. Not given: report.html in the run.")


class ViewSettings(Settings):
    """What `vestige view` takes."""

    positional: ClassVar[tuple[str, ...]] = ("run",)
    run: Path = Field(description="Folder of a run made by `vestige attribute`.")
    port: int = Field(0, ge=0, le=65535, description="Port on this computer; 0 takes a free one.")


class StatusSettings(Settings):
    """What `vestige status` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index or of a run.")


class ExportSettings(Settings):
    """What `vestige export` takes."""

    positional: ClassVar[tuple[str, ...]] = ("path",)
    path: Path = Field(description="Folder of an index.")
    out: Path = Field(description="Folder to write into, new or empty.")
    to: Literal["numpy", "arrow", "parquet"] = Field("numpy", description="Format to export to.")
