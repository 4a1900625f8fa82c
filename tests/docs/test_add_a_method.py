"""The method that docs/how-to/add-a-method.md builds, installed by pip and used as the page says."""

import os
import re
import subprocess
import sys

import pytest

from tests.docs.blocks import ROOT
from tests.workshop import furnish

PAGE = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text()


@pytest.mark.slow
def test_the_method_of_the_page_is_installed_listed_and_scores(tmp_path):
    package = tmp_path / "vestige-letters"
    package.mkdir()
    for name, language in (("pyproject.toml", "toml"), ("vestige_letters.py", "python")):
        (package / name).write_text(re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1])
    words = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *words, str(package)], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    lines = re.search(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()
    assert lines[0].startswith("pip install")
    folder = furnish(tmp_path / "workshop")
    for line in lines[1:]:
        program, *words = line.split()
        assert program == "vestige"
        done = subprocess.run(
            [sys.executable, "-m", "vestige", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert (folder / "run-letters" / "scores.parquet").is_file()
