"""The command line: commands that call their Python function and print its result, and the parser made from them."""

from vestige.cli._app import as_function as as_function, build_app as build_app, main as main
from vestige.cli._commands import summarise_audit as summarise_audit
from vestige.cli._results import describe as describe, list_formats as list_formats
