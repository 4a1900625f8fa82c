"""docs/traps.md names tests that are there, and leaves no item of its list out."""

import ast
import re
from functools import cache

import pytest

from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "traps.md"


def numbers(letter: str, last: int) -> list[str]:
    return [f"{letter}{number}" for number in range(1, last + 1)]


ITEMS = {
    "GhostSuite": [*numbers("", 8), *"abcde"],
    "GraSS": numbers("", 10),
    "dattri": numbers("", 9),
    "dattri-llm": numbers("", 7),
    "Predicting memorization": numbers("", 9),
    "Replayed checks": [*numbers("G", 24), "B", *numbers("D", 7), *numbers("E", 5), *numbers("F", 3)],
}
"""Every item that is answered for, by section."""

_TEST = re.compile(r"`((?:recipes/)?tests/[\w/]+\.py)::([\w:]+)`")


def rows() -> list[tuple[str, str, str]]:
    """(section, item, where it is tested) of every row of a table on the page."""
    section, found = "", []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) == 3 and cells[0] != "Item" and not set(cells[0]) <= {"-", " "}:
            found.append((section, cells[0], cells[2]))
    return found


@cache
def names_in(path: str) -> set[str]:
    """Names of the tests in a file, those in a class after the class and two colons."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else []
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        for one in inside or [node]:
            if isinstance(one, ast.FunctionDef) and one.name.startswith("test_"):
                names.add(prefix + one.name)
    return names


NAMED = sorted({match for _, _, where in rows() for match in _TEST.findall(where)})


@pytest.mark.parametrize(("path", "name"), NAMED, ids=lambda word: word.rsplit("/")[-1])
def test_every_test_that_the_page_names_is_there(path, name):
    assert (ROOT / path).is_file(), f"{PAGE.name} names {path}, which is not there"
    assert name in names_in(path), f"{PAGE.name} names {path}::{name}, which is not there"


def test_every_item_is_answered_for():
    assert {section: [item for here, item, _ in rows() if here == section] for section in ITEMS} == ITEMS
    assert {section for section, _, _ in rows()} == set(ITEMS)


def test_every_row_names_a_test_or_says_why_there_is_none():
    for section, item, where in rows():
        assert _TEST.search(where) or where.startswith("None: "), f"{section} {item}: {where}"
        assert not re.search(r"`[^`]*::", _TEST.sub("", where)), f"{section} {item}: a name that is not understood"


def test_a_name_that_is_not_there_would_be_noticed():
    assert "test_a_name_that_is_not_there_would_be_noticed" in names_in("tests/docs/test_errors_of_earlier_tools.py")
    assert "TestFile::test_another_file_is_refused" in names_in("tests/compress/test_selective.py")
    assert "test_that_nobody_wrote" not in names_in("tests/compress/test_selective.py")
