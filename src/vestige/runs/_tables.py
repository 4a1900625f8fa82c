"""The parquet tables of a run: their schemas, and their rows made from data and scores."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from vestige.runs._dense import id_array, names_of
from vestige.runs._summary import RankedScore

if TYPE_CHECKING:
    from vestige.data import Example, TokenizedData

_IDS_AT_ONCE = 2**16
_UNFINISHED = "�"
_STRING, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_WORDING = [(name, _STRING) for name in ("text", "prompt", "completion", "messages")]
_TOKENS = [("tokens", pa.list_(_STRING)), ("targets", pa.list_(pa.bool_()))]
_RANK = [("end", _STRING), ("rank", _INT), ("example_id", _STRING), ("row", _INT), ("score", _FLOAT)]
_LABELS = [("source", _STRING), ("label", _STRING), ("length", _INT), ("duplicates", _INT)]
_FOCUS = [("instead", _STRING), ("span", pa.list_(pa.list_(_INT))), ("weights", pa.list_(_FLOAT))]
_PAIR = [("query_id", _STRING), ("example_id", _STRING)]
MEASURED = ("extraction", "loss", "counterfactual")
SCHEMAS = {
    "scores": pa.schema([("query_id", _STRING), *_RANK, ("percentile", _FLOAT)]),
    "examples": pa.schema([("example_id", _STRING), ("row", _INT), *_WORDING, *_LABELS, *_TOKENS]),
    "queries": pa.schema(
        [
            ("query_id", _STRING),
            ("row", _INT),
            *_WORDING,
            *_FOCUS,
            ("generated", pa.bool_()),
            ("loss", _FLOAT),
            *_TOKENS,
        ]
    ),
    "components": pa.schema([*_PAIR, ("component", _STRING), ("score", _FLOAT)]),
    "tokens": pa.schema([*_PAIR, ("position", _INT), ("token", _STRING), ("score", _FLOAT)]),
    "self_influence": pa.schema([("example_id", _STRING), ("row", _INT), ("score", _FLOAT)]),
    "verbatim": pa.schema(
        [
            *(("query_id", _STRING), ("span", _INT), ("start", _INT), ("text", _STRING), ("tokens", _INT)),
            *(("rarity", _FLOAT), ("occurrences", _INT), ("rows", _INT), ("example_id", _STRING), ("row", _INT)),
            *(("position", _INT), ("source", _STRING), ("before", _STRING), ("after", _STRING)),
            *((name, _FLOAT) for name in MEASURED),
        ]
    ),
}


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of some tokens."""


def token_texts(ids: Int[np.ndarray, "token"], tokenizer: Decoder | None) -> list[str]:
    """Return one string per token; joined they give the decoded text. Empty without a tokenizer.

    A character that is spread over several tokens belongs to the last of them, the others are empty strings.
    Spaces that a tokenizer drops in front of a lone word (SentencePiece) are kept.
    """
    if tokenizer is None:
        return []
    numbers = [int(number) for number in ids]
    alone = [_decode(tokenizer, [number]) for number in numbers]
    if "".join(alone) == _decode(tokenizer, numbers):
        return alone
    return _in_context(numbers, tokenizer)


def _in_context(numbers: list[int], tokenizer: Decoder) -> list[str]:
    """Return what each token adds to the text of the few tokens before it."""
    pieces: list[str] = []
    start = known = 0
    for end in range(1, len(numbers) + 1):
        before = _decode(tokenizer, numbers[start:known]) if known else ""
        now = _decode(tokenizer, numbers[start:end])
        if now.endswith(_UNFINISHED) and end < len(numbers):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, known = known, end
    return pieces


def _decode(tokenizer: Decoder, numbers: Sequence[int]) -> str:
    return str(tokenizer.decode(list(numbers), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ComponentScores(NamedTuple):
    """The score of one pair, split over the components of the run; the parts add up to the score."""

    query: int
    row: int
    scores: Float[np.ndarray, "component"]


class TokenScores(NamedTuple):
    """The score of one pair, split over the tokens of the training example; the parts add up to the score."""

    query: int
    row: int
    scores: Float[np.ndarray, "token"]
    """One per token of the example; zero where the prediction of the token does not enter the loss."""


class RunTables(NamedTuple):
    """The content of a run directory beside `run.json`."""

    train: "TokenizedData"
    queries: "TokenizedData"
    ranked: Sequence[RankedScore]
    generated: Sequence[bool]
    """Per query: True where the answer is the model's own."""
    losses: Sequence[float] | None = None
    """Per query: its loss under the model; None for methods without a model."""
    tokenizer: Decoder | None = None
    components: Sequence[ComponentScores] | None = None
    tokens: Sequence[TokenScores] | None = None
    dense: Float[np.ndarray, "query example"] | None = None
    self_scores: Float[np.ndarray, "example"] | None = None
    """Per training example: its score for itself."""
    verbatim: Sequence[dict[str, Any]] | None = None
    """Rows of the table of this name: the places of spans of answers."""


def make_tables(content: RunTables, components: Sequence[str]) -> dict[str, pa.Table]:
    """Return the tables of a run by name; of those that a run may lack, the ones whose content is there.

    `components` are the names of those that scores are split over.
    """
    rows: dict[str, Iterable[dict[str, Any]]] = {
        "scores": (_pair(content, score.query, score.row) | score._asdict() for score in content.ranked),
        "examples": _example_rows(content),
        "queries": _query_rows(content),
    }
    tables = {name: pa.Table.from_pylist(list(each), schema=SCHEMAS[name]) for name, each in rows.items()}
    return tables | make_part_tables(content, components)


def make_part_tables(content: RunTables, components: Sequence[str]) -> dict[str, pa.Table]:
    """Return the tables, by name, that may be added to a run later, as far as their content is there."""
    rows: dict[str, Iterable[dict[str, Any]]] = {}
    if content.components is not None:
        rows["components"] = (
            _pair(content, part.query, part.row) | {"component": name, "score": float(score)}
            for part in content.components
            for name, score in zip(components, part.scores, strict=True)
        )
    if content.tokens is not None:
        rows["tokens"] = _token_rows(content, content.tokens)
    if content.verbatim is not None:
        rows["verbatim"] = content.verbatim
    tables = {name: pa.Table.from_pylist(list(each), schema=SCHEMAS[name]) for name, each in rows.items()}
    if content.self_scores is not None:
        tables["self_influence"] = _self_influence_table(content.self_scores, names_of(content.train.examples))
    return tables


def _pair(content: RunTables, query: int, row: int) -> dict[str, Any]:
    return {"query_id": content.queries.examples[query].id, "example_id": content.train.examples[row].id}


def _example_rows(content: RunTables) -> Iterator[dict[str, Any]]:
    """Yield the training examples that are listed, with how often each text occurs in the data."""
    train, wanted = content.train, sorted({score.row for score in content.ranked})
    listed = {_content(train, row) for row in wanted}
    texts = Counter(words for row in range(len(train)) if (words := _content(train, row)) in listed)
    for row in wanted:
        example = train.examples[row]
        yield {
            "example_id": example.id,
            "row": row,
            **_wording(example),
            "source": example.source,
            "label": example.label,
            "length": len(train.input_ids[row]),
            "duplicates": texts[_content(train, row)],
            **_tokens(train, row, content.tokenizer),
        }


def _query_rows(content: RunTables) -> Iterator[dict[str, Any]]:
    """Yield the queries, and which answers are the model's own."""
    for row, example in enumerate(content.queries.examples):
        yield {
            "query_id": example.id,
            "row": row,
            **_wording(example),
            **({} if example.focus is None else example.focus.columns),
            "generated": bool(content.generated[row]),
            "loss": None if content.losses is None else float(content.losses[row]),
            **_tokens(content.queries, row, content.tokenizer),
        }


def _token_rows(content: RunTables, pairs: Sequence[TokenScores]) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair and target token; the other tokens of an example score zero."""
    texts: dict[int, list[str]] = {}
    for pair in pairs:
        if pair.row not in texts:
            texts[pair.row] = token_texts(content.train.input_ids[pair.row], content.tokenizer)
        for position in np.flatnonzero(content.train.targets[pair.row]).tolist():
            yield _pair(content, pair.query, pair.row) | {
                "position": position,
                "token": texts[pair.row][position] if texts[pair.row] else "",
                "score": float(pair.scores[position]),
            }


def _self_influence_table(scores: Float[np.ndarray, "example"], ids: Iterable[str]) -> pa.Table:
    """Return each example with its score for itself, highest first, ties by row; none for NaN, which was left out."""
    values = scores.astype(np.float64)
    # NaN is last in any order of numbers.
    order = np.argsort(-values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    # Large strings until they are cut again: all ids together may exceed what Arrow's plain strings hold.
    names = id_array(ids).cast(pa.large_string()).combine_chunks()
    parts = (order[start : start + _IDS_AT_ONCE] for start in range(0, len(order), _IDS_AT_ONCE))
    column = pa.chunked_array([names.take(pa.array(part)).cast(pa.string()) for part in parts], pa.string())
    return pa.table([column, order, values[order]], schema=SCHEMAS["self_influence"])


def _wording(example: "Example") -> dict[str, Any]:
    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    return {
        "text": example.text,
        "prompt": example.prompt,
        "completion": example.completion,
        "messages": json.dumps(turns, ensure_ascii=False) if turns else None,
    }


def _content(data: "TokenizedData", row: int) -> tuple[Any, ...]:
    """Return what makes two examples copies: their words, or their tokens where they were given as tokens alone."""
    example = data.examples[row]
    tokens = b"" if example.display else data.input_ids[row].tobytes()
    return example.text, example.prompt, example.completion, example.messages, tokens


def _tokens(data: "TokenizedData", row: int, tokenizer: Decoder | None) -> dict[str, Any]:
    return {
        "tokens": token_texts(data.input_ids[row], tokenizer),
        "targets": [bool(target) for target in data.targets[row]],
    }
