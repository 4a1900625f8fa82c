"""Everything Vestige raises on purpose.

VestigeError
├── UserError            the caller can fix it; the command line prints the message alone and exits with 2
│   ├── DataError        a source, a row or a column is not what was announced
│   ├── ModelError       a model cannot be found, loaded or differentiated
│   ├── SpecError        a compression spec, a component pattern or a setting does not parse
│   ├── IndexMismatch    an index or a run on disk was made with other settings
│   ├── DiskSpaceError   the result would not fit where it is to be written
│   ├── CorruptFile      a file on disk is torn, altered or not what its name means
│   ├── NonFinite        a loss or a gradient is NaN or infinite
│   ├── MissingExtra     an optional dependency is not installed
│   └── PieceFailed      pieces of a job failed every time they were tried, while the others went on
└── WorkElsewhere        no error: this process did its part, and others have the rest of the job

A message states what was given, what was expected, and what to type next.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


def memory_error(error: BaseException) -> "UserError | None":
    """Return the error to show where one of PyTorch, or its cause, says that the memory of a GPU is full."""
    seen: BaseException | None = error
    while seen is not None and type(seen).__name__ != "OutOfMemoryError":
        seen = seen.__cause__ or seen.__context__
    if seen is None:
        return None
    return UserError(
        "The memory of the GPU is full. Type a smaller --token-budget, such as --token-budget 1024, or fewer "
        f"--components. `vestige doctor` prints what fits. PyTorch reports: {str(seen).splitlines()[0]}"
    )


class VestigeError(Exception):
    """Base of every error that Vestige raises on purpose."""


class UserError(VestigeError):
    """An error that the caller can fix: shown without a traceback, exit status 2."""


class DataError(UserError):
    """A data source, a row or a column is not what was announced."""


class ModelError(UserError):
    """A model cannot be found, loaded or differentiated."""


class SpecError(UserError):
    """A compression spec, a component pattern or a setting does not parse."""


class IndexMismatch(UserError):
    """An index or a run on disk was made with other settings; nothing was changed."""


class DiskSpaceError(UserError):
    """The result would not fit on the disk that it is to be written to."""


class MissingExtra(UserError):
    """An optional dependency is needed; the message holds the pip command."""


class CorruptFile(UserError):
    """A file on disk is torn, altered, or not what its name means; the message holds the way to get it back."""


class NonFinite(UserError):
    """A loss or a gradient is NaN or infinite; the message names the example."""

    @classmethod
    def of_examples(cls, what: str, names: Sequence[str]) -> "NonFinite":
        """Return the error for a number (`what`) of the examples of these names, with what can be done about it."""
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        return cls(
            f"The {what} of {len(names)} example{'s' * (len(names) > 1)} is NaN or infinite: {shown}. "
            "Check these texts, try --precision float32, leave them out of the data, or type --skip-bad."
        )


class PieceFailed(UserError):
    """Pieces of a job failed every time they were tried; the message shows the reason and the path of the log."""


class WorkElsewhere(VestigeError):
    """This process did its part; other processes finish the job. The exit status is 0."""


class Difference(NamedTuple):
    """One setting that differs between two results, both sides as shown to a person."""

    field: str
    old: str
    new: str


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], old_names: Mapping[str, str], new_names: Mapping[str, str]
) -> list[Difference]:
    """Return the settings in which two identities in JSON terms differ, in their order.

    `old_names` and `new_names` are what inputs were called whose identity is a fingerprint.
    """
    fields = [*old, *(name for name in new if name not in old)]
    return [
        Difference(name.replace("_", "-"), _show_value(name, old, old_names), _show_value(name, new, new_names))
        for name in fields
        if old.get(name) != new.get(name)
    ]


def mismatch_message(what: str, found: Sequence[Difference]) -> str:
    """Return the refusal of a result, `what`, that differs from what was requested: a table, then what to do."""
    table = [Difference("setting", "on disk", "requested"), *found]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    return "\n".join(
        [
            f"{what} was made with other settings; nothing was changed.",
            *(f"  {row.field:{widths[0]}}  {row.old:{widths[1]}}  {row.new}" for row in table),
            "Give another --out to keep both, or --overwrite to replace it.",
        ]
    )


def _show_value(name: str, identity: Mapping[str, Any], names: Mapping[str, str]) -> str:
    value = identity.get(name)
    if name in names:
        return f"{names[name]} ({str(value)[:8]})"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
