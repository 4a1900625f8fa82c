import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from vestige import registry
from vestige.errors import SpecError, UserError
from vestige.methods import METHODS, Method, RepSim, attribute, describe_method, get_method, method
from vestige.runs import Meaning

from .conftest import all_scores, model_job, text_job

HERE = ("bm25", "random", "rep-sim", "activation-dot")


@pytest.mark.parametrize("name", HERE)
def test_every_method_says_what_its_scores_mean(name):
    found = get_method(name)
    assert found.name == name
    assert isinstance(found.meaning, Meaning)
    assert all(found.meaning.to_dict().values())
    # None of these estimates an effect of training, and each must say so.
    assert "no causal reading" in found.meaning.sign or name == "random"
    assert not found.needs_gradients
    assert found.needs_model == (name in ("rep-sim", "activation-dot"))


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(SpecError, match=r"Did you mean 'bm25'\?.*random"):
        get_method("bm52")


def test_options_reach_the_method_and_unknown_ones_are_refused():
    assert get_method("rep-sim", pooling="last") == RepSim(pooling="last")
    with pytest.raises(SpecError, match=r"random has no option 'pooling'\. It has none\."):
        get_method("random", pooling="last")


@pytest.fixture
def announced(monkeypatch, tmp_path):
    """Announce a method of another package by an entry point, as its text."""

    def announce(text):
        (tmp_path / "their_package.py").write_text(text)
        points = [EntryPoint("theirs", "their_package:Theirs", "vestige.methods")]
        theirs = EntryPoints([*registry.entry_points(group="vestige.methods"), *points])
        monkeypatch.setattr(registry, "entry_points", lambda: theirs)
        registry.forget_entry_points()

    monkeypatch.syspath_prepend(tmp_path)
    list(METHODS)  # a module registers when it is imported, which is once
    monkeypatch.setattr(METHODS, "_added", dict(METHODS._added))

    yield announce
    registry.forget_entry_points()
    sys.modules.pop("their_package", None)


THEIRS = """
from vestige.methods import Method, method

@method("theirs")
class Theirs(Method):
    def blocks(self, job):
        yield from ()
"""


def test_a_name_belongs_to_one_class(monkeypatch):
    list(METHODS)  # a module registers when it is imported, which is once
    monkeypatch.setattr(METHODS, "_added", dict(METHODS._added))
    METHODS.find("bm25")
    with pytest.raises(SpecError, match="Two objects are called 'bm25'"):
        method("bm25")(type("Other", (Method,), {}))


def test_other_packages_announce_methods_by_entry_point(announced):
    announced(THEIRS)
    assert "theirs" in METHODS.names()
    assert "their_package" not in sys.modules
    assert get_method("theirs").name == "theirs"


def test_what_is_no_method_is_refused(announced):
    announced("class Theirs:\n    needs_model = False\n")
    with pytest.raises(SpecError, match=r"The method 'theirs' of .* is no vestige.methods.*Method"):
        get_method("theirs")


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_that_claims_to_split_scores_has_what_it_takes(name):
    found = METHODS.find(name)
    assert found.splits_components == (found.components is not Method.components)
    assert found.scores_itself == (found.self_scores is not Method.self_scores)


def test_a_method_with_a_command_of_its_own_says_so(tmp_path):
    assert describe_method("untrac").endswith("vestige untrac --help")
    with pytest.raises(SpecError, match="Type: vestige untrac --model MODEL"):
        attribute(model="m", data="d", queries=["Why?"], method="untrac", out=tmp_path / "run")


@pytest.mark.slow
def test_untrac_scores_a_job_like_any_method(tmp_path):
    job = model_job("gpt2", out=tmp_path / "run")
    scores = all_scores(get_method("untrac"), job)
    assert scores.shape == (3, 9)
    assert len(torch.unique(scores)) == 27


def test_the_word_search_and_chance_do_not_split_by_component():
    assert [name for name in HERE if METHODS.find(name).splits_components] == ["activation-dot"]


def test_a_job_without_a_model_says_what_to_add():
    with pytest.raises(UserError, match="--model MODEL"):
        list(get_method("rep-sim").blocks(text_job(["a"], ["b"])))


def test_what_evaluations_know_of_methods_are_facts_of_the_methods():
    facts = {method.name: method for method in METHODS}
    ordered = sorted((one for one in METHODS if one.baseline is not None), key=lambda one: one.baseline)
    assert [one.name for one in ordered] == ["random", "bm25", "rep-sim", "grad-cos"]
    assert [name for name, one in facts.items() if one.at_random] == ["random"]
    assert [name for name, one in facts.items() if one.constant_self_score] == ["grad-cos"]
