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

from collections.abc import Sequence


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
