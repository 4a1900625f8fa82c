import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.mark.slow
def test_a_sound_model_ends_with_status_0_and_leaves_nothing(vestige, workshop):
    before = sorted(workshop.rglob("*"))
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "train.jsonl")
    assert outcome.status == 0
    assert "good  batch invariance" in outcome.out
    assert outcome.out.rstrip().splitlines()[-1].startswith("Nothing is bad.")
    assert sorted(workshop.rglob("*")) == before


@pytest.mark.slow
def test_a_broken_model_ends_with_status_1_and_the_report(vestige, workshop):
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    model.save_pretrained(workshop / "tiny-model")
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "train.jsonl")
    assert outcome.status == 1
    assert "BAD   finite gradients" in outcome.out
    assert outcome.out.rstrip().splitlines()[-1].startswith("Bad: finite gradients")


def test_a_mistake_is_status_2(vestige, workshop):
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "nowhere.jsonl")
    assert outcome.status == 2
    assert outcome.out == ""
