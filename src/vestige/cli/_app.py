"""The command `vestige`: which verbs there are, and what becomes of errors."""

import errno
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import version
from keyword import iskeyword

from cyclopts import App, CycloptsError, UnknownCommandError, UnusedCliTokensError

from vestige.errors import UserError, WorkElsewhere
from vestige.settings import EVALUATIONS, PREPARATIONS

VERBS = {
    "doctor": "Say whether it will work, what it covers, and what it will cost.",
    "train": "Train a model, and keep what attribution and audit need.",
    "index": "Store the compressed gradient of every training example.",
    "precondition": "Measure the curvature of an index, and precondition its gradients.",
    "bank": "Train many models on parts of the data: the truth that scores are judged by.",
    "attribute": "Rank the training examples behind an answer.",
    "audit": "Say for every example how well a model knows it by heart, with evidence and intervals.",
    "untrac": "Rank training sources or examples by unlearning.",
    "select": "Choose which examples to train on.",
    "evaluate": "Measure how far scores, and what they are computed from, can be trusted.",
    "study": "Replay a published experiment.",
    "data": "Make data: paraphrases, answers, multiple-choice prompts, splits, tokens, and rows that are cleaned.",
    "sweep": "Run a verb over a grid of settings.",
    "report": "Write a run as one HTML file that opens offline.",
    "view": "Serve the report of a run to the browser on this computer, until Ctrl-C.",
    "status": "Say how far an index or a run is, and what is in it.",
    "cancel": "End the work on an index or a run; what is finished stays.",
    "export": "Copy an index or a run into formats that other programs read.",
    "import": "Turn gradients or scores that other software has published into an index or a run.",
}
"""Every verb and what it does. Each lives in a module of its name, imported when it is asked for."""

GROUPS = {"evaluate": ("evaluation", EVALUATIONS), "data": ("kind of data", PREPARATIONS)}
"""The verbs that another word must follow, what that word is called, and which there are."""

_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""What an operating system says when it is the disk, not we, that has to change."""

USAGE_ERROR = 2
INTERRUPTED = 130


def function_of(verb: str) -> str:
    """The name of a verb's function: the verb, with an underscore where Python has taken the word."""
    return f"{verb}_" if iskeyword(verb) else verb


def build_app() -> App:
    """The command-line application, none of whose verbs is imported yet."""
    app = App(
        name="vestige",
        help="Which training examples made a language model behave as it does.",
        version=lambda: version("vestige"),
        suppress_keyboard_interrupt=False,
        result_action="return_value",
        help_format="plaintext",
    )
    for verb, outcome in VERBS.items():
        app.command(
            f"vestige.cli._{verb}:{function_of(verb)}", name=verb, help=outcome, sort_key=list(VERBS).index(verb)
        )
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is told in words, on stderr, with exit status 2.

    Args:
        arguments: The words after `vestige`; those of the process if None.

    Raises:
        SystemExit: 2 after a user's mistake, 130 after Ctrl-C. Anything else is a bug, whose traceback stays.
    """
    try:
        build_app()(arguments, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(_parse_error(error))
    except UserError as error:
        _fail(str(error))
    except WorkElsewhere as note:
        print(note)
    except OSError as error:
        if error.errno not in _OUTSIDE:
            raise
        place = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{place}"
        _fail(f"The disk is full or does not let us: {reason}. Make room, or choose another place.")
    except KeyboardInterrupt:
        print("vestige: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _parse_error(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        message = f"Not understood: {' '.join(error.unused_tokens or ())}. A value needs its flag before it."
    elif isinstance(error, UnknownCommandError):
        # The parser's own message would import every verb, and torch with it.
        what, known = GROUPS[error.command_chain[0]] if error.command_chain else ("verb", VERBS)
        word = (error.unused_tokens or [""])[0]
        close = get_close_matches(word, list(known), n=1)
        message = f"There is no {what} {word!r}. " + (
            f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}."
        )
    else:
        error.verbose = False
        message = str(error)
    help_command = " ".join(["vestige", *(error.command_chain or ()), "--help"])
    return f"{message}\nType `{help_command}` for what is possible."


def _fail(message: str) -> None:
    print(f"vestige: {message}", file=sys.stderr)
    sys.exit(USAGE_ERROR)
