"""The command line: one module per command, which calls the command's Python function and prints its result."""

from vestige.cli._app import build_app as build_app, main as main
from vestige.cli._command import as_function as as_function
from vestige.cli._status import describe as describe
