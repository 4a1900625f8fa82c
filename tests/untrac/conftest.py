import dataclasses

import pytest
import torch

from tests.architectures import build
from tests.methods.conftest import tokenized
from vestige.data import TokenizedData
from vestige.methods import UntracJob, make_job
from vestige.models import LoadedModel, model_fingerprint
from vestige.settings import UntracSettings


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded_model(architecture="gpt2", dtype=torch.float64) -> LoadedModel:
    model = build(architecture, dtype)
    model.eval()
    model.requires_grad_(False)
    return LoadedModel(model, None, architecture, model_fingerprint(model), 32)


def with_sources(data: TokenizedData, names) -> TokenizedData:
    examples = [dataclasses.replace(each, source=name) for each, name in zip(data.examples, names, strict=True)]
    return dataclasses.replace(data, examples=examples)


def training_data(count=12, sources=3) -> TokenizedData:
    return with_sources(tokenized(count, 1, "t"), [f"s{row % sources}" for row in range(count)])


def query_data(count=6, sets=2) -> TokenizedData:
    return with_sources(tokenized(count, 2, "q"), [f"test{row % sets}" for row in range(count)])


def a_job(tmp_path, *, architecture="gpt2", dtype=torch.float64, train=None, tests=None, **given) -> UntracJob:
    given = {"learning_rate": 1e-3, "out": tmp_path / "run", "token_budget": 64} | given
    settings = UntracSettings(model="m", data="d", queries="q", **given)
    return make_job(settings, loaded_model(architecture, dtype), train or training_data(), tests or query_data())
