"""The rows that are most like a given one, by gradient and by words: what states the same thing again."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self, final

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Group
from rich.table import Table

from vestige.data import Example, LexicalIndex, load_examples, rows_named, words_of
from vestige.errors import SpecError
from vestige.indexes import Index
from vestige.runs import Scores
from vestige.terminal import as_text, shorten

_WIDTH = 90


class Sibling(NamedTuple):
    """A row that is like another one."""

    example_id: str
    row: int
    source: str | None
    cosine: float | None
    """Of its compressed gradient with the other one's; None without an index."""
    words: float
    """Share of the BM25 score that the other row has with itself."""
    text: str


@final
class Siblings(tuple[Sibling, ...]):
    """The rows most like one, those with the largest sum of cosine and share of words first; both are at most 1."""

    example: Example
    notes: tuple[str, ...]

    def __new__(cls, example: Example, rows: Sequence[Sibling], notes: Sequence[str]) -> Self:
        found = super().__new__(cls, rows)
        found.example, found.notes = example, tuple(notes)
        return found

    def __str__(self) -> str:
        return as_text(self, 120)

    __repr__ = __str__

    def __rich__(self) -> Group:
        title = f"Most like {shorten(self.example.id)}: {shorten(flat_text(self.example), _WIDTH)}"
        table = Table(title=title, title_justify="left")
        for name in ("row", "gradient", "words", "source", "text"):
            table.add_column(name, justify="right" if name in ("gradient", "words") else "left")
        for one in self:
            table.add_row(shorten(one.example_id), *_numbers(one), shorten(one.source or ""), shorten(one.text, _WIDTH))
        return Group(table, *self.notes)

    def _repr_html_(self) -> str:
        body = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in (one.example_id, *_numbers(one), one.source or ""))
            + f'<td style="text-align:left">{html.escape(one.text)}</td></tr>'
            for one in self
        )
        head = "".join(f"<th>{name}</th>" for name in ("row", "gradient", "words", "source", "text"))
        caption = html.escape(f"Most like {self.example.id}. {' '.join(self.notes)}")
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def flat_text(example: Example) -> str:
    """Return the passages of an example on one line."""
    return " | ".join(" ".join(passage.split()) for passage in example.passages)


def find_siblings(scores: Scores, name: str, count: int, run: Path) -> Siblings:
    """Return the `count` rows most like the one of this name, of the data of the run that was typed as `run`."""
    index = _open_index(scores)
    examples = list(index.examples()) if index is not None else _read_data(scores)
    ids = [example.id for example in examples]
    row = rows_named([name], ids, place="--more-like")[name]
    words = _compare_words(row, examples)
    cosines, notes = None if index is None else _compare_gradients(index, row), []
    alike = words if cosines is None else words + cosines
    if cosines is None:
        notes.append("The run has no index, so gradients are not compared. Ask with --index, made by `vestige index`.")
    order = [place for place in np.argsort(-alike, kind="stable").tolist() if place != row][:count]
    found = [
        Sibling(
            ids[place],
            place,
            examples[place].source,
            None if cosines is None else float(cosines[place]),
            float(words[place]),
            flat_text(examples[place]),
        )
        for place in order
    ]
    notes.append(f"To remove rows with it: vestige fix {run} --drop {name} --drop ID")
    return Siblings(examples[row], found, notes)


def _compare_words(row: int, examples: Sequence[Example]) -> Float[np.ndarray, "example"]:
    """Return the BM25 score of each example with the row's text, as a share of the row's own."""
    texts = (words_of(flat_text(example)) for example in examples)
    found = LexicalIndex([words_of(flat_text(examples[row]))], texts).scores()[:, 0].astype(np.float64)
    return found / found[row] if found[row] > 0 else found


def _open_index(scores: Scores) -> Index | None:
    folder = scores.run.config.get("index")
    return Index.open(folder) if isinstance(folder, str) and not folder.startswith("<") else None


def _read_data(scores: Scores) -> list[Example]:
    data = scores.run.config.get("data")
    if data is None or str(data).startswith("<"):
        raise SpecError(f"{scores.folder} was made from data in a Python program, which cannot be read again.")
    config = scores.run.config
    return load_examples(data, limit=config.get("limit"), where=config.get("where"))


def _compare_gradients(index: Index, row: int) -> Float[np.ndarray, "example"]:
    """Return the cosine of each example's stored gradient with the row's; 0 for one without a gradient."""
    unit = torch.nn.functional.normalize(index.gradients_of([row])[0], dim=0)
    cosines = np.zeros(index.rows)
    for block in index.blocks():
        cosines[block.example.numpy()] = (torch.nn.functional.normalize(block.gradients, dim=1) @ unit).numpy()
    return cosines


def _numbers(one: Sibling) -> tuple[str, str]:
    return "" if one.cosine is None else f"{one.cosine:+.2f}", f"{one.words:.2f}"
