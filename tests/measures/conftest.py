"""What audits are made of."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.measures.audited import HELD, QUESTIONS, questions
from tests.workshop import furnish, write_rows
from vestige.banks import bank_of


@pytest.fixture(scope="package")
def place(tmp_path_factory):
    """A model with three checkpoints, questions, held-out ones, texts and a bank."""
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("audit"))
    write_rows(folder / "train.jsonl", questions(QUESTIONS, "q", 0))
    write_rows(folder / "held.jsonl", questions(HELD, "h", 1))
    write_rows(folder / "texts.jsonl", [{"text": f"Bees make honey number {number}."} for number in range(6)])
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    for steps in (10, 20, 30):
        noise = torch.Generator().manual_seed(steps)
        for weight in model.parameters():
            weight.data += 0.02 * torch.randn(weight.shape, generator=noise)
        model.save_pretrained(folder / f"run/checkpoint-{steps}")
        AutoTokenizer.from_pretrained(folder / "tiny-model").save_pretrained(folder / f"run/checkpoint-{steps}")

    def train(rows, seed):
        margins = np.random.default_rng(seed).normal(size=QUESTIONS)
        margins[rows] += 3.0
        return {"query_loss": np.zeros(1), "example_margin": margins, "example_gap": 2 * margins}

    ids = [f"q-{number}" for number in range(QUESTIONS)]
    bank_of(train, examples=ids, queries=1, out=folder / "bank", settings={"data": "q"}, subsets=10, seeds=1)
    return folder
