from pathlib import Path

import pytest

from tests.workshop import furnish


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("prepare") / "workshop")
