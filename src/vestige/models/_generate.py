"""What the model answers: greedy continuations of prompts and conversations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig

from vestige.data import Example, Message, TokenizedData, plan_batches, tokenize
from vestige.errors import DataError, ModelError
from vestige.models._types import LoadedModel
from vestige.progress import progress

_BATCH_TOKENS = 4096
_BATCH_EXAMPLES = 32


def generate_answers(
    loaded: LoadedModel, examples: Sequence[Example], *, max_new_tokens: int = 64, chat: bool = False
) -> list[Example]:
    """The same examples, each prompt with the model's own most likely answer as its completion.

    Greedy, so the same model and prompt give the same answer, alone or in a batch. An answer ends before the end
    token, or after `max_new_tokens` (sooner if the context is full). Examples that have an answer already, and plain
    texts, are returned as they are; `messages` get one more assistant turn.

    Args:
        loaded: A model with a tokenizer.
        examples: Queries, as `load_queries` returns them.
        max_new_tokens: Most tokens of an answer.
        chat: Put a prompt into the tokenizer's chat template as a user turn.

    Raises:
        ModelError: The model cannot generate, or has no tokenizer.
        DataError: A prompt is empty or fills the model's context.
    """
    waiting = [number for number, example in enumerate(examples) if _awaits_answer(example)]
    answered = list(examples)
    if not waiting:
        return answered
    prompts = _prompts(loaded, [examples[number] for number in waiting], chat)
    batches = plan_batches(prompts.lengths + max_new_tokens, _BATCH_TOKENS, _BATCH_EXAMPLES)
    with progress(len(waiting), "Generating answers", unit="prompts") as counter:
        for rows in batches:
            for row, answer in zip(rows, _answers(loaded, prompts, rows, max_new_tokens), strict=True):
                answered[waiting[row]] = _with_answer(prompts.examples[row], answer)
            counter.advance(len(rows))
    return answered


def _awaits_answer(example: Example) -> bool:
    if example.messages:
        return example.messages[-1].role != "assistant"
    return example.prompt is not None and example.completion is None


def _prompts(loaded: LoadedModel, examples: list[Example], chat: bool) -> TokenizedData:
    if loaded.tokenizer is None or not hasattr(loaded.model, "generate"):
        lacking = "tokenizer" if loaded.tokenizer is None else "`generate` method"
        raise ModelError(
            f"{loaded.name} has no {lacking}, so it cannot answer the {len(examples)} prompts that have no completion. "
            "Give each query the completion that is to be explained."
        )
    prompts = tokenize(examples, loaded.tokenizer, max_length=None, name="prompts", chat=chat)
    limit = loaded.context_length
    for example, length in zip(examples, prompts.lengths, strict=True):
        if length == 0 or (limit is not None and length >= limit):
            room = "at least 1 token" if length == 0 else f"fewer than the model's {limit} tokens"
            raise DataError(f"The prompt of query {example.id!r} has {length} tokens; to be answered it needs {room}.")
    return prompts


def _answers(loaded: LoadedModel, prompts: TokenizedData, rows: np.ndarray, max_new_tokens: int) -> list[str]:
    tokenizer: Any = loaded.tokenizer
    ids = [torch.as_tensor(prompts.input_ids[row], dtype=torch.int64) for row in rows]
    # plan_batches puts the longest first; a batch may then use only as much context as that one leaves.
    if loaded.context_length is not None:
        max_new_tokens = min(max_new_tokens, loaded.context_length - len(ids[0]))
    new = _continue(loaded, ids, max_new_tokens)
    return [_text(tokenizer, prompt.tolist(), tokens) for prompt, tokens in zip(ids, new, strict=True)]


def _continue(loaded: LoadedModel, prompts: list[Tensor], max_new_tokens: int) -> list[list[int]]:
    """Token ids that follow each prompt, without the end token."""
    # A PEFT wrapper would hand its own generation settings on; the model inside has the adapter in its layers.
    model: Any = getattr(loaded.model, "get_base_model", lambda: loaded.model)()
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
    own, model.generation_config = model.generation_config, settings
    try:
        with torch.no_grad():
            output = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
    finally:
        model.generation_config = own
    return [_until_end(tokens, ends) for tokens in output[:, ids.shape[1] :].tolist()]


def _left_padded(
    prompts: list[Tensor], padding: int
) -> tuple[Int[Tensor, "example token"], Int[Tensor, "example token"]]:
    """Ids and attention mask; padding goes to the left, so that every answer starts in the same column."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), padding)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _end_tokens(loaded: LoadedModel) -> list[int]:
    """Ids that end an answer, by the model's and the tokenizer's own account; empty if neither names one."""
    settings: Any = getattr(loaded.model, "generation_config", None)
    own = getattr(settings, "eos_token_id", None)
    named = own if isinstance(own, list) else [own]
    return sorted({token for token in (*named, getattr(loaded.tokenizer, "eos_token_id", None)) if token is not None})


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))]


def _text(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The answer as it continues the prompt's text: a tokenizer may drop the space before a first word."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, whole = text(prompt), text(prompt + new)
    return whole.removeprefix(before) if whole.startswith(before) else text(new)


def _with_answer(example: Example, answer: str) -> Example:
    if example.messages:
        return replace(example, messages=(*example.messages, Message("assistant", answer)))
    return replace(example, completion=answer)
