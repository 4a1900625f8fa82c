"""How large a batch may be on a card: measured without one, on the meta device and with a memory that is only named."""

from functools import cache

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tests.architectures import llama
from vestige.errors import UserError
from vestige.gradients import (
    BatchMemory,
    CardMemory,
    FittingBatches,
    card_memory,
    logit_bytes_on,
    measure_batch_memory,
)

GB = 10**9
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}
"""Of Llama 3.2 1B and Llama 3.1 8B."""


class Unpacked(TorchDispatchMode):
    """Answers the one question about values that transformers asks: whether sequences are packed. They are not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


def card_of(memory: int, free: int, monkeypatch) -> torch.device:
    """A card that is only named, with this much memory."""
    properties = type("Properties", (), {"total_memory": memory})()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
    return torch.device("cuda", 0)


@cache
def measure_shape(name: str, logit_bytes: int) -> BatchMemory:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=128_256, max_position_embeddings=131_072, **heads, **SHAPES[name])
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    with Unpacked():
        return measure_batch_memory(model, whole_logits=False, logit_bytes=logit_bytes)


@pytest.mark.slow
def test_budgets_of_1b_and_8b_on_cards_of_24_80_and_141_gb(monkeypatch):
    found = {}
    for name in SHAPES:
        for size in (24, 80, 141):
            device = card_of(size * GB, size * GB, monkeypatch)
            memory = measure_shape(name, logit_bytes_on(device))
            tokens = memory.tokens_within(torch.cuda.mem_get_info(device)[0])
            found[name, size] = tokens
            print(f"{name} on {size} GB: {tokens:,} tokens, {memory.peak(tokens) / GB:.1f} GB")
            assert memory.peak(tokens) <= 0.8 * size * GB
            # The next larger budget would not fit.
            assert memory.peak(tokens * 3 // 2) > 0.8 * size * GB or tokens == 65_536
    assert found == {
        ("1B", 24): 6144,
        ("1B", 80): 24_576,
        ("1B", 141): 49_152,
        ("8B", 24): 256,
        ("8B", 80): 4096,
        ("8B", 141): 12_288,
    }


def test_the_probe_counts_what_a_pass_holds():
    """Against PyTorch's own count of what autograd keeps for the backward pass, by another mechanism."""
    model = llama()
    memory = measure_batch_memory(model, logit_bytes=2**20)
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    sizes = []
    for examples in (8, 16):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            inputs = model.get_input_embeddings()(torch.ones(examples, 16, dtype=torch.long)).requires_grad_()
            alive = model.model(inputs_embeds=inputs, use_cache=False)
        sizes.append(sum(size for key, size in kept.items() if key not in weights))
        del alive
    saved = (sizes[1] - sizes[0]) / (8 * 16)
    print(f"{saved:,.0f} bytes a token saved by autograd, {memory.per_token:,.0f} by the probe")
    assert saved <= memory.per_token <= 3 * saved
    assert memory.weights == sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert memory.peak(1000) - memory.peak(0) == pytest.approx(1000 * memory.per_token, abs=1)


def test_a_budget_is_zero_where_the_model_leaves_nothing():
    memory = BatchMemory(weights=16 * GB, fixed=GB, per_token=7e6)
    assert memory.tokens_within(16 * GB) == 0
    assert memory.tokens_within(24 * GB) == 256
    assert memory.tokens_within(1000 * GB) == 65_536


def test_a_card_of_little_memory_has_smaller_chunks_of_logits(monkeypatch):
    sizes = {size: logit_bytes_on(card_of(size * GB, GB, monkeypatch)) for size in (2, 24, 80, 141)}
    assert sizes == {2: 64 * 2**20, 24: 24 * GB // 64, 80: 2**30, 141: 2**30}
    assert logit_bytes_on(torch.device("cpu")) == 64 * 2**20


def test_a_model_on_the_cpu_has_no_card(monkeypatch):
    assert card_memory(llama()) is None
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(torch.nn.Parameter, "device", card_of(24 * GB, 3 * GB, monkeypatch))
    assert card_memory(model) == CardMemory(3 * GB, 24 * GB)


def full_above(tokens: int, lengths: np.ndarray, calls: list[int]):
    """A pass on a card that holds this many tokens."""

    def compute(rows):
        calls.append(len(rows))
        if len(rows) * int(lengths[rows].max()) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        return rows

    return compute


def test_out_of_memory_halves_the_batch_and_is_remembered(capsys):
    lengths, calls = np.array([9, 8, 8, 7, 4, 4, 4, 3]), []
    fitting = FittingBatches(lengths)
    parts = fitting.run(np.arange(8), full_above(20, lengths, calls))
    assert np.concatenate(parts).tolist() == list(range(8))
    assert calls == [8, 4, 2, 2, 4]
    assert max(len(part) * lengths[part].max() for part in parts) <= 18
    note = capsys.readouterr().err
    assert "Out of memory with a batch of 8 examples, 72 tokens" in note
    assert "--token-budget 36" in note
    calls.clear()
    fitting.run(np.arange(8), full_above(20, lengths, calls))
    assert calls == [2, 2, 4], "what did not fit is not tried again"
    assert "Out of memory" not in capsys.readouterr().err


def test_one_example_that_does_not_fit_says_what_to_type():
    lengths = np.array([900])
    with pytest.raises(UserError, match=r"one example of 900 tokens.*--max-length.*Tried to allocate 2.00 GiB\.$"):
        FittingBatches(lengths).run(np.arange(1), full_above(20, lengths, []))


def test_any_other_error_is_left_alone():
    def fail(rows):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        FittingBatches(np.ones(2)).run(np.arange(2), fail)
