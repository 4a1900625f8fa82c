"""The text of each token, such that the pieces put together are the text."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

_UNFINISHED = "�"


class Decoder(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Return the text of some tokens."""
        ...


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
