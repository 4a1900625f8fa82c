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
