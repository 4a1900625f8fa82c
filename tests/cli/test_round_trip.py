"""Settings that become a command, as a worker and a person type it, are read from it as they were."""

import shlex
from pathlib import Path

import pytest

from vestige.errors import SpecError, UserError
from vestige.indexes import index
from vestige.jobs import worker_command
from vestige.settings import AttributeSettings, IndexSettings, LaunchSettings


@pytest.mark.parametrize(
    "given",
    [
        {"out": Path("-o"), "setup": "-x", "engine": "slurm"},
        {"out": Path("idx"), "components": ("-x", "--y", "mlp")},
        {"out": Path("--overwrite"), "model": "-m"},
    ],
)
def test_values_that_begin_as_flags_do(given, settings_of):
    settings = IndexSettings(**({"model": "m", "data": "d.jsonl"} | given))
    assert settings_of(*shlex.split(settings.command_line("index"))[1:]) == settings


def test_questions_and_options_too(settings_of):
    settings = AttributeSettings(
        index="idx", queries="-1 + 2 = ?", out=Path("-o"), method="datainf", options={"-a": "-b", "labels": None}
    )
    found = settings_of(*shlex.split(settings.command_line("attribute"))[1:])
    assert found.queries == "-1 + 2 = ?"
    assert found.options == {"-a": "-b", "labels": "none"}


@pytest.mark.parametrize("data", [["text a", "text b"], ["train.jsonl"]])
def test_a_list_of_texts_never_becomes_names_of_files(data, workshop):
    settings = IndexSettings(model="tiny-model", data=data, out=Path("idx"), workers=2)
    assert worker_command(settings, "index") is None
    with pytest.raises(UserError, match="or as a list of texts"):
        index(**settings.arguments())
    paths = IndexSettings(model="m", data=[Path("a.jsonl"), Path("b.jsonl")], out=Path("idx"))
    assert worker_command(paths, "index")[3:] == shlex.split("index --model m --data a.jsonl --data b.jsonl --out idx")


@pytest.mark.parametrize("name", ["data", "model", "out", "tokenizer"])
def test_an_empty_text_is_no_path(name):
    given = {"model": "m", "data": "d.jsonl", "out": Path("idx")} | {name: ""}
    with pytest.raises(SpecError, match=f"--{name} is empty"):
        IndexSettings(**given)


@pytest.mark.parametrize("name", ["partition", "account", "gres", "time", "mem", "setup", "container"])
def test_settings_of_slurm_without_it_are_refused(name):
    with pytest.raises(SpecError, match=f"--{name} has no effect without --engine slurm"):
        LaunchSettings(**{name: "x"})
