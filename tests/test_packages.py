"""What is handed out: wheels and source distributions that work outside the clone, and the Dockerfile."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"vestige": (ROOT, "src/vestige"), "vestige_recipes": (ROOT / "recipes", "src/vestige_recipes")}


def tracked(project: Path, folder: str) -> set[str]:
    """Files of the package that git knows, by their path in the package's folder's parent."""
    done = subprocess.run(["git", "ls-files", folder], cwd=project, capture_output=True, text=True, check=True)
    return {name.removeprefix("src/") for name in done.stdout.splitlines()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with a wheel and a source distribution of either package."""
    pytest.importorskip("hatchling", reason="hatchling, of the group `dev`, builds the packages")
    folder = tmp_path_factory.mktemp("dist")
    for project, _ in PACKAGES.values():
        words = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
        subprocess.run(words, cwd=project, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def outside(built, tmp_path_factory):
    """Run the words of a command in an environment that has the wheels and borrows their dependencies."""
    folder = tmp_path_factory.mktemp("outside")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "zz_borrowed.pth").write_text("\n".join(borrowed) + "\n")
    words = ["--quiet", "--no-deps", "--no-index", "--ignore-installed", *map(str, built.glob("*.whl"))]
    subprocess.run([python, "-m", "pip", "install", *words], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(folder / "venv" / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_wheel_and_source_hold_every_file_of_the_package(built, name):
    wanted = tracked(*PACKAGES[name])
    [wheel], [source] = built.glob(f"{name}-*.whl"), built.glob(f"{name}-*.tar.gz")
    assert {each for each in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in each} == wanted
    with tarfile.open(source) as archive:
        names = {each.split("/", 1)[1] for each in archive.getnames() if "/" in each}
    assert {f"src/{each}" for each in wanted} | {"pyproject.toml", "README.md"} <= names
    assert not [each for each in names if each.startswith((".venv", ".git/", "demo-output", "site/"))]


@pytest.mark.slow
def test_the_first_block_of_the_readme_runs_outside_the_clone(outside):
    where = outside(
        "python", "-c", "import vestige, vestige_recipes; print(vestige.__file__, vestige_recipes.__file__)"
    )
    assert str(ROOT) not in where.stdout, where.stdout + where.stderr
    [block] = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[:1]
    first, *printed = block.splitlines()
    done = outside(*first.removeprefix("$ ").split())
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in printed if line.strip()][:4] == [
        line.strip() for line in done.stdout.splitlines() if line.strip()
    ][:4]
    assert outside("vestige", "report", "demo-run/run").returncode == 0
    helped = outside("vestige", "--help").stdout
    assert re.search(r"^.*attribute +\w", helped, re.MULTILINE)
    assert re.search(r"^.*sweep +\w", helped, re.MULTILINE), "a command of vestige-recipes"


def test_the_dockerfile_copies_what_is_there_and_installs_extras_that_there_are():
    text = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for path in line.split()[:-1]:
            assert (ROOT / path).exists(), path
            assert f"!{path}\n" in ignored, path
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [given] = re.findall(r"^ARG EXTRAS=(\S+)$", text, re.MULTILINE)
    assert set(given.split(",")) <= extras.keys()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE)
    assert set(stages) == {"cpu", "cuda"}
    assert set(re.findall(r"^ARG BASE=(\w+)$", text, re.MULTILINE)) <= set(stages)
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert set(re.findall(r"--build-arg BASE=(\w+)", page)) <= set(stages)
    assert set(re.findall(r"--build-arg (\w+)=", page)) <= {"BASE", "EXTRAS"}
