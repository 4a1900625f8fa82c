import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.workshop import furnish
from vestige.cli import main


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
