"""Tokenisation of examples as the model receives them, with the positions whose prediction enters the loss."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, cast, final

import numpy as np

from vestige.data._chat import ChatTemplate, render_conversations
from vestige.data._encode import Rendered, Span, Tokens, encode, read_given_tokens, whole_text
from vestige.data._rows import find_unused_columns, refuse_without_template
from vestige.data._types import ASSISTANT, Example, TokenizedData, data_fingerprint
from vestige.errors import DataError
from vestige.progress import announce

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenize(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    max_length: int | None,
    name: str = "data",
    chat: bool = False,
    add_eos: bool = True,
    prompts: bool = False,
    vocabulary: int | None = None,
) -> TokenizedData:
    """Return the examples as tokens and targets; row `i` of the result is `examples[i]`.

    Targets are all tokens of a `text`, the tokens of a `completion` (one that straddles the border to the
    prompt counts as completion), and the assistant's turns of `messages`. Position 0 is never a target.
    Examples with `input_ids` in `extra` are taken as they are, their `labels` and masks deciding the targets.

    Args:
        examples: What `load_examples` or `load_queries` returned.
        tokenizer: The model's tokenizer; None when every example has `input_ids`.
        max_length: Tokens beyond this many are cut off from the right, which is announced; None cuts nothing.
        name: What the data is called in messages and in the result.
        chat: Write a prompt and its completion as a user's and an assistant's turn of the chat template.
        add_eos: End texts and completions with the end token (a target), unless they do; chat templates end
            turns.
        prompts: The answers are still to come, so no example needs a target.
        vocabulary: How many tokens the model has embeddings for; None does not check.

    Raises:
        DataError: A conversation does not render, a tokenised row is inconsistent, a tokenizer is needed, or a token
            is beyond the vocabulary.
    """
    settings = {"max_length": max_length, "name": name, "chat": chat, "add_eos": add_eos, "prompts": prompts}
    encoder, examples = Encoder(tokenizer, **settings, vocabulary=vocabulary), list(examples)
    ids, targets, truncated, tally = encoder.encode(examples)
    encoder.announce(tally)
    return TokenizedData(examples, ids, targets, truncated, data_fingerprint(examples, ids, targets), name)


class Tally(NamedTuple):
    """The counts to report of how examples became tokens; `join` adds the tallies of several chunks."""

    examples: int = 0
    given: int = 0
    """Rows that came with `input_ids`."""
    plain: int = 0
    """Texts, and prompts with completions, that no chat template wrote."""
    spoken: int = 0
    """Conversations."""
    rewritten: int = 0
    """Conversations that the chat template does not write turn by turn."""
    cut: int = 0
    emptied: int = 0
    """Examples that cutting left without a target."""
    bare: int = 0
    """Examples that had no target to begin with."""
    longest: int = 0
    """Tokens of the longest example before cutting."""
    replaced: int = 0
    """Halves of surrogate pairs that were replaced."""
    roles: Sequence[str] = ()
    """Roles of the conversations that had no target to begin with."""
    columns: Sequence[str] = ()
    """Columns that change neither text nor loss."""
    unwritten: Sequence[str] = ()
    """Keys of turns, and variables, that change nothing in some conversations."""

    def join(self, other: "Tally") -> "Tally":
        """Return the sum of both tallies."""
        pairs: Any = zip(self, other, strict=True)
        both: list[Any] = [one + new if isinstance(one, int) else tuple(sorted({*one, *new})) for one, new in pairs]
        return Tally(*both)._replace(longest=max(self.longest, other.longest))


class Encoded(NamedTuple):
    """Examples as tokens, cut to the greatest length."""

    input_ids: list[np.ndarray]
    targets: list[np.ndarray]
    truncated: np.ndarray
    tally: Tally


@final
@dataclass(frozen=True, eq=False)
class Encoder:
    """Turns examples into tokens and targets, with the settings of `tokenize`; no example depends on those beside it.

    Raises:
        DataError: The greatest length is below 2.
    """

    tokenizer: "PreTrainedTokenizerBase | None"
    _: KW_ONLY
    max_length: int | None
    name: str
    chat: bool
    add_eos: bool = True
    prompts: bool = False
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise DataError(
                f"max_length={self.max_length}: at least 2 tokens are needed, one to predict the other from."
            )

    @property
    def identity(self) -> str:
        """Return the sha256 of everything that decides the tokens of a given example."""
        settings = [self.max_length, self.chat, self.add_eos]
        return hashlib.sha256(json.dumps([tokenizer_identity(self.tokenizer), *settings]).encode()).hexdigest()

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Return the tokens of every example."""
        rows, tally = self._encode_all(examples)
        self._require_known(examples, rows)
        lengths = np.array([len(tokens.ids) for tokens in rows], dtype=np.int64)
        limit = self.max_length
        input_ids = [tokens.ids[:limit] for tokens in rows]
        targets = [tokens.targets[:limit] for tokens in rows]
        truncated = np.array([len(ids) for ids in input_ids], dtype=np.int64) < lengths
        without = [number for number, mask in enumerate(targets) if not mask.any()]
        bare = [number for number in without if not rows[number].targets.any()]
        roles = [[turn.role for turn in examples[number].messages] for number in bare]
        tally = tally._replace(
            cut=int(truncated.sum()),
            emptied=len(without) - len(bare),
            bare=0 if self.prompts else len(bare),
            longest=int(lengths.max(initial=0)),
            roles=tuple(sorted({role for each in roles if ASSISTANT not in each for role in each})),
            columns=tuple(sorted(set[str]().union(*map(find_unused_columns, examples)))),
        )
        return Encoded(input_ids, targets, truncated, tally)

    def _require_known(self, examples: Sequence[Example], rows: Sequence[Tokens]) -> None:
        """Raise unless the model has an embedding for every token."""
        for example, tokens in zip(examples, rows, strict=True):
            largest = int(tokens.ids.max(initial=-1))
            if self.vocabulary is not None and largest >= self.vocabulary:
                advice = (
                    "The row was made with another tokenizer. Make it again with this model's, or give text."
                    if "input_ids" in example.extra
                    else "The tokenizer is not this model's. Give the right one with --tokenizer."
                )
                raise DataError(
                    f"{self.name}, {example.position}: the token {largest} is beyond the model's vocabulary of "
                    f"{self.vocabulary:,} tokens. {advice}"
                )

    def announce(self, tally: Tally) -> None:
        """Announce what was used as it is, how many examples were cut, and how many have nothing to learn."""
        name, total = self.name, tally.examples
        if 0 < tally.given < total:
            announce(f"{name}: {tally.given:,} of {total:,} rows hold `input_ids`, which are used as they are.")
        if tally.rewritten:
            announce(
                f"The chat template does not render {tally.rewritten:,} of {tally.spoken:,} conversations turn by "
                "turn (a longer one does not begin with the shorter one, or there is no generation prompt); "
                "there, the assistant's turns were found by their contents."
            )
        if self.add_eos and tally.plain and self.tokenizer is not None and self.tokenizer.eos_token_id is None:
            announce(f"{name}: the tokenizer has no end token, so none is added to texts and completions.")
        if tally.cut:
            tail = f"; no target is left in {tally.emptied:,} of them" if tally.emptied else ""
            announce(
                f"{name}: {tally.cut:,} of {total:,} examples are longer than {self.max_length:,} tokens (the "
                f"longest has {tally.longest:,}) and were cut at the end{tail}."
            )
        if tally.bare > 0:
            roles = f" Conversations without an assistant's turn have the roles {', '.join(tally.roles)}."
            roles = roles if tally.roles else ""
            announce(f"{name}: {tally.bare:,} of {total:,} examples have no target token and cannot score.{roles}")
        if tally.columns and not self.prompts:
            listed = ", ".join(f"`{column}`" for column in tally.columns)
            trained = "; `weight` counts in vestige train alone" if "weight" in tally.columns else ""
            announce(f"{name}: kept with the examples, changing neither their text nor their loss: {listed}{trained}.")
        if tally.unwritten and not self.prompts:
            listed = ", ".join(f"`{key}`" for key in tally.unwritten)
            announce(f"{name}: the chat template writes some conversations the same without {listed}.")

    def _encode_all(self, examples: Sequence[Example]) -> tuple[list[Tokens], Tally]:
        """Return the tokens of every example, each kind of example encoded in one go."""
        result, spoken, plain = dict[int, Tokens](), list[int](), list[int]()
        for number, example in enumerate(examples):
            if "input_ids" in example.extra:
                result[number] = read_given_tokens(example.extra, f"{self.name}, {example.position}")
            elif example.messages or (self.chat and example.prompt is not None):
                spoken.append(number)
            else:
                plain.append(number)
        tally, rendered = Tally(len(examples), len(result), len(plain), len(spoken)), list[Rendered]()
        if texts := spoken + plain:
            if self.tokenizer is None:
                raise DataError(
                    f"{self.name}, {examples[min(texts)].position}: a text needs a tokenizer, and none was given. "
                    "Name one, or give rows that hold `input_ids`."
                )
            if spoken:
                rendered, rewritten, keys = render_conversations([examples[each] for each in spoken], self._template)
                tally = tally._replace(rewritten=rewritten, unwritten=tuple(sorted(keys)))
            for number in plain:
                refuse_without_template(examples[number], self.name)
            rendered += [render_plain(examples[number]) for number in plain]
            result.update(zip(texts, encode(rendered, self.tokenizer, add_eos=self.add_eos), strict=True))
        return [result[number] for number in range(len(examples))], tally

    @cached_property
    def _template(self) -> ChatTemplate:
        assert self.tokenizer is not None
        return ChatTemplate(self.tokenizer)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase | None") -> str:
    """Return the sha256 of what a tokenizer is made of, and of the versions of the software that runs it."""
    if tokenizer is None:
        return "none"
    if tokenizer.is_fast:
        rules = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        # What the last call requested, not what the tokenizer is.
        rules.update(truncation=None, padding=None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    versions = [version(name) for name in ("transformers", "tokenizers")]
    made_of = [type(tokenizer).__name__, rules, special, str(tokenizer.chat_template), versions]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def render_plain(example: Example) -> Rendered:
    """Return the text of an example that no chat template writes."""
    if example.text is not None:
        return Rendered(example.text, (whole_text(example.text),), has_special_tokens=False, ends=True)
    prompt, completion = example.prompt or "", example.completion
    if completion is None:
        return Rendered(prompt, (), has_special_tokens=False, ends=False)
    text = prompt + completion
    return Rendered(text, (Span(len(prompt), len(text)),), has_special_tokens=False, ends=True)
