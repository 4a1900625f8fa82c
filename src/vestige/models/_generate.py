"""The model's answers: greedy continuations of prompts and conversations."""

import hashlib
from collections.abc import Callable, Sequence
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
        on_text: As for `answer_prompts`.

    Raises:
        ModelError: The model cannot generate, or has no tokenizer.
        DataError: A prompt is empty or fills the model's context.
    """
    waiting = [number for number, example in enumerate(examples) if example.lacks_answer]
    answered = list(examples)
    if not waiting:
        return answered
    prompts = [examples[number] for number in waiting]
    answers = answer_prompts(loaded, prompts, max_new_tokens=max_new_tokens, chat=chat, on_text=on_text)
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
        keep: Called with the number of each prompt and its answer as soon as there is one, batch by batch.
        on_text: Of a single prompt: called with the answer so far after each of its tokens.

    Raises:
        ModelError: The model cannot generate, or has no tokenizer.
        DataError: A prompt is empty or fills the model's context.
    """
    prompts = _prompts(loaded, list(examples), chat)
    most = _budgets(loaded, prompts, max_new_tokens)
    found: dict[int, Answer] = {}
    with progress(len(prompts), "Generating answers", unit="prompts") as counter:
        # Prompts that are continued together are as long as the longest of them, and grow on the way.
        alone = acts_in_forward(loaded.model) or batch_sharing(loaded.model) != Sharing()
        for rows in plan_batches(prompts.lengths + most, _BATCH_TOKENS, 1 if alone else _BATCH_EXAMPLES):
            for row, answer in zip(
                rows.tolist(), _answers(loaded, prompts, rows, most, temperature, seeds, on_text), strict=True
            ):
                found[row] = answer
                if keep is not None:
                    keep(row, answer)
            counter.advance(len(rows))
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


def _answers(
    loaded: LoadedModel,
    prompts: TokenizedData,
    rows: Int[np.ndarray, "row"],
    most: Int[np.ndarray, "example"],
    temperature: float,
    seeds: Sequence[int],
    on_text: Callable[[str], None] | None,
) -> list[Answer]:
    """Return answers to some prompts, generated together.

    The longest of them may fill the context before a shorter one has ended: those go on without it.
    """
    ids = {row: torch.as_tensor(prompts.input_ids[row], dtype=torch.int64) for row in rows.tolist()}
    tokenizer: Any = loaded.tokenizer
    new: dict[int, list[int]] = {row: [] for row in ids}
    ended: set[int] = set()
    while going := [row for row in ids if row not in ended and len(new[row]) < most[row]]:
        soon = max(int(most[row]) - len(new[row]) for row in going)
        whole = [torch.cat([ids[row], torch.tensor(new[row], dtype=torch.int64)]) for row in going]
        if loaded.context_length is not None:
            soon = min(soon, loaded.context_length - max(map(len, whole)))
        noise = None
        if temperature > 0:
            first, width = [len(new[row]) for row in going], max(map(len, whole))
            noise = _GumbelNoise(temperature, [seeds[row] for row in going], first, width)
        listener = None
        if on_text is not None and len(prompts) == 1:
            listener = _Listener(tokenizer, ids[going[0]].tolist(), new[going[0]], on_text)
        for row, tokens in zip(going, _continue(loaded, whole, soon, noise, listener), strict=True):
            if len(tokens) < soon and len(new[row]) + len(tokens) < most[row]:
                ended.add(row)
            new[row] = (new[row] + tokens)[: most[row]]
    return [Answer(_text(tokenizer, ids[row].tolist(), new[row]), len(new[row]), row in ended) for row in ids]


class _Listener:
    """Passes on the tokens of one answer while they come: what `generate` calls its streamer."""

    def __init__(self, tokenizer: Any, prompt: list[int], new: list[int], on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._prompt, self._new, self._on_text = tokenizer, prompt, list(new), on_text

    def put(self, value: Tensor) -> None:
        """Take the prompt [example, token], which comes first, or the next token [example]."""
        if value.ndim == 1:
            self._new += value.tolist()
            self._on_text(_text(self._tokenizer, self._prompt, self._new))

    def end(self) -> None:
        """Take the end of the answer."""


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
    listener: _Listener | None = None,
) -> list[list[int]]:
    """Return the token ids that follow each prompt, without the end token."""
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
                **({} if listener is None else {"streamer": listener}),
            )
    finally:
        for each, before in own:
            each.generation_config = before
    rows = output[:, ids.shape[1] :].tolist()
    return [tokens[: next((at for at, token in enumerate(tokens) if token in ends), None)] for tokens in rows]


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


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Return the answer as it continues the prompt's text: a tokenizer may drop the space before a first word."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = text(prompt), text(prompt + new)
    return whole.removeprefix(before) if whole.startswith(before) else text(new)
