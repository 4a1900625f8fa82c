"""Which tokens K-FAC and EK-FAC count: those that can influence the loss, whatever a kernel leaves of gradients."""

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.architectures import build
from tests.methods.conftest import tokenized
from tests.reference import curvature as dense
from tests.reference.gradients import example_gradients
from vestige.curvature import CurvatureData, curvature_path, ekfac_of, kfac_of
from vestige.errors import ModelError
from vestige.gradients import CausalLoss
from vestige.models import select_components

from .conftest import canonical, measured, with_targets

# The gradient of the first token's query is zero: its softmax has one entry. In the last block, no position but a
# predicting one has a gradient at the MLP; before that, every position up to the last predicting one has.
LAYERS = [
    ("llama", "model.layers.0.self_attn.q_proj"),
    ("llama", "model.layers.1.self_attn.k_proj"),
    ("llama", "model.layers.1.mlp.down_proj"),
    ("gpt2", "transformer.h.1.mlp.c_fc"),
]


@pytest.mark.parametrize("targets", ["last", "middle"])
@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_every_position_up_to_the_last_that_predicts_counts(name, layer, targets):
    given = measured(name, f"{layer}.*")
    given = dataclasses.replace(given, data=with_targets(given.data, targets))
    (factor,) = kfac_of(given).factors
    left, right, tokens = dense.kronecker(build(name), layer, given.data)
    inputs = right if len(factor.right) == len(right) else right[:-1, :-1]
    assert factor.tokens == pytest.approx(tokens)
    assert torch.allclose(factor.left, left, rtol=1e-9, atol=1e-12)
    assert torch.allclose(factor.right, inputs, rtol=1e-9, atol=1e-12)


def test_the_output_head_counts_the_positions_that_predict_however_its_loss_is_computed(monkeypatch):
    found = []
    for budget, pieces in ((4096, 2**26), (40, 4 * 37 * 5)):
        monkeypatch.setattr(CausalLoss, "logit_bytes", pieces)
        (factor,) = kfac_of(measured("llama", "lm_head.weight", budget=budget)).factors
        found.append(factor)
    monkeypatch.setattr(CausalLoss, "head_module", lambda *_: None)
    given = measured("llama", "lm_head.weight")
    (whole,) = kfac_of(given).factors
    _, right, tokens = head_factors(given)
    for factor in (*found, whole):
        assert factor.tokens == pytest.approx(tokens)
        assert torch.allclose(factor.right, right, rtol=1e-9, atol=1e-12)


def head_factors(given: CurvatureData) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(S, A, tokens per example) of the head, example by example."""
    left, right, count = 0.0, 0.0, 0
    for ids, targets in zip(given.data.input_ids, given.data.targets, strict=True):
        tokens, places = torch.as_tensor(ids).long(), dense.predicting(torch.as_tensor(targets))
        with torch.no_grad():
            output = given.model(tokens[None], output_hidden_states=True)
        for place in places:
            slope = torch.softmax(output.logits[0, place], -1) - torch.eye(37)[tokens[place + 1]]
            state = output.hidden_states[-1][0, place]
            left, right, count = left + torch.outer(slope, slope), right + torch.outer(state, state), count + 1
    return left / count, right / count, count / len(given.data)


def test_an_expert_counts_the_tokens_that_were_routed_to_it_and_can_influence_the_loss():
    layer, data = "model.layers.0.mlp", with_targets(tokenized(6, 1, "t"), "middle")
    model = build("mixtral")
    components = select_components(model, (f"{layer}.experts.gate_up_proj",)).components
    for budget in (1, 4096):
        factors = kfac_of(CurvatureData(model, components, data, budget, labels="data")).factors
        for number, factor in enumerate(factors):
            states = routed_states(model, layer, number, data)
            assert factor.tokens == pytest.approx(len(states) / len(data))
            expected = states.T @ states / max(len(states), 1)
            assert torch.allclose(factor.right, expected, rtol=1e-9, atol=1e-12)


def routed_states(model: nn.Module, layer: str, number: int, data) -> torch.Tensor:
    """Inputs of one expert at the positions up to the last predicting one, example by example."""
    seen, experts = {}, model.get_submodule(f"{layer}.experts")
    handle = experts.register_forward_pre_hook(lambda _, inputs: seen.update(states=inputs[0], chosen=inputs[1]))
    rows = []
    for ids, targets in zip(data.input_ids, data.targets, strict=True):
        with torch.no_grad():
            model(torch.as_tensor(ids).long()[None])
        last = max(dense.predicting(torch.as_tensor(targets))) + 1
        chosen = (seen["chosen"] == number).any(-1)[:last]
        rows.append(seen["states"].reshape(len(ids), -1)[:last][chosen])
    handle.remove()
    return torch.cat(rows)


KERNELS = ["gpt2", "llama", "llama-lora", "opt", "mixtral", "qwen-moe"]


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["last", "middle"])
@pytest.mark.parametrize("name", KERNELS)
def test_trap_no_score_moves_with_the_attention_kernel_or_the_token_budget(name, targets):
    """Up to 11 % of the largest EK-FAC score did, where a kernel leaves 0 and another 1e-8."""
    data, ways = (
        with_targets(tokenized(8, 1, "t"), targets),
        [("sdpa", 4096), ("eager", 4096), ("sdpa", 1), ("eager", 40)],
    )
    found = [scores(name, kernel, budget, data) for kernel, budget in ways]
    for kind, expected in found[0].items():
        for one in found[1:]:
            assert float((one[kind] - expected).abs().max()) < 1e-5 * float(expected.abs().max()), kind


def scores(name: str, kernel: str, budget: int, data) -> dict[str, torch.Tensor]:
    """K-FAC's and EK-FAC's scores [query, example] of float32 models; gradients by plain autograd."""
    model = build(name, torch.float32)
    model.set_attn_implementation(kernel)
    components = select_components(model, ("attention", "mlp")).components
    given = CurvatureData(model, components, data, budget, labels="data")
    rows = [
        example_gradients(model, torch.as_tensor(ids).long(), torch.as_tensor(targets))
        for ids, targets in zip(data.input_ids, data.targets, strict=True)
    ]
    stacked = [torch.stack([of(part, one).flatten() for one in rows]) for part in components]
    asked = [part[:3].clone() for part in stacked]
    factors = kfac_of(given)
    ways = {
        "kfac": factors.eigenbases().precondition(asked, 0.1),
        "split": factors.precondition_split(asked, 0.1),
        "ekfac": ekfac_of(given).precondition(asked, 0.1),
    }
    return {
        kind: sum(
            (query.double() @ part.double().T for query, part in zip(found, stacked, strict=True)), torch.zeros(())
        )
        for kind, found in ways.items()
    }


def of(part, gradients) -> torch.Tensor:
    """The component's own slice of the parameter's gradient."""
    name, _, number = part.name.partition("[")
    whole = gradients[name]
    return canonical(part, whole[int(number[:-1])] if number else whole)


class PerHead(nn.Module):
    """A model whose one map runs on every half of a token, the halves of all tokens one after the other."""

    def __init__(self, by_token: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.map, self.head = nn.Embedding(37, 8), nn.Linear(4, 4), nn.Linear(8, 37)
        self.by_token = by_token

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids, use_cache=False):
        states = self.words(input_ids).unflatten(-1, (2, 4))
        states = self.map(states) if self.by_token else self.map(states.transpose(1, 2)).transpose(1, 2)
        return type("Output", (), {"logits": self.head(states.flatten(-2).cumsum(1))})()


def test_rows_that_split_a_token_count_with_it_and_rows_that_cannot_be_told_apart_are_refused():
    data = with_targets(tokenized(6, 1, "t"), "middle")
    fitted = []
    for budget in (1, 4096):
        model = PerHead(by_token=True).double()
        components = select_components(model, ("map.*",)).components
        fitted.append(kfac_of(CurvatureData(model, components, data, budget, labels="data")).factors[0])
    counted = sum(max(dense.predicting(torch.as_tensor(mask))) + 1 for mask in data.targets)
    assert fitted[0].tokens == pytest.approx(2 * counted / len(data))
    assert torch.allclose(fitted[0].right, fitted[1].right, rtol=1e-9)
    model = PerHead(by_token=False).double()
    components = select_components(model, ("map.*",)).components
    with pytest.raises(ModelError, match=r"map.weight receives \d+ rows for \d+ tokens"):
        kfac_of(CurvatureData(model, components, data, 4096, labels="data"))


def test_curvature_of_the_earlier_count_is_measured_again(tmp_path: Path):
    given = measured("gpt2", "transformer.h.0.attn.c_proj.*", train=3)

    def path_of(number: int) -> Path:
        content = {
            "format": number,
            "model": "model",
            "data": given.data.fingerprint,
            "components": [[component.name, *component.shape] for component in given.components],
            "loss": given.reduction,
            "labels": given.labels,
            "seed": given.seed if given.labels == "sampled" else None,
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return tmp_path / f"ekfac-{digest[:16]}.safetensors"

    old, new = path_of(1), path_of(2)
    assert curvature_path(tmp_path, "ekfac", given, "model") == new
    ekfac_of(given, "model", tmp_path)
    new.rename(old)
    ekfac_of(given, "model", tmp_path)
    assert new.exists()
    assert old.exists()
