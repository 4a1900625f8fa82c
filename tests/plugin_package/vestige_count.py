"""A command of another package: `vestige count`."""

from typing import ClassVar

from pydantic import Field, NonNegativeInt

from vestige.registry import command
from vestige.settings import Common, DataName, Settings, with_settings
from vestige.terminal import say


class CountSettings(Settings):
    """What `vestige count` takes."""

    positional: ClassVar[tuple[str, ...]] = ("data",)
    data: DataName = Field(description="The examples: JSONL, JSON, CSV, Parquet, `datasets` folder or hub id.")
    source: Common[str | None] = Field(None, description="Count only the examples of this source.")
    limit: NonNegativeInt | None = Field(None, description="Read at most this many rows.")


@with_settings(CountSettings)
def count_examples(settings: CountSettings) -> int:
    """Return the number of examples in a data source."""
    from vestige.data import load_examples  # takes longer to import than help should

    examples = load_examples(settings.data, limit=settings.limit)
    return sum(settings.source in (None, example.source) for example in examples)


@command(
    "count",
    CountSettings,
    function="vestige_count:count_examples",
    examples=("vestige count train.jsonl", "vestige count train.jsonl --source books --limit 100"),
    next_command="vestige index MODEL {data} --out idx",
)
def count(settings: CountSettings) -> None:
    """Count the examples of a data source."""
    say(f"{count.call(settings):,} examples")
