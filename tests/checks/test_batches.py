"""What the doctor says of a model and a card: budget, estimated peak, and where it does not fit."""

import re

import numpy as np
import pytest

from vestige.checks import check_batches
from vestige.data import Example, TokenizedData
from vestige.gradients import BatchMemory, CardMemory

GB = 10**9
LLAMA_8B = BatchMemory(weights=16 * GB, fixed=3 * GB, per_token=7e6)


def data_of(longest: int) -> TokenizedData:
    ids, targets = np.ones(longest, dtype=np.int32), np.ones(longest, dtype=bool)
    return TokenizedData([Example("a", 0, text="")], [ids], [targets], np.zeros(1, dtype=bool), "f")


@pytest.mark.parametrize(
    ("free", "total", "tokens", "longest", "verdict", "words"),
    [
        (80, 80, 4096, 512, "good", "4,096 tokens at once, about 48 GB at most, with 80 GB free of 80 GB"),
        (141, 141, 12_288, 512, "good", "about 105 GB"),
        (15, 24, 128, 512, "bad", r"the model takes 16 GB.*does not fit.*--quantize 4"),
        (24, 24, 128, 2000, "bad", "longest example, 2,000 tokens, takes about 33 GB: --max-length"),
        (60, 80, 8192, 512, "warn", "halved as they run. Type --token-budget 4096"),
        (24, 24, 128, 256, "warn", "leaves little memory"),
    ],
)
def test_the_check_of_batches(free, total, tokens, longest, verdict, words):
    check = check_batches(LLAMA_8B, CardMemory(free * GB, total * GB), tokens, data_of(longest))
    assert check.verdict == verdict
    assert re.search(words, f"{check.value}. {check.advice}"), check
