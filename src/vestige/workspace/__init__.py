"""All results below a folder: the kinds there are, what one of them is, and the server that shows them in a browser."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.workspace._app import make_app as make_app, view as view
    from vestige.workspace._ask import answer_questions as answer_questions
    from vestige.workspace._folder import Workspace as Workspace
    from vestige.workspace._kinds import (
        KINDS as KINDS,
        Kind as Kind,
        Summary as Summary,
        describe as describe,
        find_jobs as find_jobs,
    )
    from vestige.workspace._results import describe_index as describe_index

__getattr__, __dir__, __all__ = lazy_names(__name__)
