"""The model and the data that every engine of a benchmark gets, drawn from seeds.

Imports nothing of Vestige: the peer's own interpreter reads the same folder with this module.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
SHORTEST, LONGEST, EQUAL = 16, 256, 128
TOPICS = 16
NO_TARGET = -100

COMPONENTS = ("attention", "mlp")
"""What is attributed to: the 42 linear maps inside the blocks, which is all that bergson covers."""


@dataclass(frozen=True)
class Workload:
    """Token sequences; the first `prompts[i]` tokens of example `i` carry no label."""

    name: str
    tokens: list[list[int]]
    prompts: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens per example."""
        return [len(one) for one in self.tokens]

    @property
    def labels(self) -> list[list[int]]:
        """The tokens with `NO_TARGET` in place of the prompt's."""
        return [[NO_TARGET] * skip + one[skip:] for one, skip in zip(self.tokens, self.prompts, strict=True)]

    def rows(self) -> list[dict[str, str]]:
        """The examples as text rows, which the benchmark's tokenizer turns back into the same tokens."""
        rows = []
        for one, skip in zip(self.tokens, self.prompts, strict=True):
            if skip:
                rows.append({"prompt": _text(one[:skip]), "completion": " " + _text(one[skip:])})
            else:
                rows.append({"text": _text(one)})
        return rows


class Padded(NamedTuple):
    """A right-padded batch."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def padded(workload: Workload, rows: list[int]) -> Padded:
    """The batch of some rows; padding is token 0 and carries no label."""
    longest = max(len(workload.tokens[row]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), NO_TARGET)
    for place, row in enumerate(rows):
        one, skip = torch.tensor(workload.tokens[row]), workload.prompts[row]
        ids[place, : len(one)] = one
        labels[place, skip : len(one)] = one[skip:]
    return Padded(ids, labels)


def make_model(seed: int = 0, width: int = 256, layers: int = 6) -> LlamaForCausalLM:
    """A randomly initialised Llama-style model; by default 6 layers, width 256, MLP 688, 6.84 M parameters."""
    torch.manual_seed(seed)
    heads = width // 32
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=round(width * 688 / 256),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, no special tokens: the word `w17` is token 17."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0", model_max_length=512)


def draw_tokens(lengths: list[int], generator: np.random.Generator) -> list[list[int]]:
    """Sequences whose words follow Zipf's law, the frequent ones depending on one of 16 topics."""
    share = 1.0 / np.arange(1, VOCABULARY + 1)
    share /= share.sum()
    orders = [generator.permutation(VOCABULARY) for _ in range(TOPICS)]
    chosen = generator.integers(TOPICS, size=len(lengths))
    return [
        orders[topic][generator.choice(VOCABULARY, size=length, p=share)].tolist()
        for topic, length in zip(chosen, lengths, strict=True)
    ]


def text_tokens(examples: int, length: int, generator: np.random.Generator) -> list[list[int]]:
    """Passages of Python's own help texts, words and signs as tokens, drawn without overlap."""
    words = re.findall(r"\w+|[^\w\s]", "\n".join(topics.topics[name] for name in sorted(topics.topics)))
    ranked = [word for word, _ in Counter(words).most_common(VOCABULARY - 1)]
    numbers = {word: number for number, word in enumerate(ranked, start=1)}
    tokens = [numbers.get(word, 0) for word in words]
    starts = generator.permutation(len(tokens) // length)[:examples] * length
    return [tokens[start : start + length] for start in starts.tolist()]


def draw_workloads(examples: int, seed: int = 1) -> dict[str, Workload]:
    """Uneven lengths, equal lengths, and uneven lengths of which the first half is a masked prompt."""
    generator = np.random.default_rng(seed)
    uneven = generator.integers(SHORTEST, LONGEST + 1, size=examples).tolist()
    tokens = draw_tokens(uneven, generator)
    none = [0] * examples
    return {
        "equal": Workload("equal", draw_tokens([EQUAL] * examples, generator), none),
        "uneven": Workload("uneven", tokens, none),
        "masked": Workload("masked", tokens, [length // 2 for length in uneven]),
    }


def save(folder: Path, model: LlamaForCausalLM, workloads: dict[str, Workload]) -> None:
    """Write what another interpreter needs: model, tokenizer, tokens, and the rows as JSONL."""
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for name, workload in workloads.items():
        content = {"tokens": workload.tokens, "prompts": workload.prompts}
        (folder / f"{name}.json").write_text(json.dumps(content))
        lines = [json.dumps(row) for row in workload.rows()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def load(folder: Path, name: str) -> Workload:
    """A workload that `save` wrote."""
    content = json.loads((folder / f"{name}.json").read_text())
    return Workload(name, content["tokens"], content["prompts"])


def _text(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)
