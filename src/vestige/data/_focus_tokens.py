"""The tokens of queries that choose: which are explained, with which weights, and against which other answers."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from vestige.data._chat import TEXT_KEYS, ChatTemplate, Conversation
from vestige.data._encode import Rendered, Span, encode
from vestige.data._focus import INSTEAD, SPAN, WEIGHTS
from vestige.data._records import quote
from vestige.data._tokenize import render_plain, tokenize
from vestige.data._turns import is_learned
from vestige.data._types import ASSISTANT, Contrast, Example, Focus, TokenizedData
from vestige.errors import DataError
from vestige.progress import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 12
"""Tokens, and places of words, that an error lists."""


def focus_queries(
    data: TokenizedData,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_length: int | None,
    chat: bool,
    vocabulary: int | None,
) -> TokenizedData:
    """Return tokenised queries with what is explained of them as their targets, their weights and their contrasts.

    Of a query that chooses, the last answer alone is explained, whatever turns of the assistant are before it.
    `data` are the queries with their answers, one of which chooses at least, as `tokenize` returns them with the same
    arguments.

    Raises:
        DataError: A span is not found, is found twice, or covers no token; weights do not fit; or the answers of a
            contrast are the same. The message names the query and what to do.
    """
    rows = [row for row, example in enumerate(data.examples) if example.focus is not None]
    how = {"max_length": max_length, "chat": chat, "vocabulary": vocabulary, "name": data.name}
    examples, targets = list(data.examples), list(data.targets)
    weights = [np.ones(len(ids)) for ids in data.input_ids]
    with quiet():
        alone = tokenize([_explain_last(examples[row], data.name) for row in rows], tokenizer, **how)
        for row, mask in zip(rows, alone.targets, strict=True):
            targets[row], examples[row] = mask, locate_spans(examples[row], data.name)
            if (focus := _focus_of(examples[row])).spans or focus.weights:
                place = _place(examples[row], data.name)
                part = _Part(examples[row], data.input_ids[row], mask, tokenizer, chat, place)
                targets[row], weights[row] = part.explain()
        contrasts = [row for row in rows if _focus_of(examples[row]).instead is not None]
        others = [_answer_instead(examples[row], data.name) for row in contrasts]
        contrast = Contrast(np.array(contrasts), tokenize(others, tokenizer, **how)) if others else None
    for each in (alone,) if contrast is None else (alone, contrast.data):
        _refuse_cut(each)
    digest = hashlib.sha256(data.fingerprint.encode())
    for each in (*targets, *weights):
        digest.update(each.tobytes())
    digest.update(b"" if contrast is None else f"{contrasts} {contrast.data.fingerprint}".encode())
    is_weighted = any(_focus_of(examples[row]).weights for row in rows)
    return replace(
        data,
        examples=examples,
        targets=targets,
        fingerprint=digest.hexdigest(),
        weights=weights if is_weighted else None,
        contrast=contrast,
    )


def _focus_of(example: Example) -> Focus:
    assert example.focus is not None, "only called on queries that choose"
    return example.focus


def _place(example: Example, name: str) -> str:
    return f"{name}, {example.position}"


def _explain_last(example: Example, name: str) -> Example:
    """Return the query with its last answer as all that counts."""
    if not example.messages:
        return example
    *before, last = example.messages
    if not is_learned(last):
        raise DataError(
            f"{_place(example, name)}: its last turn is marked as not learned. Drop the mark, or what chooses."
        )
    silent = [replace(turn, extra=turn.extra | {"train": False}) if turn.role == ASSISTANT else turn for turn in before]
    return replace(example, messages=(*silent, last))


def _answer_instead(example: Example, name: str) -> Example:
    """Return the query with the other answer."""
    other, place = _focus_of(example).instead, _place(example, name)
    assert other is not None
    if example.answer is None:
        raise DataError(
            f"{place}: `{INSTEAD}` is another answer, and a text or a row of tokens has none. Write a `prompt` and a "
            "`completion`, or `messages`."
        )
    if other == example.answer:
        raise DataError(f"{place}: `{INSTEAD}` is the answer itself. Give another one.")
    if example.messages:
        _refuse_text_keys(example, INSTEAD, place)
    return _explain_last(replace(example.without_answer().with_answer(other), focus=None), name)


def _refuse_text_keys(example: Example, field: str, place: str) -> None:
    if held := [key for key in TEXT_KEYS if example.messages[-1].extra.get(key)]:
        raise DataError(
            f"{place}: `{field}` is of the content of the last turn, which also has `{held[0]}`. Drop one of them."
        )


def _refuse_cut(data: TokenizedData) -> None:
    cut = [example for example, is_cut in zip(data.examples, data.truncated, strict=True) if is_cut]
    if cut:
        raise DataError(
            f"{_place(cut[0], data.name)}: with its answer, or the one to compare it with, it is longer than the model "
            "reads, so a part of what is to be explained was cut off. Shorten the question, or raise --max-length."
        )


def locate_spans(example: Example, name: str) -> Example:
    """Return a query of the data called `name` with its spans in characters of its answer.

    Raises:
        DataError: Words are not found, or found more than once.
    """
    if example.focus is None or not example.focus.spans:
        return example
    spans = tuple(_find(example, span, _place(example, name)) for span in example.focus.spans)
    return replace(example, focus=replace(example.focus, spans=spans))


def _find(example: Example, span: tuple[int, int] | str, place: str) -> tuple[int, int]:
    """Return the characters of the answer that a span covers."""
    answer = example.text if example.answer is None else example.answer
    if answer is None:
        raise DataError(f"{place}: `{SPAN}` chooses characters, and the row holds tokens. Mark them as `labels`.")
    if isinstance(span, tuple):
        if not 0 <= span[0] < span[1] <= len(answer):
            raise DataError(
                f"{place}: `{SPAN}` is {list(span)}, and its answer has {len(answer)} characters: "
                f"{quote(answer)}. Give [start, end] with 0 <= start < end <= {len(answer)}."
            )
        return span
    places = [at for at in range(len(answer)) if answer.startswith(span, at)]
    if not places:
        raise DataError(
            f"{place}: its answer does not hold the `{SPAN}` {quote(span)}; it is {quote(answer, 200)}. "
            "Give words as they stand there, or characters [start, end]."
        )
    if len(places) > 1:
        raise DataError(
            f"{place}: its answer holds the `{SPAN}` {quote(span)} {len(places)} times, at characters "
            f"{', '.join(map(str, places[:_SHOWN]))}. Give the one that is meant as [{places[0]}, "
            f"{places[0] + len(span)}], or more words."
        )
    return places[0], places[0] + len(span)


class _Part(NamedTuple):
    """The explained tokens of one query."""

    example: Example
    ids: np.ndarray
    targets: Bool[np.ndarray, "token"]
    tokenizer: "PreTrainedTokenizerBase | None"
    chat: bool
    place: str

    def explain(self) -> tuple[Bool[np.ndarray, "token"], Float[np.ndarray, "token"]]:
        """Return the explained tokens and their weights."""
        spans = [span for span in _focus_of(self.example).spans if isinstance(span, tuple)]
        masks = self._cover(spans) if spans else []
        targets = np.any(masks, axis=0) if masks else self.targets
        return targets, self._weigh(targets, masks)

    def _cover(self, spans: Sequence[tuple[int, int]]) -> list[Bool[np.ndarray, "token"]]:
        """Return the tokens that lie in each span, or partly in it."""
        if self.tokenizer is None or not self.tokenizer.is_fast:
            raise DataError(
                f"{self.place}: `{SPAN}` needs a tokenizer that reports where its tokens stand, and this one is slow. "
                "Give a fast one, or `weights` of the answer's tokens."
            )
        rendered, start = self._render()
        parts = [rendered._replace(targets=(Span(start + first, start + last),), alone=True) for first, last in spans]
        masks = []
        for span, found in zip(spans, encode(parts, self.tokenizer, add_eos=True), strict=True):
            mask = found.targets[: len(self.ids)]
            if not np.array_equal(found.ids[: len(self.ids)], self.ids) or not mask.any():
                raise DataError(
                    f"{self.place}: `{SPAN}` {list(span)} covers no token that the model predicts. Give more "
                    "of the answer."
                )
            masks.append(mask)
        return masks

    def _render(self) -> tuple[Rendered, int]:
        """Return the text that the model reads, and where the answer begins in it."""
        example = self.example
        if example.text is not None:
            return render_plain(example), 0
        if not (example.messages or self.chat):
            return render_plain(example), len(example.prompt or "")
        assert self.tokenizer is not None
        if example.messages:
            _refuse_text_keys(example, SPAN, self.place)
        conversation = Conversation(example, ChatTemplate(self.tokenizer))
        written, answer = conversation.find_last_content(), example.answer or ""
        shown = conversation.text[written.start : written.stop]
        if shown not in (answer, answer.strip(), answer.lstrip(), answer.rstrip()):
            raise DataError(
                f"{self.place}: the chat template rewrites the answer, so its characters cannot be found. Give "
                "`weights` of its tokens in place of `span`."
            )
        start = written.start - answer.index(shown)
        return Rendered(conversation.text, (), has_special_tokens=True, ends=False), start

    def _weigh(self, targets: np.ndarray, masks: Sequence[np.ndarray]) -> Float[np.ndarray, "token"]:
        """Return the weight of each token, 1 where none was given."""
        given, found = _focus_of(self.example).weights, np.ones(len(targets))
        places = np.flatnonzero(targets)
        if not given:
            return found
        if len(given) == len(masks):
            weights = np.array(given)[:, None]
            found[targets] = np.where(masks, weights, -np.inf).max(axis=0)[targets]
            if (np.where(masks, weights, found) != found).any():
                raise DataError(
                    f"{self.place}: parts of `{SPAN}` share a token and have different `{WEIGHTS}`. Give parts that "
                    "are apart, or one weight for each token."
                )
            return found
        if len(given) != len(places):
            raise DataError(self._explain_count(places))
        found[places] = given
        return found

    def _explain_count(self, places: np.ndarray) -> str:
        """Return what is wrong with the number of weights, with the tokens that they are to be of."""
        focus = _focus_of(self.example)
        texts = [] if self.tokenizer is None else [self.tokenizer.decode([int(self.ids[at])]) for at in places]
        shown = ", ".join(map(repr, texts[:_SHOWN])) + (", ..." if len(texts) > _SHOWN else "")
        parts = f", or one for each of the {len(focus.spans)} parts of `{SPAN}`" if focus.spans else ""
        return (
            f"{self.place}: `{WEIGHTS}` has {len(focus.weights)} numbers. Give one for each of the {len(places)} "
            f"explained tokens{f' ({shown})' if shown else ''}{parts}."
        )
