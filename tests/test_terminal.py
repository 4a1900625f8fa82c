import io
import unicodedata

import pytest
from rich.table import Table
from rich.text import Text

from vestige.terminal import as_text, printable, say, shorten

HOSTILE = [chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))] + list(
    "\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff\ud800\U000e0041"
)


@pytest.mark.parametrize("letter", HOSTILE, ids=lambda letter: f"{ord(letter):x}")
def test_nothing_that_a_terminal_obeys_is_left(letter):
    shown = printable(f"a{letter}b")
    assert shown == f"a{letter.encode('unicode_escape').decode()}b"
    assert shown.isascii()


@pytest.mark.parametrize("text", ["plain\n\ttext", "Grüße, 你好, 🙂", "👩\u200d💻", "می\u200cخواهم", "a\u00a0b"])
def test_other_texts_stay(text):
    assert printable(text) == text


def test_a_joiner_between_plain_letters_is_shown():
    assert printable("ad\u200dmin") == "ad\\u200dmin"


def test_every_character_is_printed_or_shown():
    for code in range(0x3100):
        shown = printable(chr(code))
        assert shown == chr(code) or shown.startswith("\\")
        assert shown in "\n\t" or unicodedata.category(shown[0]) not in ("Cc", "Cf", "Zl", "Zp")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("short", "short"), ("two\n lines", "two lines"), ("x" * 100_000, "x" * 9 + "…"), ("\x1b[2J", "\\x1b[2J")],
)
def test_shortened_text_is_one_line_and_safe(text, shown):
    assert shorten(text, 10) == shown


def test_tables_are_safe_and_take_no_markup():
    table = Table()
    table.add_column("id")
    table.add_row("[/b] \x1b[31m\u202e")
    assert "[/b] \\x1b[31m\\u202e" in as_text(table, 80)
    assert as_text(Text("plain"), 80) == "plain"


def test_a_reader_that_is_gone_does_not_end_the_work():
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    say("text", file=Gone())
