"""The table of tiny models that every gradient test runs over: random weights, real architectures."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from vestige.data import NO_TARGET, Batch

VOCABULARY = 37


def gpt2(tied: bool = True) -> nn.Module:
    """Conv1D weights, learned positions shared by the batch, LayerNorm with bias, tied embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def llama(tied: bool = False) -> nn.Module:
    """Grouped-query attention, RMSNorm, gated MLP, rotary positions."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def neox() -> nn.Module:
    """Parallel residual, fused query-key-value with bias, separate output embedding."""
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def opt() -> nn.Module:
    """Shifted learned positions, a padding row in the embedding, tied, ReLU."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tied=False),
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "neox": neox,
    "opt": opt,
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of the table, in evaluation mode, every weight (norms and biases too) moved off its special start."""
    torch.manual_seed(seed)
    model = CAUSAL[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().to(dtype)


class Sequences(NamedTuple):
    """Token ids and target masks of uneven lengths."""

    ids: list[torch.Tensor]
    targets: list[torch.Tensor]

    def batch(self, rows: list[int], extra_padding: int = 0) -> Batch:
        """The rows right-padded with token 3 to the longest, plus `extra_padding`."""
        width = max(len(self.ids[row]) for row in rows) + extra_padding
        tokens = torch.full((len(rows), width), 3)
        labels = torch.full((len(rows), width), NO_TARGET)
        for place, row in enumerate(rows):
            length = len(self.ids[row])
            tokens[place, :length] = self.ids[row]
            labels[place, :length] = torch.where(self.targets[row], self.ids[row], NO_TARGET)
        return Batch(torch.tensor(rows), tokens, labels)


def sequences(count: int = 7, seed: int = 1) -> Sequences:
    """Uneven lengths from 3 to 15 tokens; about a third of the labels masked; one example with a masked prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids, targets = [], []
    for number in range(count):
        length = 3 + (5 * number) % 13
        ids.append(torch.randint(VOCABULARY, (length,), generator=generator))
        mask = torch.rand(length, generator=generator) > 0.35
        mask[0], mask[-1] = False, True
        if number == 1:
            mask[: length // 2] = False
        targets.append(mask)
    return Sequences(ids, targets)
