"""Functions of settings leave a live module as it was: what may be trained, and which parts are in training mode."""

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workshop import furnish
from vestige import attribute, doctor, untrac
from vestige.errors import UserError
from vestige.indexes import index


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("live"))


@pytest.fixture
def live(home):
    """A model with some parameters frozen and one layer in evaluation mode, among others that are not."""
    model = AutoModelForCausalLM.from_pretrained(home / "tiny-model").train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    model.model.layers[1].eval()
    return model


def state(model) -> tuple:
    weights = [value.clone() for value in model.state_dict().values()]
    return [each.requires_grad for each in model.parameters()], [each.training for each in model.modules()], weights


def asked(home, model, out) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(home / "tiny-model")
    pairs = [{"prompt": "Why is the sky blue?", "completion": "Air scatters blue light."}]
    return {"model": model, "tokenizer": tokenizer, "data": home / "train.jsonl", "queries": pairs, "out": out}


def by_influence(home, model, out):
    return attribute(**asked(home, model, out))


def by_cg(home, model, out):
    return attribute(**asked(home, model, out), method="cg", options={"steps": 2})


def by_checkpoints(home, model, out):
    given = asked(home, None, out)
    return attribute(**given | {"checkpoints": [model]}, method="tracin", checkpoint_weights=[1.0])


def by_unlearning(home, model, out):
    return untrac(**asked(home, model, out), steps=1, learning_rate=1e-3)


def by_index(home, model, out):
    return index(**{name: value for name, value in asked(home, model, out).items() if name != "queries"})


def by_doctor(home, model, out):
    given = asked(home, model, out)
    return doctor(**{name: given[name] for name in ("model", "tokenizer", "data")})


VERBS: list[Callable] = [by_influence, by_cg, by_checkpoints, by_unlearning, by_index, by_doctor]


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_live_module_is_as_it_was(home, live, tmp_path, verb):
    before = state(live)
    verb(home, live, tmp_path / "out")
    after = state(live)
    assert after[:2] == before[:2]
    assert all(torch.equal(one, other) for one, other in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize("verb", VERBS)
def test_a_live_module_is_as_it_was_after_an_error(home, live, tmp_path, verb, monkeypatch):
    def fails(*_, **__):
        raise UserError("in the middle")

    live.model.layers[1].register_forward_hook(fails)
    before = state(live)
    with pytest.raises(UserError, match="in the middle"):
        verb(home, live, tmp_path / "out")
    assert state(live)[:2] == before[:2]
