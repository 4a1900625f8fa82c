"""The model's answers: greedy continuations of prompts and conversations."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vestige.data import Example, Sharing, TokenizedData, plan_batches, tokenize
from vestige.errors import DataError, ModelError
from vestige.models._components import LoadedModel
from vestige.models._pretrained import acts_in_forward, batch_sharing
from vestige.progress import progress

_BATCH_TOKENS = 4096
_BATCH_EXAMPLES = 32


def generate_answers(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
    on_answer: Callable[[int, Example], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Example]:
    """Return the same examples, each prompt with the model's own most likely answer as its completion.

    Greedy, as `answer_prompts` without a temperature. Examples that have an answer already, and plain
    texts, are returned as they are; `messages` get one more assistant turn.

    Args:
        loaded: A model with a tokenizer.
        examples: Queries, as `load_queries` returns them.
        max_new_tokens: Most tokens of an answer.
        chat: Put a prompt into the tokenizer's chat template as a user turn.
        on_answer: Called with the number of each example that is answered here, and the answered example, as soon as
            its answer has ended: short answers first.
        on_text: As for `answer_prompts`.

    Raises:
        ModelError: The model cannot generate, or has no tokenizer.
        DataError: A prompt is empty or fills the model's context.
    """
    waiting = [number for number, example in enumerate(examples) if example.lacks_answer]
    answered = list(examples)
    if not waiting:
        return answered

    def show(place: int, answer: Answer) -> None:
        assert on_answer is not None
        on_answer(waiting[place], examples[waiting[place]].with_answer(answer.text))

    prompts, keep = [examples[number] for number in waiting], None if on_answer is None else show
    answers = answer_prompts(loaded, prompts, max_new_tokens=max_new_tokens, chat=chat, keep=keep, on_text=on_text)
    for number, answer in zip(waiting, answers, strict=True):
        answered[number] = examples[number].with_answer(answer.text)
    return answered


class Answer(NamedTuple):
    """A model's answer to a prompt."""

    text: str
    tokens: int
    """Number of tokens of the answer, without the end token."""
    ended: bool
    """Whether the model ended it; else it was cut."""


def answer_prompts(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | Sequence[int] = 64,
    chat: bool = False,
    temperature: float = 0.0,
    seeds: Sequence[int] = (),
    keep: Callable[[int, Answer], None] | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Return the model's answer to every prompt, the same alone as in any batch.

    Greedy, or drawn with a `temperature` from random numbers that each prompt has for itself (Gumbel's trick: the most
    likely token after noise of the seed and the position was added). An answer ends before the end token, or after
    `max_new_tokens`, or where the model's context is full: for each prompt where its own is, not that of the longest
    prompt beside it.

    Args:
        loaded: A model with a tokenizer.
        examples: Prompts, or conversations whose last turn is not the assistant's.
        max_new_tokens: Most tokens of an answer, or of each.
        chat: Put a prompt into the tokenizer's chat template as a user turn.
        temperature: Above 0, `seeds` are needed.
        seeds: One for each prompt.
        keep: Called with the number of each prompt and its answer as soon as that has ended.
        on_text: Called with the answer so far after each token, of a single prompt.

    Raises:
        ModelError: The model cannot generate, or has no tokenizer.
        DataError: A prompt is empty or fills the model's context.
    """
    prompts = _prompts(loaded, list(examples), chat)
    most = _budgets(loaded, prompts, max_new_tokens)
    found: dict[int, Answer] = {}
    with progress(len(prompts), "Generating answers", unit="prompts") as counter:

        def finish(row: int, answer: Answer) -> None:
            found[row] = answer
            if keep is not None:
                keep(row, answer)
            counter.advance()

        # Prompts that are continued together are as long as the longest of them, and grow on the way.
        alone = acts_in_forward(loaded.model) or batch_sharing(loaded.model) != Sharing()
        for rows in plan_batches(prompts.lengths + most, _BATCH_TOKENS, 1 if alone else _BATCH_EXAMPLES):
            batch = {row: _OpenAnswer(prompts.input_ids[row].tolist(), int(most[row])) for row in rows.tolist()}
            listener = on_text if len(prompts) == 1 else None
            streamer = _Streamer(loaded, batch, finish, listener)
            _answer_together(loaded, streamer, temperature, seeds, is_live=(keep or listener) is not None)
    return [found[row] for row in range(len(prompts))]


def _budgets(loaded: LoadedModel, prompts: TokenizedData, most: int | Sequence[int]) -> Int[np.ndarray, "example"]:
    """Return the maximum number of tokens of each answer: as requested, or what its prompt leaves of the context."""
    requested = np.broadcast_to(np.asarray(most, dtype=np.int64), len(prompts))
    limit = loaded.context_length
    return requested if limit is None else np.minimum(requested, limit - prompts.lengths)


def _prompts(loaded: LoadedModel, examples: list[Example], chat: bool) -> TokenizedData:
    if loaded.tokenizer is None or not hasattr(loaded.model, "generate"):
        lacking = "tokenizer" if loaded.tokenizer is None else "`generate` method"
        raise ModelError(
            f"{loaded.name} has no {lacking}, so it cannot answer the {len(examples)} prompts that have no completion. "
            "Give each query the completion that is to be explained."
        )
    prompts = tokenize(examples, loaded.tokenizer, max_length=None, name="prompts", chat=chat, prompts=True)
    limit = loaded.context_length
    for example, length in zip(examples, prompts.lengths, strict=True):
        if length == 0 or (limit is not None and length >= limit):
            least = "at least 1 token" if length == 0 else f"fewer than the model's {limit} tokens"
            raise DataError(f"The prompt of query {example.id!r} has {length} tokens; to be answered it needs {least}.")
    return prompts


def _answer_together(
    loaded: LoadedModel, streamer: "_Streamer", temperature: float, seeds: Sequence[int], *, is_live: bool
) -> None:
    """Answer the prompts of a batch; the streamer takes the tokens, while they come if `is_live`.

    The longest prompt may fill the context before a shorter one's answer has ended: those go on without it.
    """
    while going := streamer.start():
        soon = max(answer.left for answer in going.values())
        whole = [torch.tensor(answer.prompt + answer.new, dtype=torch.int64) for answer in going.values()]
        if loaded.context_length is not None:
            soon = min(soon, loaded.context_length - max(map(len, whole)))
        noise = None
        if temperature > 0:
            first, width = [len(answer.new) for answer in going.values()], max(map(len, whole))
            noise = _GumbelNoise(temperature, [seeds[row] for row in going], first, width)
        tokens = _continue(loaded, whole, soon, noise, streamer if is_live else None)
        for column in () if is_live else tokens.T:
            streamer.put(column)
        if tokens.shape[1] < soon:
            streamer.close()


@dataclass
class _OpenAnswer:
    """The tokens that an answer has so far."""

    prompt: list[int]
    most: int
    new: list[int] = field(default_factory=list)
    is_over: bool = False

    @property
    def left(self) -> int:
        """Number of tokens that may still come."""
        return self.most - len(self.new)


class _Streamer:
    """Takes the tokens of a batch as `generate` makes them: each answer ends at its own end token or its own limit."""

    def __init__(
        self,
        loaded: LoadedModel,
        answers: dict[int, _OpenAnswer],
        finish: Callable[[int, Answer], None],
        on_text: Callable[[str], None] | None,
    ) -> None:
        self._tokenizer: Any = loaded.tokenizer
        self._ends = _end_tokens(loaded)
        self._answers, self._finish, self._on_text = answers, finish, on_text
        self._going = answers

    def start(self) -> dict[int, _OpenAnswer]:
        """Return the answers that have not ended, in the order of the next tokens."""
        self._going = {row: answer for row, answer in self._answers.items() if not answer.is_over}
        return self._going

    def put(self, value: Tensor) -> None:
        """Take the prompts [example, token], which come first, or the next token of each answer [example]."""
        if value.ndim != 1:
            return
        for (row, answer), token in zip(self._going.items(), value.tolist(), strict=True):
            if answer.is_over:
                continue
            ended = token in self._ends
            if not ended:
                answer.new.append(token)
            if self._on_text is not None:
                self._on_text(self._text(answer))
            if ended or answer.left <= 0:
                self._close(row, ended)

    def end(self) -> None:
        """Take the end of what `generate` makes."""

    def close(self) -> None:
        """End what is left: the model makes no more tokens."""
        for row in self.start():
            self._close(row, ended=True)

    def _close(self, row: int, ended: bool) -> None:
        answer = self._answers[row]
        answer.is_over = True
        self._finish(row, Answer(self._text(answer), len(answer.new), ended))

    def _text(self, answer: _OpenAnswer) -> str:
        """Return the answer as it continues the prompt's text: a tokenizer may drop the space before a first word."""

        def text(tokens: list[int]) -> str:
            return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

        before, whole = text(answer.prompt), text(answer.prompt + answer.new)
        return whole.removeprefix(before) if whole.startswith(before) else text(answer.new)


class _GumbelNoise(LogitsProcessor):
    """Adds noise to logits so that the largest one is a draw from their softmax; each row has numbers of its own."""

    def __init__(self, temperature: float, seeds: list[int], first: list[int], width: int) -> None:
        self._temperature = temperature
        self._seeds = seeds
        self._first = first
        """Position, in its answer, of the first token of each row."""
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        step = input_ids.shape[1] - self._width
        rows = []
        for seed, first in zip(self._seeds, self._first, strict=True):
            number = int.from_bytes(hashlib.sha256(f"{seed}:{first + step}".encode()).digest()[:7], "big")
            uniform = torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            rows.append(-torch.log(-torch.log(uniform.clamp_min(1e-300))))
        return scores.double() / self._temperature + torch.stack(rows).to(scores.device)


def _continue(
    loaded: LoadedModel,
    prompts: list[Tensor],
    max_new_tokens: int,
    noise: LogitsProcessor | None,
    streamer: _Streamer | None,
) -> Int[Tensor, "example token"]:
    """Return the token ids that follow each prompt; what follows an end token is padding."""
    # A PEFT wrapper hands its own generation settings on; the model inside mostly has the adapter in its layers.
    inner: Any = getattr(loaded.model, "get_base_model", lambda: loaded.model)()
    model: Any = loaded.model if acts_in_forward(loaded.model) else inner
    ends = _end_tokens(loaded)
    padding = ends[0] if ends else 0
    ids, mask = _left_padded(prompts, padding)
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        eos_token_id=ends or None,
        pad_token_id=padding,
    )
    device = next(model.parameters()).device
    # Exchanged, not only passed: penalties and sampling of the model's own settings would be merged in.
    own = [(each, each.generation_config) for each in (model, inner)]
    try:
        for each, _ in own:
            each.generation_config = settings
        with torch.no_grad():
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                **({} if noise is None else {"logits_processor": LogitsProcessorList([noise])}),
                **({} if streamer is None else {"streamer": streamer}),
            )
    finally:
        for each, before in own:
            each.generation_config = before
    return output[:, ids.shape[1] :]


def _left_padded(
    prompts: list[Tensor], padding: int
) -> tuple[Int[Tensor, "example token"], Int[Tensor, "example token"]]:
    """Return ids and attention mask; padding goes to the left, so that every answer starts in the same column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Return ids that end an answer, by the model's and the tokenizer's own account; empty if neither names one."""
    settings: Any = getattr(loaded.model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (*named, getattr(loaded.tokenizer, "eos_token_id", None)) if token is not None})
