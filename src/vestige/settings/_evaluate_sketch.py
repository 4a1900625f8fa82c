"""What `vestige evaluate sketch` takes."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from vestige.settings._base import parse_bytes
from vestige.settings._shared import Patterns, ReadingSettings

_REFERENCE = re.compile(r"full|full_layers|(rank|naive_proj_layers)=[1-9][0-9]*")


def _numbers(value: Any) -> Any:
    """Split one, several, or a text with commas into whole numbers."""
    if isinstance(value, int):
        return (value,)
    words = (value,) if isinstance(value, str) else value
    return tuple(part for word in words for part in (word.split(",") if isinstance(word, str) else (word,)) if part)


Numbers = Annotated[tuple[PositiveInt, ...], BeforeValidator(_numbers)]


class SketchSettings(ReadingSettings):
    """Measure how far compressed inner products are from exact ones, by compressor and size.

    Every pair of the first examples and the remaining ones is compared, for several random sketches of each size.
    Interrupted at any moment, the same command continues; other compressors, sizes and seeds are added to what is
    there.
    """

    repeatable: ClassVar[tuple[str, ...]] = ("compress", "index")

    model: Any = Field(description="The model: hub id, local folder, GGUF folder or PEFT adapter folder.")
    data: Any = Field(description="The examples: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    out: Path = Field(description="Folder of the table, the figures and what a later call can use again.")
    compress: Patterns = Field(
        (),
        description="Compressors, with K for the size and R for its square root: 'mask:2Rx2R | sjlt:K'. "
        "Not given: the published ones.",
    )
    sizes: Numbers = Field((64, 256, 1024), description="Numbers per component, such as 64,256,1024.")
    seeds: PositiveInt = Field(3, description="Random sketches of each size; errors are averaged over them.")
    components: Patterns = Field(
        ("default",), description="Parameters whose gradients are compressed, as in `vestige index`."
    )
    reference: str = Field(
        "full_layers",
        description="What is right: full_layers (exact, selected parameters), full (exact, all parameters), rank=K "
        "(the sketch of that size) or naive_proj_layers=K (exact gradients, projected after they were formed).",
    )
    num_ref: PositiveInt = Field(50, description="The first N examples, which are compared with all others.")
    samples: PositiveInt = Field(256, description="The first N examples of the data take part.")
    index: Patterns = Field((), description="Folders of finished indexes of this model and data, measured too.")
    memory: str | None = Field(
        None, description="Most memory for exact gradients, such as 4GB. Not given: half of what is free."
    )

    @field_validator("reference")
    @classmethod
    def _reference_is_known(cls, reference: str) -> str:
        if not _REFERENCE.fullmatch(reference):
            raise ValueError("full_layers, full, rank=K or naive_proj_layers=K, K being a size such as 1024")
        return reference

    @field_validator("memory")
    @classmethod
    def _memory_is_a_size(cls, memory: str | None) -> str | None:
        if memory is not None:
            parse_bytes(memory)
        return memory

    @field_validator("sizes")
    @classmethod
    def _sizes_are_given(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes:
            raise ValueError("at least one size, such as 256")
        return tuple(sorted(set(sizes)))

    @property
    def reference_mode(self) -> str:
        """The reference without its size."""
        return self.reference.partition("=")[0]

    @property
    def reference_size(self) -> int | None:
        """The K of rank=K and naive_proj_layers=K."""
        size = self.reference.partition("=")[2]
        return int(size) if size else None

    @property
    def memory_bytes(self) -> int | None:
        """The memory for exact gradients in bytes."""
        return None if self.memory is None else parse_bytes(self.memory)
