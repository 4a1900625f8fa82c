"""Data made from data: split, as tokens, and the folders in which made rows are written."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.prepare._prepare import split as split, tokenize as tokenize
    from vestige.prepare._results import (
        Prepared as Prepared,
        check_same_result as check_same_result,
        claim_result as claim_result,
        fingerprint_of as fingerprint_of,
        read_rows as read_rows,
        row_of as row_of,
        write_prepared as write_prepared,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
