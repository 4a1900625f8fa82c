"""Training data in several files: the same index from Python, the command line, a config file and two workers."""

from dataclasses import replace
from pathlib import Path

import pytest

import vestige
from tests.workshop import furnish
from vestige.cli import as_function
from vestige.indexes import Index
from vestige.registry import COMMANDS
from vestige.settings import AttributeSettings, IndexSettings


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("files"))
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "a.jsonl").write_text("".join(lines[:7]))
    (folder / "b.jsonl").write_text("".join(lines[7:]))
    return folder


def read(words, config=None, settings=IndexSettings):
    """The settings that a command line comes to."""
    found = []
    name = {IndexSettings: "index", AttributeSettings: "attribute"}[settings]
    with pytest.MonkeyPatch.context() as patch:
        # The names stand for files that are not there.
        patch.setattr("vestige.registry.check_inputs", lambda _: None)
        as_function(replace(COMMANDS.find(name), run=found.append))(**words, **({"config": config} if config else {}))
    return found[0]


@pytest.mark.slow
def test_two_workers_read_the_files_of_a_list_and_leave_the_bytes_of_one_process(place):
    files = [place / "a.jsonl", place / "b.jsonl"]
    for out, workers in (("one", 1), ("two", 2)):
        vestige.index(
            model=place / "tiny-model", data=files, out=place / out, token_budget=60, compress="sjlt:8", workers=workers
        )
    whole = vestige.index(
        model=place / "tiny-model", data=place / "train.jsonl", out=place / "whole", token_budget=60, compress="sjlt:8"
    )
    one, two = Index.open(place / "one"), Index.open(place / "two")
    assert len(one.manifest.shard_rows) > 4
    assert one.fingerprint == two.fingerprint == whole.fingerprint
    assert [one.examples()[row].id for row in (0, 11)] == ["pair-0", "pair-11"]


def test_several_words_for_data_are_files_and_one_word_is_itself(tmp_path):
    words = {"model": "m", "out": tmp_path}
    assert read(words | {"data": ["a.jsonl", "b.jsonl"]}).data == [Path("a.jsonl"), Path("b.jsonl")]
    assert read(words | {"data": ["owner/name"]}).data == "owner/name"
    asked = {"model": "m", "out": tmp_path, "queries": ["One?", "Two?"]}
    found = read(asked | {"data": ["a.jsonl", "b.jsonl"]}, settings=AttributeSettings)
    assert found.queries == ["One?", "Two?"]
    assert found.data == [Path("a.jsonl"), Path("b.jsonl")]


def test_a_config_file_lists_files_or_texts(place, tmp_path):
    files = [place / "a.jsonl", place / "b.jsonl"]
    for given, meant in (([str(file) for file in files], files), (["A text.", "x" * 5000], ["A text.", "x" * 5000])):
        config = tmp_path / "run.yaml"
        config.write_text(f"model: m\nout: {tmp_path}\ndata: {given}\n")
        assert read({}, config).data == meant
