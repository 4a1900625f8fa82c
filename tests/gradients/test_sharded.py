"""A model that is spread over processes (FSDP2) or over devices: the gradients of the whole one."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from accelerate import dispatch_model
from torch import Tensor

from tests.architectures import build, sequences
from vestige.compress import CompressingSink, parse_spec
from vestige.gradients import CausalLoss, GradientPass, GradientSink
from vestige.models import select_components

CLOSE = {"rtol": 2e-5, "atol": 2e-6}
"""float32: the head runs inside autograd where weights are gathered, and in chunks outside of it elsewhere."""


@pytest.mark.slow
def test_gradients_and_sketches_under_fully_shard_are_those_of_one_process():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, "-m", "tests.gradients.test_sharded"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("equal") == 2


def test_gradients_of_a_dispatched_model_are_those_of_the_model():
    model = _model()
    components = select_components(model, ("all",)).components
    batch = sequences().batch([0, 1, 2, 3])
    before = _measured(model, components, batch)
    # Here there is only one device; the hooks that move tensors between devices are those of several.
    places = {name: "cpu" for name, _ in model.named_children()}
    dispatched = dispatch_model(model, places, main_device="cpu", force_hooks=True)
    for found, expected in zip(_measured(dispatched, components, batch), before, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


class _Measured(NamedTuple):
    losses: Tensor
    gradients: list[Tensor]
    sketches: Tensor


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build("llama", torch.float32).eval().requires_grad_(False)


def _measured(model, components, batch) -> _Measured:
    whole = GradientSink(components)
    whole.begin(len(batch.labels), "cpu")
    compressors = [parse_spec("tensorsketch:16").build(one.name, one.shape, 0, "cpu") for one in components]
    starts = [sum(one.size for one in compressors[:number]) for number in range(len(compressors))]
    sketch = CompressingSink(compressors, starts, starts[-1] + compressors[-1].size)
    sketch.begin(len(batch.labels), "cpu")
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        losses = gradient_pass.run(batch, whole)
        gradient_pass.run(batch, sketch)
    return _Measured(losses, whole.gradients, sketch.gradients)


def main() -> None:
    """One rank: its own half of the examples, with the whole model and with its part of the weights."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = _model()
    components = select_components(model, ("all",)).components
    mine = sequences().batch([0, 1] if dist.get_rank() == 0 else [2, 3])
    alone = _measured(model, components, mine)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    assert held < 0.6 * numbers, "each process still holds the whole model"
    together = _measured(model, components, mine)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)
    print("equal", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
