import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from vestige.errors import SpecError, UserError, VestigeError
from vestige.methods import Bm25, Random, RepSim, SplitsByComponent, get_method, method, method_names
from vestige.methods import _registry as registry
from vestige.runs import Meaning

from .conftest import text_job

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
    with pytest.raises(SpecError, match=r"Did you mean --method bm25\?.*random"):
        get_method("bm52")


def test_options_reach_the_method_and_unknown_ones_are_refused():
    assert get_method("rep-sim", pooling="last") == RepSim(pooling="last")
    with pytest.raises(SpecError, match=r"random has no option 'pooling'\. It has none\."):
        get_method("random", pooling="last")


def test_a_name_belongs_to_one_class(monkeypatch):
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    with pytest.raises(VestigeError, match="Two methods are called 'bm25'"):
        method("bm25")(type("Other", (), {}))


def test_other_packages_announce_methods_by_entry_point(monkeypatch, tmp_path):
    (tmp_path / "their_package.py").write_text("class Theirs:\n    needs_model = False\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    points = EntryPoints([EntryPoint("theirs", "their_package:Theirs", "vestige.methods")])
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    assert "theirs" in method_names()
    assert "their_package" not in sys.modules
    assert get_method("theirs").name == "theirs"


def test_only_activation_dot_splits_by_component():
    assert isinstance(get_method("activation-dot"), SplitsByComponent)
    assert not isinstance(Bm25(), SplitsByComponent)
    assert not isinstance(Random(), SplitsByComponent)


def test_a_job_without_a_model_says_what_to_add():
    with pytest.raises(UserError, match="--model MODEL"):
        list(get_method("rep-sim").blocks(text_job(["a"], ["b"])))
