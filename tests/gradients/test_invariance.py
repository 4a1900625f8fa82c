"""No score depends on the batch: its size, its other examples, its padding, or the order of the data."""

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from tests.architectures import CAUSAL, build, sequences
from tests.gradients.test_exactness import engine_gradients
from vestige.data import Batch
from vestige.gradients import CausalLoss, GradientPass, GradientSink, NormSink
from vestige.models import select_components


def flat(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUSAL)
def test_scores_do_not_move_with_batch_size_padding_or_order(name: str) -> None:
    model, data = build(name, torch.float32), sequences(9)
    alone = flat(engine_gradients(model, data, [[row] for row in range(9)])[1])
    scores = alone @ alone.T
    batchings = {
        "three": ([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 0),
        "eight": ([list(range(8)), [8]], 0),
        "padded": ([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 11),
        "reordered": ([[8, 2, 5], [0, 7, 1], [4, 3, 6]], 0),
    }
    for label, (batches, padding) in batchings.items():
        other = flat(engine_gradients(model, data, batches, extra_padding=padding)[1])
        error = float((other @ other.T - scores).abs().max() / scores.abs().max())
        assert error < 1e-5, label


def test_losses_are_the_token_sum_and_the_token_mean() -> None:
    model, data = build("llama"), sequences()
    summed = engine_gradients(model, data, [list(range(7))], "sum")[2]
    averaged = engine_gradients(model, data, [list(range(7))], "mean")[2]
    counts = torch.tensor([int(mask[1:].sum()) for mask in data.targets])
    assert torch.allclose(summed / counts, averaged, rtol=1e-12)


def test_an_example_without_targets_has_loss_and_gradient_zero() -> None:
    model, data = build("gpt2"), sequences(3)
    data.targets[1][:] = False
    _, rows, losses = engine_gradients(model, data, [[0, 1, 2]])
    assert losses[1] == 0
    assert float(flat(rows)[1].abs().max()) == 0
    assert float(flat(rows)[0].abs().max()) > 0


def test_a_loss_in_chunks_is_the_loss_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two positions cut through examples: the tied head's gradient adds up over them."""
    model, data = build("gpt2"), sequences()
    whole = flat(engine_gradients(model, data, [list(range(7))])[1])
    monkeypatch.setattr(CausalLoss, "logit_bytes", 4 * 37 * 2)
    chunked = flat(engine_gradients(model, data, [list(range(7))])[1])
    assert torch.allclose(whole, chunked, rtol=1e-10, atol=1e-14)


def test_a_model_that_scales_its_logits_runs_whole() -> None:
    """Splitting at the head would be wrong: found out by comparison, and the gradients are still exact."""
    plain, scaled = build("llama"), build("llama")
    scaled.lm_head.register_forward_hook(lambda module, inputs, output: output * 0.5)
    assert CausalLoss().head_module(plain) == "lm_head"
    assert CausalLoss().head_module(scaled) is None
    data = sequences()
    halved = engine_gradients(scaled, data, [list(range(7))])[2]
    batch = data.batch(list(range(7)))
    logits = scaled(input_ids=batch.input_ids).logits[:, :-1].transpose(1, 2)
    expected = torch.nn.functional.cross_entropy(logits, batch.labels[:, 1:], reduction="none").sum(1)
    assert torch.allclose(halved, expected, rtol=1e-10)


def test_a_soft_cap_that_small_logits_hardly_show_is_read_from_the_configuration() -> None:
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for cap, expected in ((30.0, None), (None, "lm_head")):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=cap)).eval()
        with torch.no_grad():
            assert float(model(input_ids=torch.arange(5)[None]).logits.abs().max()) < 1
        assert CausalLoss().head_module(model) == expected


def test_weight_flags_and_hooks_are_as_before() -> None:
    model, data = build("opt"), sequences()
    next(iter(model.parameters())).requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    engine_gradients(model, data, [[0, 1]])
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", CAUSAL)
def test_norms_count_the_cross_terms_of_tied_uses(name: str) -> None:
    model, data = build(name), sequences()
    components = select_components(model, ("all",)).components
    norms, whole = NormSink(components), GradientSink(components)
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        batch: Batch = data.batch(list(range(7)))
        norms.begin(7)
        whole.begin(7, "cpu", torch.float64)
        gradient_pass.run(batch, norms)
        gradient_pass.run(batch, whole)
    expected = torch.stack([gradient.flatten(1).square().sum(1) for gradient in whole.gradients])
    assert torch.allclose(norms.finish(), expected, rtol=1e-10)
