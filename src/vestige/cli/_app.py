"""The command `vestige`: the registered commands, and what becomes of errors."""

import atexit
import contextlib
import errno
import gc
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import NoReturn

from vestige.cli._help import EVERYTHING, HELP, VERSION, find_help, is_group
from vestige.distributed import ROLE_VARIABLE
from vestige.errors import UserError, WorkElsewhere
from vestige.terminal import say

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors for which the disk, not the command, has to change."""
_PANIC = "PanicException"
"""The class, private and no `Exception`, of an error in a library in Rust that its authors had not thought of."""

BUG, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141
"""Exit statuses; the last is what a shell shows for a program that wrote into a pipe whose reader was gone."""
_OBJECTS = 50_000
"""New objects after which Python looks for garbage; by default 700 (Python 3.11)."""
_SHOWN = 300
"""Most characters of a message of a library."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a user's mistake is printed in words, on stderr, with exit status 2.

    Args:
        arguments: The words after `vestige`; those of the process if None.

    Raises:
        SystemExit: 2 after a user's mistake, 130 after Ctrl-C, 141 when the output has no reader, 1 after a bug.
    """
    if arguments is None:
        _collect_less()
    words = sys.argv[1:] if arguments is None else list(arguments)
    with _usable_streams():
        try:
            _answer(words)
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


def _collect_less() -> None:
    """Let Python look for garbage rarely in this process, and not at its end.

    The libraries make a million objects that stay: to look through them while they are imported takes a second, and
    before the process ends another one.
    """
    gc.set_threshold(_OBJECTS)
    atexit.register(gc.freeze)


def _answer(words: Sequence[str]) -> None:
    """Print help or the version, or run a command."""
    typed = words[: words.index("--")] if "--" in words else words
    asked = {*HELP, EVERYTHING} & set(typed)
    if VERSION in typed:
        say(version("vestige"))
    elif asked or not words or is_group(words):
        say(find_help([word for word in typed if word not in asked], everything=EVERYTHING in asked))
    else:
        # Help, which does without it, does not wait for the parser.
        from vestige.cli._parser import run_words

        run_words(words)


@contextlib.contextmanager
def _usable_streams() -> Iterator[None]:
    """Make every character printable, also on a terminal that has few; a stream that was closed swallows everything."""
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
    """Print the rest now, not when the interpreter ends, which would show a traceback."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(BROKEN_PIPE)
        if error.__context__ is None:  # else the command has just printed it
            _fail(f"What was to be printed could not be written ({error.strerror}).")


def _system_error(error: OSError) -> str:
    reason = error.strerror or error
    if error.errno in _OF_THE_DISK:
        path = f" ({error.filename})" if error.filename else ""
        return f"The disk is full or does not let us: {reason}{path}. Free disk space, or choose another place."
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{reason}. Check the path, or choose another one."


def _bug(error: Exception) -> str:
    """Return the message of an unexpected error; the traceback goes to a file, or into the log of a worker."""
    trace = "".join(traceback.format_exception(error))
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
    message = f"unexpected {reason[:500]}\nThis is a bug in Vestige: what you typed or gave should have been answered. "
    if ROLE_VARIABLE not in os.environ:
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="vestige-", suffix=".txt")
            with open(file, "w", encoding="utf-8", errors="backslashreplace") as stream:
                stream.write(trace)
            return f"{message}Please report it with {path}."
    return f"{message}\n{trace}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _fail(message: str, status: int = USAGE_ERROR) -> NoReturn:
    say(f"vestige: {message}", file=sys.stderr)
    sys.exit(status)
