"""The command `vestige`: which verbs there are, and what becomes of errors."""

import contextlib
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import version
from keyword import iskeyword
from typing import NoReturn

from cyclopts import App, CycloptsError, UnknownCommandError, UnusedCliTokensError

from vestige.errors import UserError, WorkElsewhere
from vestige.lockstep import ROLE_VARIABLE
from vestige.settings import EVALUATIONS, PREPARATIONS
from vestige.terminal import say

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

_PANIC = "PanicException"
"""How an error of a library in Rust arrives that its authors had not thought of: as no `Exception`, and private."""

BUG = 1
USAGE_ERROR = 2
INTERRUPTED = 130
NOBODY_READS = 141
"""What a shell shows for a program that wrote into a pipe whose reader was gone."""
_SHOWN = 300
"""Most letters of what a library said."""


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
        SystemExit: 2 after a user's mistake, 130 after Ctrl-C, 141 when nobody reads what is printed, 1 after a bug.
    """
    with _usable_streams():
        try:
            build_app()(arguments, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            _fail(_parse_error(error))
        except UserError as error:
            _fail(str(error))
        except WorkElsewhere as note:
            say(note)
        except KeyboardInterrupt:
            print("vestige: interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except OSError as error:
            _flush_output()  # ends here if it was the reader of the output that has left
            _fail(_system_error(error))
        except MemoryError:
            _fail("There is not enough memory. Give less at a time: a smaller --token-budget, --batch-size or --limit.")
        except UnicodeEncodeError as error:  # texts of data are checked where they are read; what is left is a name
            _fail(f"A file or folder has a name that is no text in UTF-8: {_short(error.object)}. Rename it.")
        except Exception as error:
            _fail(_bug(error), BUG)
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            _fail(
                f"The library that reads tokenizers and weights broke off ({_short(str(error))}). A file of the model "
                "is damaged, or not what its name says: get the model's folder again, or give another --tokenizer."
            )


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """Every letter can be printed, also to a terminal of few letters; a stream that was closed swallows everything."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        _flush_output()


def _flush_output() -> None:
    """Print what is left to print now, not when the interpreter ends, which would show a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(NOBODY_READS)
        if error.__context__ is None:  # else that is what the command has just said
            _fail(f"What was to be printed could not be written ({error.strerror}).")


def _system_error(error: OSError) -> str:
    if error.errno in _OUTSIDE:
        place = f" ({error.filename})" if error.filename else ""
        reason = f"{error.strerror or error}{place}"
        return f"The disk is full or does not let us: {reason}. Make room, or choose another place."
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}. Check the path, or choose another one."


def _bug(error: Exception) -> str:
    """What a person reads of an error that nobody thought of; the traceback goes to a file, for whoever fixes it.

    What a worker prints is its log, which is where its traceback belongs.
    """
    trace = "".join(traceback.format_exception(error))
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    message = f"unexpected {reason[:500]}\nThis is a bug in Vestige: what you typed or gave should have been answered. "
    if ROLE_VARIABLE in os.environ:
        return f"{message}\n{trace}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="vestige-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write(trace)
    except OSError:
        return f"{message}\n{trace}"
    return f"{message}Please report it with {file.name}."


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


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


def _fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    say(f"vestige: {message}", file=sys.stderr)
    sys.exit(status)
