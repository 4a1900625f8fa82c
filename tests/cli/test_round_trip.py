"""Settings that become a command, as a worker and a person type it, are read from it as they were."""

import shlex
from pathlib import Path

import pytest

from vestige.cli._app import build_app
from vestige.cli._command import _typed_in
from vestige.errors import SpecError, UserError
from vestige.launch import require_command, worker_command
from vestige.settings import AttributeSettings, IndexSettings, LaunchSettings


def _parsed(settings, verb):
    words = shlex.split(settings.command_line(verb))[1:]
    _, bound, _ = build_app().parse_args(words, exit_on_error=False, print_error=False)
    return type(settings)(**{name: _typed_in(type(settings), name, value) for name, value in bound.arguments.items()})


@pytest.mark.parametrize(
    "given",
    [
        {"out": Path("-o"), "setup": "-x", "engine": "slurm"},
        {"out": Path("idx"), "components": ("-x", "--y", "mlp")},
        {"out": Path("--overwrite"), "model": "-m"},
    ],
)
def test_values_that_begin_as_flags_do(given):
    settings = IndexSettings(**({"model": "m", "data": "d.jsonl"} | given))
    assert _parsed(settings, "index") == settings


def test_questions_and_options_too():
    settings = AttributeSettings(
        index="idx", queries="-1 + 2 = ?", out=Path("-o"), method="datainf", options={"-a": "-b", "labels": None}
    )
    found = _parsed(settings, "attribute")
    assert found.queries == "-1 + 2 = ?"
    assert found.options == {"-a": "-b", "labels": "none"}


@pytest.mark.parametrize("data", [["text a", "text b"], ["d.jsonl"]])
def test_a_list_of_texts_never_becomes_names_of_files(data):
    settings = IndexSettings(model="m", data=data, out=Path("idx"), workers=2)
    command = worker_command(settings, "index")
    assert command is None
    with pytest.raises(UserError, match="or as a list of texts"):
        require_command(command)
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
