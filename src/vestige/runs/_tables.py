"""The parquet tables of a run: their schemas, and their rows made from data and scores."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vestige.runs._token_text import Decoder, token_texts
from vestige.runs._topk import RankedScore

if TYPE_CHECKING:
    from vestige.data import Example, TokenizedData


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


_WORDING = [
    ("text", pa.string()),
    ("prompt", pa.string()),
    ("completion", pa.string()),
    ("messages", pa.string()),
]
_TOKENS = [("tokens", pa.list_(pa.string())), ("targets", pa.list_(pa.bool_()))]

SCORES = pa.schema(
    [
        ("query_id", pa.string()),
        ("end", pa.string()),
        ("rank", pa.int64()),
        ("example_id", pa.string()),
        ("row", pa.int64()),
        ("score", pa.float64()),
        ("percentile", pa.float64()),
    ]
)
EXAMPLES = pa.schema(
    [
        ("example_id", pa.string()),
        ("row", pa.int64()),
        *_WORDING,
        ("source", pa.string()),
        ("label", pa.string()),
        ("length", pa.int64()),
        ("duplicates", pa.int64()),
        *_TOKENS,
    ]
)
QUERIES = pa.schema(
    [
        ("query_id", pa.string()),
        ("row", pa.int64()),
        *_WORDING,
        ("generated", pa.bool_()),
        ("loss", pa.float64()),
        *_TOKENS,
    ]
)
COMPONENTS = pa.schema(
    [
        ("query_id", pa.string()),
        ("example_id", pa.string()),
        ("component", pa.string()),
        ("score", pa.float64()),
    ]
)
TOKENS = pa.schema(
    [
        ("query_id", pa.string()),
        ("example_id", pa.string()),
        ("position", pa.int64()),
        ("token", pa.string()),
        ("score", pa.float64()),
    ]
)


def scores_table(ranked: Iterable[RankedScore], train: "TokenizedData", queries: "TokenizedData") -> pa.Table:
    """Return `scores.parquet`: both ends of every query's ranking."""
    rows = [
        {
            "query_id": queries.examples[score.query].id,
            "example_id": train.examples[score.row].id,
            **{name: getattr(score, name) for name in ("end", "rank", "row", "score", "percentile")},
        }
        for score in ranked
    ]
    return pa.Table.from_pylist(rows, schema=SCORES)


def examples_table(rows: Iterable[int], train: "TokenizedData", tokenizer: Decoder | None) -> pa.Table:
    """Return `examples.parquet`: the training examples in `rows`, with how often each text occurs in the data."""
    wanted = sorted(set(rows))
    listed = {_content(train, row) for row in wanted}
    texts = Counter(content for row in range(len(train)) if (content := _content(train, row)) in listed)
    return pa.Table.from_pylist(
        [
            {
                "example_id": train.examples[row].id,
                "row": row,
                **_wording(train.examples[row]),
                "source": train.examples[row].source,
                "label": train.examples[row].label,
                "length": len(train.input_ids[row]),
                "duplicates": texts[_content(train, row)],
                **_tokens(train, row, tokenizer),
            }
            for row in wanted
        ],
        schema=EXAMPLES,
    )


def queries_table(
    queries: "TokenizedData",
    tokenizer: Decoder | None,
    generated: Sequence[bool],
    losses: Sequence[float] | None,
) -> pa.Table:
    """Return `queries.parquet`: the queries, and which answers are the model's own."""
    return pa.Table.from_pylist(
        [
            {
                "query_id": example.id,
                "row": row,
                **_wording(example),
                "generated": bool(generated[row]),
                "loss": None if losses is None else float(losses[row]),
                **_tokens(queries, row, tokenizer),
            }
            for row, example in enumerate(queries.examples)
        ],
        schema=QUERIES,
    )


def components_table(
    pairs: Iterable[ComponentScores], names: Sequence[str], train: "TokenizedData", queries: "TokenizedData"
) -> pa.Table:
    """Return `components.parquet`: one row per pair and component."""
    rows = [
        {
            "query_id": queries.examples[pair.query].id,
            "example_id": train.examples[pair.row].id,
            "component": name,
            "score": float(score),
        }
        for pair in pairs
        for name, score in zip(names, pair.scores, strict=True)
    ]
    return pa.Table.from_pylist(rows, schema=COMPONENTS)


def tokens_table(
    pairs: Iterable[TokenScores], train: "TokenizedData", queries: "TokenizedData", tokenizer: Decoder | None
) -> pa.Table:
    """Return `tokens.parquet`: one row per pair and target token; the other tokens of an example score zero."""
    texts: dict[int, list[str]] = {}
    rows = []
    for pair in pairs:
        if pair.row not in texts:
            texts[pair.row] = token_texts(train.input_ids[pair.row], tokenizer)
        for position in np.flatnonzero(train.targets[pair.row]):
            rows.append(
                {
                    "query_id": queries.examples[pair.query].id,
                    "example_id": train.examples[pair.row].id,
                    "position": int(position),
                    "token": texts[pair.row][position] if texts[pair.row] else "",
                    "score": float(pair.scores[position]),
                }
            )
    return pa.Table.from_pylist(rows, schema=TOKENS)


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
