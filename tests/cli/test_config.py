import json
from pathlib import Path

import pytest

from vestige.errors import SpecError
from vestige.settings import AttributeSettings, IndexSettings

BASICS = ("--model", "m", "--data", "d", "--out", "o")


def test_defaults_are_those_of_the_settings(settings_of):
    assert settings_of("index", *BASICS) == IndexSettings(model="m", data="d", out=Path("o"))


def test_flags_of_every_kind_reach_the_settings(settings_of):
    words = ("--components", "mlp", "layers 0-3", "--max-length", "12", "--chat", "--dtype", "int8", "--shard", "2/3")
    given = settings_of("index", *BASICS, *words)
    assert given.components == ("mlp", "layers 0-3")
    assert (given.max_length, given.chat, given.dtype, given.part) == (12, True, "int8", (1, 3))


def test_flags_win_over_the_file_and_the_file_over_defaults(settings_of, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: from-file\nout: there\ndata: d\nseed: 3\nchat: true\ncomponents: mlp\n")
    given = settings_of("index", "--config", str(config), "--model", "typed", "--no-chat")
    assert (given.model, given.out, given.seed, given.chat) == ("typed", Path("there"), 3, False)
    assert given.components == ("mlp",)
    assert given.dtype == "float16"


def test_a_run_is_replayed_from_its_record(settings_of, tmp_path):
    made = AttributeSettings(index="idx", queries=["one?", "two?"], out=Path("run"), damping=0.5, tokens=True)
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"format": 1, "vestige": "0.1.0", "config": made.record()}))
    assert settings_of("attribute", "--config", str(record)) == made


@pytest.mark.parametrize(
    ("words", "queries"),
    [
        (("--queries", "Why is the sky blue?"), "Why is the sky blue?"),
        (("--queries", "One?", "Two?"), ["One?", "Two?"]),
        (("--queries", "One?", "--queries", "Two?"), ["One?", "Two?"]),
    ],
)
def test_queries_are_a_string_or_several(settings_of, words, queries):
    assert settings_of("attribute", "--index", "i", "--out", "o", *words).queries == queries


@pytest.mark.parametrize(("words", "damping"), [((), 1.0), (("--damping", "0.1"), 0.1)])
def test_damping_is_a_number(settings_of, words, damping):
    assert settings_of("attribute", "--index", "i", "--out", "o", "--queries", "q", *words).damping == damping


def test_options_of_the_method_are_recorded_and_replayed(settings_of, tmp_path):
    typed = ("--method", "cg", "--option", "steps=5", "--option", "tolerance=1e-2")
    given = settings_of("attribute", "--index", "i", "--out", "o", "--queries", "q", *typed)
    assert given.options == {"steps": "5", "tolerance": "1e-2"}
    assert "--option steps=5 --option tolerance=1e-2" in given.command_line("attribute")
    made = AttributeSettings(index="i", out=Path("o"), queries="q", method="cg", options={"steps": 5})
    assert "--option steps=5" in made.command_line("attribute")
    record = tmp_path / "run.json"
    for settings in (given, made):
        record.write_text(json.dumps({"vestige": "0.1.0", "config": settings.record()}))
        assert settings_of("attribute", "--config", str(record)) == settings


def test_a_positional_may_also_be_named(settings_of):
    assert settings_of("report", "run") == settings_of("report", "--run", "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: m\n", "unknown setting `modle`. Did you mean `model`?"),
        ("zebra: 1\n", "unknown setting `zebra`. Known settings: "),
        ("- model\n", "holds a list. Expected lines such as `model: my-model`."),
        ("model: [", "is neither YAML nor JSON"),
        ("", "holds a NoneType"),
        ("model: <LlamaForCausalLM>\n", "`model` was a live LlamaForCausalLM in a Python program"),
        ("seed: many\n", "`seed` was 'many', expected a valid integer"),
    ],
)
def test_what_is_wrong_with_a_config_file_is_said(vestige, tmp_path, content, message):
    config = tmp_path / "run.yaml"
    config.write_text(content)
    outcome = vestige("index", *BASICS, "--config", str(config))
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_an_absent_config_file(vestige):
    outcome = vestige("index", *BASICS, "--config", "nowhere.yaml")
    assert (outcome.status, outcome.err) == (
        2,
        "vestige: The config file nowhere.yaml cannot be read: No such file or directory.\n",
    )


def test_conditions_on_rows_are_recorded_and_replayed(settings_of, tmp_path):
    typed = ("--where", "source=web", "year=2021", "--where", "label=a=b")
    given = settings_of("index", *BASICS, *typed)
    assert given.where == {"source": "web", "year": "2021", "label": "a=b"}
    record = tmp_path / "run.json"
    record.write_text(json.dumps({"format": 1, "vestige": "0.1.0", "config": given.record()}))
    assert settings_of("index", "--config", str(record)) == given
    assert "--where source=web --where year=2021" in given.command_line("index")
    # Records and identities from before lack it.
    assert "where" not in settings_of("index", *BASICS).record()


def test_conditions_without_data_are_refused():
    with pytest.raises(SpecError, match=r"--where has no effect without --data"):
        AttributeSettings(index="idx", queries="q", out=Path("run"), where={"source": "web"})
