"""Conversations as the tokenizer's chat template writes them, with the spans of the assistant's words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from vestige.data._encode import Rendered, Span
from vestige.data._rows import template_variables, turns_before
from vestige.data._turns import FLAGS, is_learned
from vestige.data._types import ASSISTANT, Example, Message
from vestige.errors import DataError
from vestige.progress import announce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_DATE = "26 Jul 2024"
"""Llama templates write today's date unless they are given one; this is the one they fall back to."""

TEXT_KEYS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "thinking",
    "thoughts",
    "tool_responses",
)
"""Keys of a turn that are text of it: a template that leaves one out leaves out what the model was to read."""
_TEXT_VARIABLES = ("tools", "documents")
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template raises that does not take a conversation."""

# Characters of the private use area: no real content shares its first or last character with it.
PLACEHOLDER = "\ue000\ue001\ue002"


def as_conversation(example: Example) -> tuple[Message, ...]:
    """Return the example's turns; a prompt becomes a user turn and its completion, if any, an assistant turn.

    The columns `system` and `history` come first. The newline that separates a question from its answer in plain text
    is not part of the user's turn.
    """
    before = turns_before(example)
    if example.messages:
        return (*before, *example.messages)
    turns = (*before, Message("user", (example.prompt or "").removesuffix("\n")))
    return turns if example.completion is None else (*turns, Message(ASSISTANT, example.completion))


def render_conversations(examples: Sequence[Example], template: "ChatTemplate") -> tuple[list[Rendered], int, set[str]]:
    """Return each example's conversation as text, with the assistant's words (and its end of turn) as targets.

    Generation markers in the template decide where there are any. Otherwise an assistant turn is what a
    rendering up to that turn adds to the rendering before it, generation prompt included. That presumes that
    a conversation renders to a prefix of any longer one. Templates that rewrite earlier turns break it;
    there, a turn is what changes when its content is replaced. A turn that is not to be learned is no target.

    Returns:
        The texts; how many of them the template did not write turn by turn; and keys of turns and variables of the
        template that change nothing in some of them.
    """
    rendered: list[Rendered] = []
    rewritten, unwritten = 0, set[str]()
    for example in examples:
        turns, variables = as_conversation(example), template_variables(example)
        try:
            text, spans, by_prefixes = template.spoken(turns, variables)
            unwritten |= template.unwritten_keys(turns, variables)
        except _FAILURES as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"The tokenizer's chat template refuses row {example.row} (id {example.id!r}), whose roles "
                f"are {roles}: {error}. Change the roles or their order, or give a tokenizer with another "
                "template."
            ) from error
        except _Unwritten as error:
            raise DataError(f"Row {example.row} (id {example.id!r}): {error}") from error
        rewritten += not by_prefixes
        rendered.append(Rendered(text, spans, has_special_tokens=True, ends=False))
    return rendered, rewritten, unwritten


class _Unwritten(Exception):
    """The template leaves out what decides the text or the loss of a conversation."""


class ChatTemplate:
    """Renders conversations and finds the assistant's words in them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "The tokenizer has no chat template, which conversations need. Give the tokenizer of a chat "
                "model, set `tokenizer.chat_template`, or use `prompt` and `completion` without chat."
            ) from error
        self._tokenizer = tokenizer
        self._variables: dict[str, Any] = {}
        if "date_string" in self._template:
            self._variables["date_string"] = TEMPLATE_DATE
        elif "strftime_now" in self._template:
            announce(
                "The chat template writes today's date: tokens, and with them the data's fingerprint, "
                "change every day. Set `tokenizer.chat_template` to one with a fixed date to be able to "
                "resume tomorrow."
            )
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self._special = tuple({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()})

    def render(self, turns: Sequence[Message], variables: Mapping[str, Any], *, generation_prompt: bool) -> str:
        """Return the conversation as text, special tokens included."""
        text = self._tokenizer.apply_chat_template(
            _plain(turns), tokenize=False, add_generation_prompt=generation_prompt, **self._variables | dict(variables)
        )
        return str(text)

    def spoken(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> tuple[str, tuple[Span, ...], bool]:
        """Return the text, the spans of the assistant's words, and whether they rest on markers or prefixes.

        A conversation that waits for the assistant ends in the generation prompt.
        """
        waiting = turns[-1].role != ASSISTANT
        turns = self._without_written_nulls(turns, variables)
        if GENERATION_MARKER.search(self._source(variables)):
            text, spans = self._find_marked(turns, variables, waiting)
            return text, spans, True
        text = self.render(turns, variables, generation_prompt=waiting)
        spans = self._spans_by_prefixes(turns, variables, text)
        if spans is not None:
            return text, spans, True
        return text, self._spans_by_contents(turns, variables, text, waiting), False

    def unwritten_keys(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> set[str]:
        """Return keys of turns, and variables, without which the template writes the same conversation."""
        waiting, found = turns[-1].role != ASSISTANT, set[str]()
        keys = {key for turn in turns for key in turn.extra if key not in (*FLAGS, "content")} | set(variables)
        written = self.render(turns, variables, generation_prompt=waiting) if keys else ""
        for key in sorted(keys):
            without = [replace(turn, extra={k: v for k, v in turn.extra.items() if k != key}) for turn in turns]
            others = {name: value for name, value in variables.items() if name != key}
            try:
                if self.render(without, others, generation_prompt=waiting) != written:
                    continue
            except _FAILURES:
                continue  # The template cannot do without it.
            named = re.search(rf"\b{re.escape(key)}\b", self._source(variables))
            if key in (*TEXT_KEYS, *_TEXT_VARIABLES) and not named:
                raise _Unwritten(
                    f"the tokenizer's chat template does not write `{key}`, so the model would neither read nor learn "
                    "it. Give a tokenizer whose template does, write it into `content`, or drop it."
                )
            found.add(key)
        return found

    def _source(self, variables: Mapping[str, Any]) -> str:
        """Return the template itself: a tokenizer may have another one for conversations with tools."""
        return self._tokenizer.get_chat_template(tools=variables["tools"]) if "tools" in variables else self._template

    def _without_written_nulls(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> Sequence[Message]:
        """Return the turns, null contents as empty texts where the template would write "None"."""
        if not any("content" in turn.extra for turn in turns):
            return turns
        empty = [replace(turn, extra={k: v for k, v in turn.extra.items() if k != "content"}) for turn in turns]
        try:
            with_nulls = self.render(turns, variables, generation_prompt=False)
        except _FAILURES:
            return empty
        without = self.render(empty, variables, generation_prompt=False)
        return empty if with_nulls.count("None") > without.count("None") else turns

    def _find_marked(
        self, turns: Sequence[Message], variables: Mapping[str, Any], waiting: bool
    ) -> tuple[str, tuple[Span, ...]]:
        # `apply_chat_template(return_assistant_tokens_mask=True)` would look up the token of a span's first
        # character and give up where a tokenizer trimmed that character as a space; the characters themselves
        # are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        texts: Any
        texts, spans = render_jinja_template(
            conversations=[_plain(turns)],
            chat_template=self._source(variables),
            return_assistant_tokens_mask=True,
            add_generation_prompt=waiting,
            **{**self._tokenizer.special_tokens_map, **self._variables, **variables},
        )
        found = list(spans[0])
        learned = [is_learned(turn) for turn in turns if turn.role == ASSISTANT]
        if not all(learned):
            if len(found) != len(learned):
                raise _Unwritten(
                    f"some of its assistant's turns are not to be learned, and the chat template marks {len(found)} "
                    f"passages for {len(learned)} such turns. Give a template that marks one for each."
                )
            found = [span for span, wanted in zip(found, learned, strict=True) if wanted]
        return texts[0], tuple(Span(int(start), int(stop)) for start, stop in found if stop > start)

    def _spans_by_prefixes(
        self, turns: Sequence[Message], variables: Mapping[str, Any], text: str
    ) -> tuple[Span, ...] | None:
        """Return what each assistant turn adds to the text so far; None when the prefix property does not hold."""
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if not is_learned(turn):
                continue
            if number == 0:
                return None
            try:
                silent = self.render(turns[:number], variables, generation_prompt=False)
                before = self.render(turns[:number], variables, generation_prompt=True)
                is_last = number == len(turns) - 1
                after = text if is_last else self.render(turns[: number + 1], variables, generation_prompt=False)
            except _FAILURES:
                return None
            if before == silent or not after.startswith(before) or not text.startswith(after):
                return None
            spans.append(self._until_end_of_turn(text, Span(len(before), len(after))))
        return tuple(spans)

    def _until_end_of_turn(self, text: str, span: Span) -> Span:
        """Return the span without the line break that a template writes after the end-of-turn token."""
        words = text[span.start : span.stop].rstrip()
        return Span(span.start, span.start + len(words)) if words.endswith(self._special) else span

    def _spans_by_contents(
        self, turns: Sequence[Message], variables: Mapping[str, Any], text: str, waiting: bool
    ) -> tuple[Span, ...]:
        """Return what changes when an assistant's content, thoughts and calls do, and the token that ends the turn."""
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if not is_learned(turn):
                continue
            kept = {key: value for key, value in turn.extra.items() if key not in ("content", *TEXT_KEYS)}
            changed = [*turns[:number], Message(turn.role, PLACEHOLDER, kept), *turns[number + 1 :]]
            span = self._find_changed(changed, variables, text, waiting)
            if span.start < span.stop:
                spans.append(self._with_end_of_turn(text, span))
        return tuple(spans)

    def find_last_content(self, turns: Sequence[Message], variables: Mapping[str, Any], text: str) -> Span:
        """Return where the content of the last turn, the assistant's, stands in the text of the conversation."""
        last = turns[-1]
        return self._find_changed([*turns[:-1], replace(last, content=PLACEHOLDER)], variables, text, waiting=False)

    def _find_changed(self, changed: Sequence[Message], variables: Mapping[str, Any], text: str, waiting: bool) -> Span:
        """Return which part of a text is another one in the text of a conversation with one turn changed."""
        other = self.render(changed, variables, generation_prompt=waiting)
        start = _count_shared(text, other)
        return Span(start, len(text) - _count_shared(text[start:][::-1], other[start:][::-1]))

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        for gap in ("", " "):
            for token in sorted(self._special, key=len, reverse=True):
                is_end = gap == "" or token == self._tokenizer.eos_token
                if is_end and text.startswith(gap + token, span.stop):
                    return Span(span.start, span.stop + len(gap + token))
        return span


def _count_shared(one: str, other: str) -> int:
    """Return how many characters the two have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _plain(turns: Sequence[Message]) -> list[dict[str, Any]]:
    return [turn.columns for turn in turns]
