"""The command line: commands that call their Python function and print its result, and the parser made from them."""

from typing import TYPE_CHECKING

from vestige.lazy import lazy_names

if TYPE_CHECKING:
    from vestige.cli._app import main as main
    from vestige.cli._commands import summarise_audit as summarise_audit
    from vestige.cli._help import (
        GROUPS as GROUPS,
        default_of as default_of,
        group_of as group_of,
        help_of as help_of,
        value_of as value_of,
    )
    from vestige.cli._parser import as_function as as_function, build_app as build_app
    from vestige.cli._results import list_formats as list_formats

__getattr__, __dir__, __all__ = lazy_names(__name__)
