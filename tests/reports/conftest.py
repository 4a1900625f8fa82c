import shutil
from pathlib import Path

import pytest

from tests.reports.fixture_run import write_fixture_run

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
not_opened: list[str] = []


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fixture_run(tmp_path_factory.mktemp("report") / "demo-run")


@pytest.fixture
def chromium(request: pytest.FixtureRequest) -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        not_opened.append(request.node.nodeid)
        pytest.skip("Chromium is not installed")
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not_opened:
        terminalreporter.section("the report page was NOT opened in a browser", yellow=True)
        terminalreporter.line(f"{len(not_opened)} tests need Chromium: apt-get install chromium")
