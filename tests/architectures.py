"""The table of tiny models that every gradient test runs over: random weights, real architectures."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vestige.data import NO_TARGET, Batch

VOCABULARY = 37
PLAIN = "plain"


def plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention product by product, as transformers' eager one, but for its softmax in float32.

    How float32 rounds a softmax depends on the shape of the batch and on the processor, so float64 would not tell.
    """
    key, value = (one.repeat_interleave(module.num_key_value_groups, 1) for one in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(PLAIN, plain_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PLAIN, eager_mask)


def gpt2(tied: bool = True, attention: str = "sdpa") -> nn.Module:
    """Conv1D weights, learned positions shared by the batch, LayerNorm with bias, tied embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=32,
            n_embd=16,
            n_layer=2,
            n_head=2,
            tie_word_embeddings=tied,
            attn_implementation=attention,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def llama(tied: bool = False, attention: str = "sdpa") -> nn.Module:
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
            attn_implementation=attention,
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


def lora() -> nn.Module:
    """LoRA matrices of rank 3 beside attention and feed-forward weights of a Llama."""
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is about to go
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(llama(), settings)


def mixtral(experts: str = "batched_mm") -> nn.Module:
    """Four experts in one parameter, two a token; a router with a weight and no Linear."""
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
            experts_implementation=experts,
        )
    )


def qwen_moe() -> nn.Module:
    """Experts beside a shared expert with its own gate; the first layer is dense."""
    return Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_experts=5,
            num_experts_per_tok=2,
            mlp_only_layers=[0],
            experts_implementation="eager",
            max_position_embeddings=32,
        )
    )


def gpt_oss() -> nn.Module:
    """Experts stored transposed, with biases, gate and up interleaved; attention sinks have no rule."""
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=32,
            pad_token_id=2,
            eos_token_id=1,
            experts_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
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

EXACT: dict[str, Callable[[], nn.Module]] = CAUSAL | {
    "gpt2-eager": lambda: gpt2(attention="eager"),
    "llama-eager": lambda: llama(attention=PLAIN),
    "llama-lora": lora,
    "mixtral": mixtral,
    "mixtral-eager": lambda: mixtral("eager"),
    "qwen-moe": qwen_moe,
    "gpt-oss": gpt_oss,
}
"""Every causal model whose gradients are checked."""


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model of the table, in evaluation mode, every weight (norms and biases too) moved off its special start."""
    torch.manual_seed(seed)
    return move_off_start(EXACT[name]()).eval().to(dtype)


def enable_checkpointing(model: Any, **options: Any) -> None:
    """Let the layers compute their activations twice; transformers has renamed the switch."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(options or None)


def move_off_start(model: nn.Module) -> nn.Module:
    """The model with noise on every weight: ones and zeros of norms and biases would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


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
