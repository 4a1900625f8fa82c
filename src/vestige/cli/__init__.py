"""The command line: one module per verb, which parses, calls the verb's Python function and prints."""

from vestige.cli._app import VERBS as VERBS
from vestige.cli._app import main as main
