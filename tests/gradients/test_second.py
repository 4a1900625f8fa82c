"""Second derivatives of a batch's losses, against torch's own Hessian of one example at a time, in float64."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vestige.data import Batch
from vestige.gradients import second_derivatives


def gpt2():
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=12, **off))


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=12, **sizes))


@pytest.mark.parametrize(("make", "close"), [(gpt2, 1e-10), (llama, 1e-5)], ids=["gpt2", "llama"])
def test_trap_statistics_of_a_layer_norm_are_no_constants(make, close):
    """Reverse over forward takes them for constants: its products with the Hessian of GPT-2 are off by 40 percent."""
    torch.manual_seed(0)
    model = make().double().eval()
    ids = torch.randint(12, (2, 6))
    labels = ids.clone()
    labels[0, :3], labels[1, 5] = -100, -100
    names = [name for name, _ in model.named_parameters()]
    directions = {name: torch.randn(2, *model.get_parameter(name).shape).double() for name in names}
    shares = torch.tensor([[0.5], [2.0]]).double()
    found = second_derivatives(model, Batch(torch.arange(2), ids, labels), shares, directions)

    parameters = [model.get_parameter(name) for name in names]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for number in range(2):
            along = [directions[name][number] for name in names]
            products = [torch.zeros_like(each) for each in parameters]
            for row in range(2):
                chances = model(input_ids=ids[row : row + 1]).logits[0].log_softmax(-1)
                for at in range(1, 6):
                    expected = 0.0
                    if labels[row, at] >= 0:
                        loss = -shares[row, 0] * chances[at - 1, ids[row, at]]
                        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
                        slope = sum((one * other).sum() for one, other in zip(slopes, along, strict=True))
                        expected = float(slope.detach())
                        curved = torch.autograd.grad(slope, parameters, retain_graph=True)
                        products = [one + other for one, other in zip(products, curved, strict=True)]
                    assert float(found.derivatives[number, row, at]) == pytest.approx(expected, rel=close, abs=close)
            for name, expected in zip(names, products, strict=True):
                torch.testing.assert_close(found.products[name][number], expected, rtol=close, atol=close)
