"""Conversations as the tokenizer's chat template writes them, with the spans that the assistant said."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2.exceptions import TemplateError

from vestige.data._encode import Rendered, Span
from vestige.data._types import ASSISTANT, Example, Message
from vestige.errors import DataError
from vestige.progress import announce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_DATE = "26 Jul 2024"
"""Llama templates write today's date unless they are given one; this is the one they fall back to."""

# Characters of the private use area: no real content shares its first or last character with it.
PLACEHOLDER = "\ue000\ue001\ue002"


def as_conversation(example: Example) -> tuple[Message, ...]:
    """The example's turns; a prompt becomes a user turn and its completion, if any, an assistant turn.

    The newline that separates a question from its answer in plain text is not part of the user's turn.
    """
    if example.messages:
        return example.messages
    turns = (Message("user", (example.prompt or "").removesuffix("\n")),)
    return turns if example.completion is None else (*turns, Message(ASSISTANT, example.completion))


class Conversations(NamedTuple):
    """Rendered conversations, and how many of them the template did not write turn by turn."""

    rendered: list[Rendered]
    rewritten: int


def render_conversations(examples: Sequence[Example], template: "ChatTemplate") -> Conversations:
    """Each example's conversation as text, with what the assistant said (and its end of turn) as targets.

    Generation markers in the template decide where there are any. Otherwise an assistant turn is what a
    rendering up to that turn adds to the rendering before it, generation prompt included. That presumes that
    a conversation renders to a prefix of any longer one. Templates that rewrite earlier turns break it;
    there, a turn is what changes when its content is replaced, and this is counted.

    Raises:
        DataError: The template refuses a conversation.
    """
    rendered: list[Rendered] = []
    rewritten = 0
    for example in examples:
        turns = as_conversation(example)
        try:
            text, spans, by_prefixes = template.spoken(turns)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(turn.role for turn in turns)
            raise DataError(
                f"The tokenizer's chat template refuses row {example.row} (id {example.id!r}), whose roles "
                f"are {roles}: {error}. Change the roles or their order, or give a tokenizer with another "
                "template."
            ) from error
        rewritten += not by_prefixes
        rendered.append(Rendered(text, spans, has_special_tokens=True, ends=False))
    return Conversations(rendered, rewritten)


class ChatTemplate:
    """Renders conversations and finds what the assistant said in them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        try:
            self._template = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                "The tokenizer has no chat template, which conversations need. Give the tokenizer of a chat "
                "model, set `tokenizer.chat_template`, or use `prompt` and `completion` without chat."
            ) from error
        self._tokenizer = tokenizer
        self._has_markers = GENERATION_MARKER.search(self._template) is not None
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

    def render(self, turns: Sequence[Message], *, generation_prompt: bool) -> str:
        """The conversation as text, special tokens included."""
        text = self._tokenizer.apply_chat_template(
            _plain(turns), tokenize=False, add_generation_prompt=generation_prompt, **self._variables
        )
        return str(text)

    def spoken(self, turns: Sequence[Message]) -> tuple[str, tuple[Span, ...], bool]:
        """The text, the spans that the assistant said, and whether they rest on markers or prefixes.

        A conversation that waits for the assistant ends in the generation prompt.
        """
        waiting = turns[-1].role != ASSISTANT
        if self._has_markers:
            text, spans = self._marked(turns, waiting)
            return text, spans, True
        text = self.render(turns, generation_prompt=waiting)
        spans = self._spans_by_prefixes(turns, text)
        if spans is not None:
            return text, spans, True
        return text, self._spans_by_contents(turns, text, waiting), False

    def _marked(self, turns: Sequence[Message], waiting: bool) -> tuple[str, tuple[Span, ...]]:
        # `apply_chat_template(return_assistant_tokens_mask=True)` would look up the token of a span's first
        # character and give up where a tokenizer trimmed that character as a space; the characters themselves
        # are exact.
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self._tokenizer.special_tokens_map, **self._variables}
        texts: Any
        texts, spans = render_jinja_template(
            conversations=[_plain(turns)],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=waiting,
            **variables,
        )
        return texts[0], tuple(Span(int(start), int(stop)) for start, stop in spans[0] if stop > start)

    def _spans_by_prefixes(self, turns: Sequence[Message], text: str) -> tuple[Span, ...] | None:
        """What each assistant turn adds to the text so far; None when the prefix property does not hold."""
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            if number == 0:
                return None
            try:
                silent = self.render(turns[:number], generation_prompt=False)
                before = self.render(turns[:number], generation_prompt=True)
                is_last = number == len(turns) - 1
                after = text if is_last else self.render(turns[: number + 1], generation_prompt=False)
            except (TemplateError, TypeError, ValueError, KeyError):
                return None
            if before == silent or not after.startswith(before) or not text.startswith(after):
                return None
            spans.append(self._until_end_of_turn(text, Span(len(before), len(after))))
        return tuple(spans)

    def _until_end_of_turn(self, text: str, span: Span) -> Span:
        """The span without the line break that a template writes after the end-of-turn token."""
        said = text[span.start : span.stop].rstrip()
        return Span(span.start, span.start + len(said)) if said.endswith(self._special) else span

    def _spans_by_contents(self, turns: Sequence[Message], text: str, waiting: bool) -> tuple[Span, ...]:
        """What changes when an assistant turn's content does, and the special token that ends the turn."""
        spans: list[Span] = []
        for number, turn in enumerate(turns):
            if turn.role != ASSISTANT:
                continue
            changed = [*turns[:number], replace(turn, content=PLACEHOLDER), *turns[number + 1 :]]
            other = self.render(changed, generation_prompt=waiting)
            start = _shared_length(text, other)
            tail = _shared_length(text[start:][::-1], other[start:][::-1])
            if start < len(text) - tail:
                spans.append(self._with_end_of_turn(text, Span(start, len(text) - tail)))
        return tuple(spans)

    def _with_end_of_turn(self, text: str, span: Span) -> Span:
        for gap in ("", " "):
            for token in sorted(self._special, key=len, reverse=True):
                is_end = gap == "" or token == self._tokenizer.eos_token
                if is_end and text.startswith(gap + token, span.stop):
                    return Span(span.start, span.stop + len(gap + token))
        return span


def _shared_length(one: str, other: str) -> int:
    """How many characters the two have in common from their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _plain(turns: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]
