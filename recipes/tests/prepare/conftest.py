import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.workshop import furnish

from prepare.server import Endpoint

TEXTS = [f"Who lives in house {number}?" for number in range(12)]


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A server that the environment points to; failed requests are sent again soon."""
    pytest.importorskip("openai")
    monkeypatch.setattr("vestige_recipes.prepare.endpoint.FIRST_DELAY", 0.02)
    with Endpoint() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.address)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
        yield server


@pytest.fixture
def questions() -> list[dict[str, Any]]:
    return [{"id": f"q{row}", "prompt": text, "completion": "Nobody."} for row, text in enumerate(TEXTS)]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("prepare") / "workshop")


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of a file of JSON lines."""

    def read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return read
