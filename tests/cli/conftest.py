import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.workshop import PAIRS, furnish
from vestige.cli import main
from vestige.registry import COMMANDS
from vestige.settings import Settings


class Outcome(NamedTuple):
    """What a person sees after a command."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("workshop") / "template")


@pytest.fixture
def workshop(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder with `tiny-model/`, `train.jsonl` and `questions.jsonl`, which is the current one."""
    folder = tmp_path / "here"
    shutil.copytree(furnished, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def vestige(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command line in this process; an exception that the command line would show as a traceback comes out."""

    def run(*words: str) -> Outcome:
        capfd.readouterr()
        status: object = 0
        try:
            main(list(words))
        except SystemExit as exit_:
            status = exit_.code
        assert isinstance(status, int)
        return Outcome(status, *capfd.readouterr())

    return run


@pytest.fixture
def settings_of(vestige: Callable[..., Outcome]) -> Callable[..., Settings]:
    """The settings that a command line arrives at, without looking for its inputs and without running the command."""

    def parse(name: str, *words: str) -> Settings:
        caught: list[Settings] = []
        with pytest.MonkeyPatch.context() as patch:
            command = replace(COMMANDS.find(name), run=caught.append)
            patch.setattr(COMMANDS, "find", lambda _: command)
            patch.setattr("vestige.registry.check_inputs", lambda _: None)
            outcome = vestige(name, *words)
        assert outcome.status == 0, outcome.err
        return caught[0]

    return parse


@pytest.fixture(scope="session")
def indexed(furnished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished index of the workshop's data, to be copied."""
    folder = tmp_path_factory.mktemp("indexed") / "idx"
    main([*index_words(furnished), "--out", str(folder)])
    return folder


@pytest.fixture
def idx(workshop: Path, indexed: Path) -> Path:
    """A finished index in the current folder, under the name `idx`."""
    shutil.copytree(indexed, workshop / "idx")
    return workshop / "idx"


def index_words(folder: Path = Path()) -> list[str]:
    return ["index", "--model", str(folder / "tiny-model"), "--data", str(folder / "train.jsonl")]


def contents(folder: Path) -> dict[str, str]:
    """What is in a folder, file by file, but for the job's own record, which tells of times and processes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "launch" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def spoil(folder: Path, name: str, rows: list[int]) -> None:
    """Put a NaN into rows of a weight, as a broken training run leaves them."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name][rows] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


def tokens_only_in(name: str) -> list[int]:
    """Token ids that one example of the training data has and the others have not."""
    tokenizer = AutoTokenizer.from_pretrained("tiny-model")
    used = {f"pair-{number}": set(tokenizer(f"{one}{two}").input_ids) for number, (one, two, _) in enumerate(PAIRS)}
    return sorted(used[name].difference(*(tokens for other, tokens in used.items() if other != name)))
