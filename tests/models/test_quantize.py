"""Models whose maps are packed: adapters beside them have exact gradients, and what cannot be scored is refused."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import vestige
from tests.workshop import furnish
from vestige.data import Batch
from vestige.errors import IndexMismatch, MissingExtra, ModelError, SpecError
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.methods import randomise
from vestige.models import load_model, quantized_bits, quiet_transformers, select_components

has_library = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs vestige[quantize]")
both = pytest.mark.parametrize("bits", [4, 8])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model, and a LoRA adapter on it whose matrices are all random."""
    folder = furnish(tmp_path_factory.mktemp("quantize"))
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    with quiet_transformers():
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    adapter = folder / "adapter" / "adapter_config.json"
    config = json.loads(adapter.read_text()) | {"base_model_name_or_path": str(folder / "tiny-model")}
    adapter.write_text(json.dumps(config))
    return folder


def uneven_batch() -> Batch:
    ids = torch.randint(2, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row, length in enumerate((12, 7, 4)):
        ids[row, length:], labels[row, length:] = 0, -100
    labels[0, :5] = -100
    return Batch(torch.arange(3), ids, labels)


def test_without_the_library_it_says_what_to_install(place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if "bits" in name else find(name, *more))
    with pytest.raises(MissingExtra, match=r"pip install 'vestige\[quantize\]'"):
        load_model(place / "tiny-model", quantize=4, device="cpu")


def test_a_live_module_is_used_as_it_is(place):
    with pytest.raises(ModelError, match="live module"):
        load_model(AutoModelForCausalLM.from_pretrained(place / "tiny-model"), quantize=8)


def test_parts_of_a_model_are_not_packed(place):
    with pytest.raises(SpecError, match=r"quantize.*fsdp"):
        vestige.index(model=str(place / "adapter"), data="d", out=place / "none", quantize=4, device="fsdp")


@has_library
@pytest.mark.slow
@both
def test_gradients_of_an_adapter_on_packed_weights_are_those_of_autograd(place, bits):
    loaded = load_model(place / "adapter", quantize=bits, device="cpu")
    assert quantized_bits(loaded.model) == bits
    batch, components = uneven_batch(), select_components(loaded.model, ("default",)).components
    assert {"lora" in component.name for component in components} == {True}
    sink = GradientSink(components)
    sink.begin(3, "cpu")
    with GradientPass(loaded.model, components, CausalLoss()) as run:
        losses = run.run(batch, sink)
    for row in range(3):
        parameters = [loaded.model.get_parameter(component.parameter).requires_grad_(True) for component in components]
        length = int((batch.input_ids[row] > 0).sum())
        logits = loaded.model(input_ids=batch.input_ids[row : row + 1, :length], use_cache=False).logits[0, :-1]
        labels = batch.labels[row, 1:length]
        loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        torch.testing.assert_close(losses[row], loss.detach(), rtol=2e-3, atol=2e-3)
        for found, expected in zip(sink.gradients, torch.autograd.grad(loss, parameters), strict=True):
            tolerance = 2e-3 * float(expected.abs().max())
            torch.testing.assert_close(found[row], expected.view_as(found[row]), rtol=1e-2, atol=tolerance)


@has_library
@pytest.mark.slow
def test_trap_llm_int8_an_outlier_of_another_example_changes_no_loss(place):
    """With its threshold, a feature that is large anywhere in the batch is multiplied in another format for all."""
    loaded = load_model(place / "tiny-model", quantize=8, device="cpu")
    with torch.no_grad():
        loaded.model.get_input_embeddings().weight[7] *= 500.0
    batch = uneven_batch()
    batch.input_ids[0, 3] = 7
    with torch.no_grad():
        together = CausalLoss().losses(loaded.model, batch)
        alone = CausalLoss().losses(loaded.model, Batch(batch.rows[1:], batch.input_ids[1:], batch.labels[1:]))
    torch.testing.assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)


@has_library
@pytest.mark.slow
def test_packed_and_whole_weights_are_different_models(place):
    prints = {load_model(place / "tiny-model", quantize=bits, device="cpu").fingerprint for bits in (None, 4, 8)}
    assert len(prints) == 3
    model = load_model(place / "tiny-model", quantize=4, device="cpu")
    again = load_model(place / "tiny-model", quantize=4, device="cpu")
    assert model.fingerprint == again.fingerprint
    # The packed numbers stay, and what they are multiplied by does not.
    folder = place / "scaled"
    whole = AutoModelForCausalLM.from_pretrained(place / "tiny-model")
    with torch.no_grad():
        whole.model.layers[0].mlp.up_proj.weight *= 2
    whole.save_pretrained(folder)
    scaled = load_model(folder, quantize=4, device="cpu")
    packed = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(scaled.model.get_parameter(packed), model.model.get_parameter(packed))
    assert scaled.fingerprint != model.fingerprint


@has_library
@pytest.mark.slow
def test_an_index_of_an_adapter_on_packed_weights(place):
    data = {"data": place / "train.jsonl", "out": place / "idx", "device": "cpu"}
    built = vestige.index(model=str(place / "adapter"), quantize=4, **data)
    assert built.manifest.quantize == 4
    assert json.loads((place / "idx" / "manifest.json").read_text())["quantize"] == 4
    with pytest.raises(IndexMismatch, match="quantize"):
        vestige.index(model=str(place / "adapter"), **data)
    # The index says how its model is read.
    asked = {"queries": ["Who wrote Emma?"], "max_new_tokens": 4}
    run = vestige.attribute(index=place / "idx", out=place / "run", device="cpu", **asked)
    assert len(run.top(0)) == 10
    assert np.isfinite([row.score for row in run.top(0)]).all()
    random = next(check for check in run.run.trust.checks if check.name == "randomised-model correlation")
    assert "quantised" in random.reading


@has_library
@pytest.mark.slow
def test_packed_maps_are_not_scored_and_not_trained(place):
    settings = {"data": place / "train.jsonl", "quantize": 4, "device": "cpu"}
    with pytest.raises(SpecError, match=r"packed in 4 bits.*LoRA adapter"):
        vestige.index(model=str(place / "tiny-model"), out=place / "bare", **settings)
    with pytest.raises(ModelError, match="packed in 4 bits"):
        vestige.train(model=str(place / "tiny-model"), out=place / "trained", epochs=1, **settings)
    with pytest.raises(ModelError, match="quantised"):
        vestige.untrac(
            model=str(place / "tiny-model"), queries=[{"text": "Bees."}], out=place / "untrac", steps=1, **settings
        )


@has_library
@pytest.mark.slow
def test_lora_matrices_are_trained_beside_packed_maps(place):
    run = vestige.train(
        model=str(place / "tiny-model"),
        data=place / "train.jsonl",
        out=place / "lora",
        lora_rank=4,
        epochs=1,
        quantize=4,
        device="cpu",
    )
    assert run.record["config"]["quantize"] == 4


@has_library
@pytest.mark.slow
def test_a_model_of_packed_weights_is_not_randomised(place):
    """What is packed would stay as it is, and pass for random."""
    loaded = load_model(place / "tiny-model", quantize=4, device="cpu")
    with pytest.raises(ModelError, match="Drop --quantize"), randomise(loaded.model, 0):
        pass
