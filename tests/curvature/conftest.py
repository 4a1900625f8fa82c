import dataclasses

import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import tokenized
from tests.reference.gradients import example_gradients
from vestige.curvature import CurvatureData
from vestige.data import TokenizedData
from vestige.models import select_components


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measured(name: str, *patterns: str, train: int = 6, labels="data", budget: int = 4096, **given) -> CurvatureData:
    """A float64 model of the table with a few of its parameters selected."""
    model = build(name)
    components = select_components(model, patterns).components
    return CurvatureData(model, components, tokenized(train, 1, "t"), budget, labels=labels, **given)


def canonical(component, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the parameter's own shape as `[out, in]`."""
    return (tensor.T if tensor.ndim == 2 and component.uses[0].kind == "conv1d" else tensor).reshape(component.shape)


def reference_gradients(given: CurvatureData) -> list[list[torch.Tensor]]:
    """For every component the gradient `[out, in]` of every example."""
    model, found = build(name_of(given)), []
    for ids, targets in zip(given.data.input_ids, given.data.targets, strict=True):
        found.append(example_gradients(model, torch.as_tensor(ids).long(), torch.as_tensor(targets)))
    return [[canonical(part, one[part.name]) for one in found] for part in given.components]


def name_of(given: CurvatureData) -> str:
    return {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "GPTNeoXForCausalLM": "neox"}[
        type(given.model).__name__
    ]


def with_targets(data: TokenizedData, kind: str) -> TokenizedData:
    """The same tokens, of which the last is the only target, or the second half but for the last two tokens."""
    places = [np.arange(len(ids)) for ids in data.input_ids]
    if kind == "last":
        masks = [place == len(place) - 1 for place in places]
    else:
        masks = [(place > 0) & (place >= len(place) // 2) & (place < max(len(place) - 2, 2)) for place in places]
    return dataclasses.replace(data, targets=masks)


def random_vectors(given: CurvatureData, queries: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(queries, part.size, generator=generator, dtype=torch.float64) for part in given.components]
