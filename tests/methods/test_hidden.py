import numpy as np
import pytest
import torch

from tests.architectures import CAUSAL
from tests.reference.similarity import layer_outputs, pooled_hidden_state
from vestige.errors import ModelError, SpecError
from vestige.methods import ActivationDot, RepSim, pool_states, pooling_weights

from .conftest import all_scores, model_job, reordered

METHODS = [RepSim(), RepSim(pooling="last"), ActivationDot(), ActivationDot(pooling="sum")]


def reference_cosines(job, layer: int, last: bool) -> torch.Tensor:
    model = job.loaded.model
    states = [
        torch.stack(
            [
                pooled_hidden_state(model, ids, targets, layer, last)
                for ids, targets in zip(data.input_ids, data.targets, strict=True)
            ]
        )
        for data in (job.queries, job.train)
    ]
    lengths = [(state**2).sum(1).sqrt() for state in states]
    return (states[0] @ states[1].T) / lengths[0][:, None] / lengths[1][None, :]


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize(("layer", "index"), [(None, -1), (0, 0), (1, 1)])
def test_rep_sim_is_the_cosine_of_pooled_states(architecture, layer, index):
    job = model_job(architecture, dtype=torch.float64)
    for pooling in ("mean", "last"):
        found = all_scores(RepSim(layer, pooling), job)
        assert (found - reference_cosines(job, index, pooling == "last")).abs().max() < 1e-12
        assert found.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("architecture", CAUSAL)
@pytest.mark.parametrize(("patterns", "pooling"), [("all", "mean"), ("mlp", "sum"), ("embedding", "mean")])
def test_activation_dot_is_the_sum_over_modules(architecture, patterns, pooling):
    job = model_job(architecture, dtype=torch.float64, patterns=(patterns,))
    modules = list(dict.fromkeys(use.module for component in job.components for use in component.uses))

    def vectors(data):
        rows = []
        for ids, targets in zip(data.input_ids, data.targets, strict=True):
            outputs = torch.cat(layer_outputs(job.loaded.model, ids, targets, modules))
            rows.append(outputs if pooling == "sum" else outputs / targets[1:].sum())
        return torch.stack(rows)

    expected = vectors(job.queries) @ vectors(job.train).T
    found = all_scores(ActivationDot(pooling=pooling), job)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "neox", "opt"])
def test_batches_padding_and_order_move_no_score(method, architecture, monkeypatch):
    job = model_job(architecture, token_budget=1)
    alone = all_scores(method, job)
    scale = alone.abs().max()
    for budget in (20, 45, 4096):
        together = type(job)(
            job.train, job.queries, job.settings.model_copy(update={"token_budget": budget}), job.loaded, job.selection
        )
        assert (all_scores(method, together) - alone).abs().max() < 1e-5 * scale
    order = np.random.default_rng(0).permutation(len(job.train))
    turned = type(job)(reordered(job.train, order), job.queries, job.settings, job.loaded, job.selection)
    assert (all_scores(method, turned) - alone[:, order]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_components_add_up_to_the_score(architecture):
    job = model_job(architecture, dtype=torch.float64, token_budget=30)
    scores = all_scores(ActivationDot(), job)
    # A row and a query may come up several times, in any order.
    queries, rows = torch.tensor([2, 0, 0, 1, 2]), torch.tensor([8, 8, 1, 5, 3])
    parts = ActivationDot().components(job, queries, rows)
    # A run names the components once, for all methods: biases are among them.
    assert parts.shape == (len(queries), len(job.components))
    total = scores[queries, rows]
    assert (parts.double().sum(1) - total).abs().max() < 1e-12 * total.abs().max()


def test_a_component_alone_scores_what_it_contributes():
    whole = model_job("llama", dtype=torch.float64)
    pairs = torch.tensor([0, 1]), torch.tensor([4, 2])
    parts = ActivationDot().components(whole, *pairs)
    name = whole.components[3].name
    alone = model_job("llama", dtype=torch.float64, patterns=(name,))
    assert parts[:, 3] == pytest.approx(all_scores(ActivationDot(), alone)[pairs].numpy(), rel=1e-12)


def test_pooling_weights_sit_where_a_target_is_predicted():
    labels = torch.tensor([[-100, 5, -100, 7, -100], [-100, -100, -100, -100, -100]])
    assert pooling_weights(labels, "sum", torch.float32).tolist() == [[1, 0, 1, 0, 0], [0] * 5]
    assert pooling_weights(labels, "mean", torch.float32).tolist() == [[0.5, 0, 0.5, 0, 0], [0] * 5]
    assert pooling_weights(labels, "last", torch.float32).tolist() == [[0, 0, 1, 0, 0], [0] * 5]


def test_halves_are_pooled_in_float32():
    states = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    found = pool_states(states, torch.zeros(1, 4096, dtype=torch.long), "sum")
    assert found.dtype == torch.float32
    assert found.item() == 4095


def test_no_hook_is_left_behind_even_after_an_error():
    job = model_job("gpt2")
    blocks = ActivationDot().blocks(job)
    next(blocks)
    blocks.close()
    assert not any(module._forward_hooks for module in job.loaded.model.modules())


def test_logits_are_computed_only_when_the_head_is_selected():
    for patterns, expected in ((("mlp",), False), (("all",), True)):
        job, ran = model_job("llama", patterns=patterns), []
        head = job.loaded.model.lm_head
        head.register_forward_hook(lambda *_, ran=ran: ran.append(True))
        all_scores(ActivationDot(), job)
        assert bool(ran) == expected


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(SpecError, match=r"hidden states 0 \(embedding\) to 2"):
        list(RepSim(layer=7).blocks(model_job("llama")))


def test_a_model_without_hidden_states_is_refused():
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(40, 4)

        def forward(self, input_ids, use_cache=False, output_hidden_states=False):
            return self.embed(input_ids)

    job = model_job("gpt2")
    bare = type(job)(job.train, job.queries, job.settings, type(job.loaded)(Bare(), None, "Bare", "f", None))
    with pytest.raises(ModelError, match="does not return hidden states"):
        list(RepSim().blocks(bare))


def test_activation_dot_needs_a_selection():
    job = model_job("gpt2")
    with pytest.raises(SpecError, match="no component is selected"):
        list(ActivationDot().blocks(type(job)(job.train, job.queries, job.settings, job.loaded)))


def test_an_example_without_a_target_scores_zero():
    job = model_job("llama")
    job.train.targets[2][:] = False
    for method in METHODS:
        assert (all_scores(method, job)[:, 2] == 0).all()
