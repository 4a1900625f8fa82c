"""`vestige fix`: from rows that a run found to a model trained without them, and what that changes.

It trains, asks and writes a page, so it stands above `training`, `methods` and `reports`; `selection` is below them.
"""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.fixes._fix import fix as fix
    from vestige.fixes._page import EXAMPLE as EXAMPLE, demo as demo, describe_demo as describe_demo
    from vestige.fixes._record import (
        ARMS as ARMS,
        Answers as Answers,
        Fix as Fix,
        Outcome as Outcome,
        describe_fix as describe_fix,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__)
