"""Every command and every Python snippet of README.md, docs/ and recipes/ runs, beside a tiny model and its data.

A block after `<!-- not run: reason -->` is only checked for words that Vestige would not understand, and shows up as
skipped with its reason.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch

from tests.docs.blocks import PAGES, ROOT, Block, blocks
from tests.workshop import furnish
from vestige.cli import build_app, main
from vestige.registry import COMMANDS

EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]
SET_ASIDE = [block for block in EVERY_BLOCK if block.reason is not None]
OUTSIDE = ("make", "pip", "python", "python3", "cd", "git", "source")
"""Commands that are not Vestige's: only `make` is looked at, for targets that are not there."""


def where(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_says_to_type_runs_from_top_to_bottom(page, tmp_path, monkeypatch, capfd):
    to_run = [block for block in blocks(page) if block.reason is None]
    if not to_run:
        pytest.skip("nothing to type on this page")
    torch.set_num_threads(1)
    monkeypatch.chdir(furnish(tmp_path / "workshop"))
    names: dict[str, object] = {}
    for block in to_run:
        if block.language == "python":
            exec(compile(block.body, where(block), "exec"), names)
        for command in block.commands:
            if command.startswith("vestige "):
                run_vestige(command, block, capfd)


def run_vestige(command: str, block: Block, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    status: object = 0
    try:
        main(shlex.split(command)[1:])
    except SystemExit as exit_:
        status = exit_.code
    assert not status, f"{where(block)}: {command}\n{capfd.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [command.name for command in COMMANDS if command.examples])
def test_the_examples_of_a_command_run_in_their_order(name, tmp_path, monkeypatch, capfd):
    torch.set_num_threads(1)
    monkeypatch.chdir(furnish(tmp_path / "workshop"))
    Path("HuggingFaceTB").mkdir()
    Path("tiny-model").rename("HuggingFaceTB/SmolLM2-135M-Instruct")
    for example in COMMANDS.find(name).examples:
        run_vestige(example, Block(f"vestige {name} --help", 0, "console", "", None), capfd)


@pytest.mark.parametrize("block", SET_ASIDE, ids=where)
def test_a_block_that_is_not_run_would_be_understood(block):
    if block.language == "python":
        compile(block.body, where(block), "exec")
    for command in block.commands:
        if command.startswith("vestige "):
            build_app().parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    pytest.skip(f"not run: {block.reason}")


@pytest.mark.parametrize("block", EVERY_BLOCK, ids=where)
def test_every_command_is_known(block):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in block.commands:
        program, *words = shlex.split(command)
        assert program == "vestige" or program.split("/")[-1] in OUTSIDE, f"{where(block)}: {command}"
        if program == "make":
            assert set(words) <= targets, f"{where(block)}: {command}"


def test_blocks_are_found_with_continuations_and_reasons(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n$ vestige index --model m \\\n    --data d\noutput\n```\n"
        "\n<!-- not run: takes an hour -->\n```console\n$ make demo\n```\n```python\nx = 1\n```\n```\n$ no\n```\n"
    )
    first, second, third = blocks(page)
    assert first.commands == ["vestige index --model m --data d"]
    assert (first.line, first.reason) == (1, None)
    assert (second.commands, second.reason) == (["make demo"], "takes an hour")
    assert (third.language, third.body, third.reason) == ("python", "x = 1\n", None)


def test_a_command_that_fails_fails_the_test(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    block = Block("page.md", 7, "console", "$ vestige report nowhere\n", None)
    with pytest.raises(AssertionError, match=r"page.md:7: vestige report nowhere\n.*nowhere"):
        run_vestige(block.commands[0], block, capfd)


def test_the_page_of_the_command_line_is_what_the_settings_say():
    import runpy

    generated = runpy.run_path(str(Path(ROOT / "docs" / "generate_cli.py")))["page"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generated, "run: python docs/generate_cli.py"
