"""The cost model's counts against the operations that torch is asked for, and the order that follows from them."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vestige.compress import Work, compress_factors, cost_share, parse_spec, price, work

EXAMPLES, TOKENS = 2, 8


class Counting(TorchDispatchMode):
    """Counts multiply-adds, gathered numbers and transforms of everything that runs inside."""

    def __init__(self):
        super().__init__()
        self.products = self.gathered = self.transformed = self.folded = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm"):
            self.products += result.numel() * args[-2].shape[-1]
        elif name == "index_select" and args[1] == 1:
            self.gathered += result.numel()
        elif name.startswith("_embedding_bag"):
            self.gathered += args[1].numel() * args[0].shape[1]
        elif name in ("_fft_r2c", "_fft_c2r"):
            size = args[0].shape[-1] if name == "_fft_r2c" else args[3]
            self.transformed += args[0].numel() // args[0].shape[-1] * size * math.log2(size)
        elif name == "addcmul_" or (name == "mul" and isinstance(args[1], torch.Tensor) and args[1].dim() == 1):
            self.folded += args[0].numel()
        return result


def _counted(spec, shape):
    compressor = parse_spec(spec).build("layer", shape, 0)
    left, right = (torch.randn(EXAMPLES, TOKENS, size) for size in shape)
    with Counting() as counts:
        compress_factors(compressor, left, right)
    return counts


@pytest.mark.parametrize("shape", [(96, 64), (128, 512), (40, 200)])
@pytest.mark.parametrize(
    "spec",
    [
        "logra:8x8",
        "logra:64",
        "logra:16x4 | sjlt:16",
        "mask:16x16 | sjlt:64",
        "mask:16x16",
        "mask:32",
        "mask:60 | sjlt:16",
        "mask:2000 | sjlt:64",
        "sjlt:64",
        "sjlt:8x8",
        "gauss:16",
        "mask:8x8 | gauss:16",
        "none",
    ],
)
def test_the_model_counts_the_operations_that_run(spec, shape):
    counts, model = _counted(spec, shape), work(parse_spec(spec), shape, TOKENS)
    together = EXAMPLES * TOKENS
    assert counts.products == pytest.approx(model.products * together)
    assert counts.gathered == pytest.approx(model.gathered * together)
    assert counts.transformed == model.transformed == 0


@pytest.mark.parametrize("shape", [(96, 64), (128, 512), (40, 200)])
@pytest.mark.parametrize("size", [16, 32, 256])
def test_the_model_counts_the_folds_and_transforms_of_a_tensor_sketch(size, shape):
    counts, model = _counted(f"tensorsketch:{size}", shape), work(parse_spec(f"tensorsketch:{size}"), shape, TOKENS)
    together = EXAMPLES * TOKENS
    assert counts.products == model.products == 0
    assert counts.transformed == pytest.approx(model.transformed * together)
    assert counts.folded == model.streamed * together


def test_a_layer_kept_whole_costs_what_forming_its_gradient_costs():
    for spec in ("none", "tensorsketch:64", "logra:8x8", "mask:8x8 | sjlt:64"):
        assert work(parse_spec(spec), (8, 8), 10) == Work(products=64)


def _shares(shape, size, device="cpu", tokens=128):
    side = math.isqrt(size)
    specs = {
        "logra": f"logra:{side}x{side}",
        "factgrass": f"mask:{2 * side}x{2 * side} | sjlt:{size}",
        "tensorsketch": f"tensorsketch:{size}",
    }
    return {name: cost_share(parse_spec(spec), [shape], tokens, device) for name, spec in specs.items()}


@pytest.mark.parametrize("size", [64, 256, 1024, 4096])
@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536), (11008, 4096), (4096, 11008)])
def test_on_wide_layers_factgrass_is_cheapest_on_every_device(shape, size):
    for device in ("cpu", "cuda"):
        shares = _shares(shape, size, device, tokens=512)
        assert 1.5 * shares["factgrass"] < min(shares["logra"], shares["tensorsketch"])


@pytest.mark.parametrize("shape", [(1536, 576), (576, 1536)])
def test_a_wide_sketch_of_a_narrow_layer_is_where_transforms_cost_most(shape):
    shares = _shares(shape, 4096)
    assert shares["tensorsketch"] > 1.5 * shares["logra"] > 2 * shares["factgrass"]


def test_on_a_narrow_layer_factgrass_is_not_faster_than_logra():
    shares = _shares((128, 128), 256, tokens=64)
    assert 1 / 1.5 < shares["factgrass"] / shares["logra"] < 1.5
    assert shares["tensorsketch"] > 1.5 * max(shares["factgrass"], shares["logra"])


def test_an_unknown_device_is_priced_like_a_gpu():
    done = Work(1, 1, 1, 1)
    assert price(done, "mps") == price(done, "cuda") > price(done, "cpu")
