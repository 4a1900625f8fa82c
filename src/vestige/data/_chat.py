"""Conversations as the tokenizer's chat template writes them, with the spans of the assistant's words."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import compress
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
        try:
            conversation = Conversation(example, template)
            spans, by_prefixes = conversation.find_spoken()
            unwritten |= conversation.find_unwritten_keys()
        except _FAILURES as error:
            roles = ", ".join(turn.role for turn in as_conversation(example))
            raise DataError(
                f"The tokenizer's chat template refuses {example.position}, whose roles are {roles}: {error}. Change "
                "the roles or their order, or give a tokenizer with another template."
            ) from error
        except _Unwritten as error:
            raise DataError(f"Row {example.row} (id {example.id!r}): {error}") from error
        rewritten += not by_prefixes
        rendered.append(Rendered(conversation.text, spans, has_special_tokens=True, ends=False))
    return rendered, rewritten, unwritten


class _Unwritten(Exception):
    """The template leaves out what decides the text or the loss of a conversation."""


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._source = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "The tokenizer has no chat template, which conversations need. Give the tokenizer of a chat "
                "model, set `tokenizer.chat_template`, or use `prompt` and `completion` without chat."
            ) from error
        self.tokenizer = tokenizer
        self.variables: dict[str, Any] = {}
        if "date_string" in self._source:
            self.variables["date_string"] = TEMPLATE_DATE
        elif "strftime_now" in self._source:
            announce(
                "The chat template writes today's date: tokens, and with them the data's fingerprint, "
                "change every day. Set `tokenizer.chat_template` to one with a fixed date to be able to "
                "resume tomorrow."
            )
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.special = tuple({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()})

    def source(self, variables: Mapping[str, Any]) -> str:
        """Return the template itself: a tokenizer may have another one for conversations with tools."""
        return self.tokenizer.get_chat_template(tools=variables["tools"]) if "tools" in variables else self._source


class Conversation:
    """A conversation as a chat template writes it; one that waits for the assistant ends in the generation prompt."""

    def __init__(self, example: Example, template: ChatTemplate) -> None:
        self._template, self._variables = template, template_variables(example)
        self._source = template.source(self._variables)
        self._turns = self._without_written_nulls(as_conversation(example))
        self._waiting = self._turns[-1].role != ASSISTANT

    @cached_property
    def text(self) -> str:
        """The conversation, special tokens included."""
        return self._render(self._turns, generation_prompt=self._waiting)

    def find_spoken(self) -> tuple[tuple[Span, ...], bool]:
        """Return the spans of the assistant's words in the text, and whether they rest on markers or prefixes."""
        if GENERATION_MARKER.search(self._source):
            return self._find_marked(), True
        spans = self._spans_by_prefixes()
        return (self._spans_by_contents(), False) if spans is None else (spans, True)

    def find_unwritten_keys(self) -> set[str]:
        """Return keys of turns, and variables, without which the template writes the same conversation."""
        found = set[str]()
        keys = {key for turn in self._turns for key in turn.extra if key not in (*FLAGS, "content")}
        for key in sorted(keys | set(self._variables)):
            others = {name: value for name, value in self._variables.items() if name != key}
            turns = [_without_key(turn, key) for turn in self._turns]
            try:
                if self._render(turns, generation_prompt=self._waiting, variables=others) != self.text:
                    continue
            except _FAILURES:
                continue  # The template cannot do without it.
            named = re.search(rf"\b{re.escape(key)}\b", self._source)
            if key in (*TEXT_KEYS, *_TEXT_VARIABLES) and not named:
                raise _Unwritten(
                    f"the tokenizer's chat template does not write `{key}`, so the model would neither read nor learn "
                    "it. Give a tokenizer whose template does, write it into `content`, or drop it."
                )
            found.add(key)
        return found

    def find_last_content(self) -> Span:
        """Return where the content of the last turn, the assistant's, stands in the text."""
        return self._find_changed(len(self._turns) - 1, self._turns[-1].extra)

    def _render(
        self, turns: Sequence[Message], *, generation_prompt: bool = False, variables: Mapping[str, Any] | None = None
    ) -> str:
        given = self._template.variables | dict(self._variables if variables is None else variables)
        text = self._template.tokenizer.apply_chat_template(
            [turn.columns for turn in turns], tokenize=False, add_generation_prompt=generation_prompt, **given
        )
        return str(text)

    def _without_written_nulls(self, turns: Sequence[Message]) -> Sequence[Message]:
        """Return the turns, null contents as empty texts where the template would write "None"."""
        if not any("content" in turn.extra for turn in turns):
            return turns
        empty = [_without_key(turn, "content") for turn in turns]
        try:
            with_nulls = self._render(turns)
        except _FAILURES:
            return empty
        return empty if with_nulls.count("None") > self._render(empty).count("None") else turns

    def _find_marked(self) -> tuple[Span, ...]:
        # `apply_chat_template(return_assistant_tokens_mask=True)` would look up the token of a span's first
        # character and give up where a tokenizer trimmed that character as a space; the characters themselves
        # are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        _, spans = render_jinja_template(
            conversations=[[turn.columns for turn in self._turns]],
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            add_generation_prompt=self._waiting,
            **{**self._template.tokenizer.special_tokens_map, **self._template.variables, **self._variables},
        )
        found: Any = spans[0]
        learned = [is_learned(turn) for turn in self._turns if turn.role == ASSISTANT]
        if not all(learned):
            if len(found) != len(learned):
                raise _Unwritten(
                    f"some of its assistant's turns are not to be learned, and the chat template marks {len(found)} "
                    f"passages for {len(learned)} such turns. Give a template that marks one for each."
                )
            found = compress(found, learned)
        return tuple(Span(int(start), int(stop)) for start, stop in found if stop > start)

    def _spans_by_prefixes(self) -> tuple[Span, ...] | None:
        """Return what each assistant turn adds to the text so far; None when the prefix property does not hold."""
        spans: list[Span] = []
        for number, turn in enumerate(self._turns):
            if not is_learned(turn):
                continue
            if number == 0:
                return None
            try:
                silent = self._render(self._turns[:number])
                before = self._render(self._turns[:number], generation_prompt=True)
                is_last = number == len(self._turns) - 1
                after = self.text if is_last else self._render(self._turns[: number + 1])
            except _FAILURES:
                return None
            if before == silent or not after.startswith(before) or not self.text.startswith(after):
                return None
            # A template may write a line break after the end-of-turn token.
            words = after[len(before) :].rstrip()
            stop = len(before) + len(words) if words.endswith(self._template.special) else len(after)
            spans.append(Span(len(before), stop))
        return tuple(spans)

    def _spans_by_contents(self) -> tuple[Span, ...]:
        """Return what changes when an assistant's content, thoughts and calls do, and the token that ends the turn."""
        spans: list[Span] = []
        for number, turn in enumerate(self._turns):
            if is_learned(turn):
                kept = {key: value for key, value in turn.extra.items() if key not in ("content", *TEXT_KEYS)}
                span = self._find_changed(number, kept)
                if span.start < span.stop:
                    spans.append(self._with_end_of_turn(span))
        return tuple(spans)

    def _find_changed(self, number: int, extra: dict[str, Any]) -> Span:
        """Return which part of the text is another one where a turn has other contents, and these other keys alone."""
        changed = Message(self._turns[number].role, PLACEHOLDER, extra)
        turns = [*self._turns[:number], changed, *self._turns[number + 1 :]]
        other = self._render(turns, generation_prompt=self._waiting)
        start = _count_shared(self.text, other)
        return Span(start, len(self.text) - _count_shared(self.text[start:][::-1], other[start:][::-1]))

    def _with_end_of_turn(self, span: Span) -> Span:
        for gap in ("", " "):
            for token in sorted(self._template.special, key=len, reverse=True):
                is_end = gap == "" or token == self._template.tokenizer.eos_token
                if is_end and self.text.startswith(gap + token, span.stop):
                    return Span(span.start, span.stop + len(gap + token))
        return span


def _without_key(turn: Message, key: str) -> Message:
    return replace(turn, extra={name: value for name, value in turn.extra.items() if name != key})


def _count_shared(one: str, other: str) -> int:
    """Return how many characters the two have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))
