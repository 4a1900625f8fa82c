import json
import os

import torch

from tests.architectures import build
from vestige.models import load_model, model_fingerprint


def test_equal_weights_give_equal_fingerprints(saved):
    assert load_model(saved("gpt2"), device="cpu").fingerprint == model_fingerprint(build("gpt2", torch.float32))


def test_one_weight_changes_it():
    model = build("llama")
    before = model_fingerprint(model)
    with torch.no_grad():
        last = list(model.parameters())[-1]
        last.view(-1)[-1] = torch.nextafter(last.view(-1)[-1], torch.tensor(9.0, dtype=last.dtype))
    assert model_fingerprint(model) != before


def test_names_shapes_and_dtypes_enter():
    weight = torch.zeros(2, 3)
    plain = torch.nn.ParameterDict({"a": weight})
    assert model_fingerprint(plain) != model_fingerprint(torch.nn.ParameterDict({"b": weight}))
    assert model_fingerprint(plain) != model_fingerprint(torch.nn.ParameterDict({"a": weight.reshape(3, 2)}))
    # Six zeros of four bytes are also three of eight.
    assert model_fingerprint(plain) != model_fingerprint(torch.nn.ParameterDict({"a": torch.zeros(3).double()}))


def test_memory_order_bfloat16_and_scalars_are_no_obstacle():
    weight = torch.randn(4, 5)
    contiguous = model_fingerprint(torch.nn.ParameterDict({"a": weight.T.contiguous()}))
    assert model_fingerprint(torch.nn.ParameterDict({"a": weight.T})) == contiguous
    model_fingerprint(torch.nn.ParameterDict({"a": torch.ones(3).bfloat16(), "b": torch.tensor(1.0)}))


def test_weights_are_hashed_once_for_a_process_and_those_that_it_starts(saved, monkeypatch):
    """A worker is handed the fingerprint by the environment, as long as the files are those that were hashed."""
    monkeypatch.delenv("VESTIGE_FINGERPRINTS", raising=False)
    folder = saved("llama")
    first = load_model(folder, device="cpu")
    handed = os.environ["VESTIGE_FINGERPRINTS"]
    assert list(json.loads(handed).values()) == [first.fingerprint]
    # Were it hashed again, it would not be what a process that started this one handed on.
    monkeypatch.setenv("VESTIGE_FINGERPRINTS", handed.replace(first.fingerprint, "handed"))
    assert load_model(folder, device="cpu").fingerprint == "handed"
    assert load_model(folder, device="cpu", precision="float64").fingerprint not in ("handed", first.fingerprint)
    model = first.model
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    model.save_pretrained(folder)
    assert load_model(folder, device="cpu").fingerprint == model_fingerprint(model)
