"""The search for verbatim text, kept with an index: suffix arrays of all training tokens, part by part."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from vestige.data import SuffixArray, TokenizedData, TokenSearch
from vestige.jobs import PieceFiles, cut_ranges, run_pieces, tensor_pieces
from vestige.lazy import torch
from vestige.progress import announce, format_bytes, format_seconds
from vestige.settings import LaunchSettings
from vestige.storage import check_disk

if TYPE_CHECKING:
    from torch import Tensor

VERBATIM = "verbatim"
"""Folder of the suffix arrays in an index."""
PART_TOKENS = 2**24
"""Tokens of a part, unless a row alone has more: 0.75 GB of memory while it is sorted."""
_FORMAT = 1
_NAMES = ("text", "order", "starts")
_TOKENS_A_SECOND = 2.5e6
"""16 million took 6.5 s on a core of an Intel Xeon (`benchmarks/verbatim.py`), one million 0.2 s."""


def open_search(
    folder: Path, data: TokenizedData, vocabulary: int | None, *, part_tokens: int = PART_TOKENS
) -> TokenSearch:
    """Return the search over all tokens of the data; what is not in the folder yet is built there.

    Interrupted, the same call goes on with the next part. What was built from other tokens does not count, and is built
    again. The arrays stay on the disk, mapped into memory.

    Args:
        folder: Of the suffix arrays alone.
        data: The training data as the model receives it.
        vocabulary: How many tokens there are; None where that is not known.
        part_tokens: Of a part.

    Raises:
        DiskSpaceError: They do not fit on the disk.
    """
    largest = 2**32 - 2 if vocabulary is None else vocabulary - 1
    parts = cut_ranges(data.lengths.tolist(), part_tokens)
    made_of = [_FORMAT, largest, [0, *(rows.stop for rows in parts)], data.fingerprint]
    files = PieceFiles(folder, hashlib.sha256(json.dumps(made_of).encode()).hexdigest())
    weights = [int(data.lengths[rows.start : rows.stop].sum()) for rows in parts]
    files.forget_damaged(range(len(weights)))
    if left := sum(weight for part, weight in enumerate(weights) if not files.is_done(part)):
        size = left * (6 if largest + 1 < 2**16 else 8)
        check_disk(folder, size)
        announce(
            f"Verbatim search: {left:,} tokens are sorted, about {format_seconds(left / _TOKENS_A_SECOND)}, "
            f"{format_bytes(size)} of disk in {folder}."
        )

    def build(part: int) -> dict[str, Tensor]:
        made = SuffixArray.build((data.input_ids[row] for row in parts[part]), largest)
        text = made.text.view(np.uint8).reshape(-1, made.text.itemsize)
        return {
            name: torch.from_numpy(each) for name, each in zip(_NAMES, (text, made.order, made.starts), strict=True)
        }

    def open_parts(_: object) -> TokenSearch:
        # Mapped, and not read whole.
        return TokenSearch([_map(files.path(part)) for part in range(len(weights))])

    pieces = tensor_pieces("Verbatim search", files, weights, lambda: nullcontext(build), open_parts, unit="tokens")
    return run_pieces(pieces, LaunchSettings.model_validate({}), None)


def _map(path: Path) -> SuffixArray:
    with safe_open(path, framework="pt") as file:
        text, order, starts = (file.get_tensor(name).numpy() for name in _NAMES)
        return SuffixArray(text.reshape(-1).view(f">u{text.shape[1]}"), order, starts)
