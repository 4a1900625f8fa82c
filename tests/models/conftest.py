"""Tiny saved models with a tokenizer of single characters, so that no test needs a network or a real model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from tests.architectures import VOCABULARY, build

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,?:\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ':' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test writes into the user's cache, asks the hub, or takes more than one core."""
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.set_num_threads(1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character; `<s>` is 0, `</s>` is 1."""
    tokens = ["<s>", "</s>", "<unk>", *CHARACTERS]
    assert len(tokens) <= VOCABULARY
    core = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture
def saved(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Saves a model of the table of architectures with its tokenizer; returns the folder."""

    def save(name: str = "llama", dtype: torch.dtype = torch.float32, with_tokenizer: bool = True) -> Path:
        folder = tmp_path / f"{name}-{str(dtype).removeprefix('torch.')}"
        build(name, dtype).save_pretrained(folder)
        if with_tokenizer:
            tokenizer.save_pretrained(folder)
        return folder

    return save
