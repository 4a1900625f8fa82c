"""Options of single methods: found in their classes, checked by type, answered with the list when misspelt."""

import pytest

from tests.methods.conftest import settings
from vestige import attribute
from vestige.errors import SpecError
from vestige.methods import (
    METHODS,
    Arnoldi,
    ConjugateGradient,
    Ekfac,
    RepSim,
    get_method,
    options_of,
)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("ekfac", {"labels": "data"}, Ekfac(labels="data")),
        ("cg", {"steps": "50", "tolerance": "1e-2", "examples": "none"}, ConjugateGradient(steps=50, tolerance=1e-2)),
        ("cg", {"steps": 50, "kind": "hessian"}, ConjugateGradient(steps=50, kind="hessian")),
        ("arnoldi", {"rank": "3", "examples": "7"}, Arnoldi(rank=3, examples=7)),
        ("rep-sim", {"layer": "-2", "pooling": "last"}, RepSim(layer=-2, pooling="last")),
        ("rep-sim", {"layer": "none"}, RepSim()),
    ],
)
def test_words_and_values_become_the_type_of_the_option(name, given, expected):
    assert get_method(name, **given) == expected


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cg", {"step": 5}, r"cg has no option 'step'.*defaults:\n  steps=20  \(whole number\).*\n  tolerance=0.001"),
        ("ekfac", {"_prepared": 1}, "has no option '_prepared'"),
        ("grad-dot", {"labels": "data"}, "grad-dot has no option 'labels'. It has none."),
        ("cg", {"steps": "many"}, "--option steps=many does not fit: expected whole number"),
        ("cg", {"steps": 0}, "greater than 0"),
        ("cg", {"tolerance": "nan"}, "--option tolerance=nan"),
        ("lissa", {"scale": -1.0}, "greater than 0"),
        ("ekfac", {"labels": "drawn"}, "expected sampled or data"),
        ("cg", {"steps": "none"}, "expected whole number"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(name, given, message):
    with pytest.raises(SpecError, match=f"(?s){message}"):
        get_method(name, **given)


@pytest.mark.parametrize("name", METHODS.names())
def test_every_option_says_what_it_means_and_accepts_its_default(name):
    for one in options_of(METHODS.find(name)):
        assert one.meaning.endswith(".")
        assert one.values
        assert one.parse(one.shown_default) == one.default


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("labels", "name=value, such as labels=data, where 'labels' was given"),
        (["=data"], "where '=data' was given"),
        (["labels=data", "labels=sampled"], "one value for labels"),
    ],
)
def test_words_that_name_nothing_are_refused(given, message):
    with pytest.raises(SpecError, match=message):
        settings(options=given)


def test_a_text_may_hold_an_equals_sign():
    assert settings(options="path=a=b").options == {"path": "a=b"}


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("less", {"checkpoints": ["one", "two"]}, "would not rank by influence"),
        ("influence", {"model": "m", "options": {"relative": "cosine"}}, "is 1 for every example"),
        ("ekfac-index", {"model": "m"}, "preconditions the queries alone"),
        ("grad-cos", {"model": "m"}, "It would rank nothing"),
    ],
)
def test_self_influence_that_ranks_nothing_is_refused_before_any_work(method, given, message, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(SpecError, match=message):
        attribute(**given, data="d", queries=["Why?"], method=method, self_influence=True, out=out)
    assert not out.exists()
