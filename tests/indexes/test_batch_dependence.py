"""Models whose forward pass depends on the batch: kept apart, or refused; a token budget changes no score."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from torch import nn
from transformers import CpmAntConfig, CpmAntForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

import vestige
from tests.architectures import VOCABULARY, build, move_off_start
from vestige.data import Example, Sharing
from vestige.errors import ModelError
from vestige.models import batch_sharing, generate_answers, load_model

SWITCH = 12
LENGTHS = (5, 20, 9, 12, 13, 4, 30, 12, 3, 26)


def phi3() -> nn.Module:
    """A long-context Phi-3 that takes its long factors beyond 12 tokens."""
    torch.manual_seed(0)
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0], "factor": 4.0, "rope_theta": 1e4}
    config = Phi3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=48,
        original_max_position_embeddings=SWITCH,
        rope_parameters={"rope_type": "longrope", "original_max_position_embeddings": SWITCH, **factors},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return move_off_start(Phi3ForCausalLM(config)).eval()


def cpm_ant() -> nn.Module:
    torch.manual_seed(0)
    config = CpmAntConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_attention_heads=2,
        dim_head=8,
        dim_ff=24,
        num_hidden_layers=2,
        prompt_length=2,
        prompt_types=4,
        segment_types=4,
        position_bias_num_buckets=16,
        position_bias_max_distance=32,
    )
    return move_off_start(CpmAntForCausalLM(config)).eval()


@pytest.fixture
def rows() -> list[dict]:
    generator = np.random.default_rng(0)
    return [
        {"id": f"row-{number}", "input_ids": generator.integers(3, VOCABULARY, length).tolist()}
        for number, length in enumerate(LENGTHS)
    ]


@pytest.fixture
def indexed(tmp_path, rows, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")

    def run(model, name: str, data=rows, **settings) -> vestige.Index:
        settings = {"compress": "none", "dtype": "float32"} | settings
        return vestige.index(model=model, data=data, out=tmp_path / name, **settings)

    return run


def alone(model: nn.Module, ids: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one example by autograd."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    tokens = torch.tensor([ids])
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].double()
    loss = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.requires_grad_(False)
    return float(loss.detach()), found


@pytest.mark.parametrize("budget", [None, 64, 1])
def test_long_and_short_factors_never_meet_whatever_the_budget(indexed, rows, budget):
    model = phi3()
    assert batch_sharing(model).switches == (SWITCH,)
    index = indexed(model, f"idx-{budget}", token_budget=budget)
    gradients, losses = read(index)
    reference = phi3()
    for row, given in enumerate(rows):
        loss, expected = alone(reference, given["input_ids"])
        assert losses[row] == pytest.approx(loss, rel=1e-5)
        flat = torch.cat([expected[part.name].reshape(-1) for part in index.manifest.components])
        assert float((gradients[row] - flat).norm()) <= 1e-5 * float(flat.norm())


def read(index) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [load_file(path) for path in sorted((index.folder / "shards").glob("*.safetensors"))]
    order = torch.cat([part["example"] for part in parts]).argsort()
    return (
        torch.cat([part["gradients"] for part in parts])[order],
        torch.cat([part["loss"] for part in parts])[order],
    )


def test_ordinary_models_are_batched_as_ever(indexed):
    index = indexed(build("llama", torch.float32), "ordinary")
    assert batch_sharing(build("llama", torch.float32)) == Sharing()
    assert json.loads((index.folder / "manifest.json").read_text())["token_budget"] == 1024


@pytest.mark.slow
def test_a_mask_made_from_ids_is_found_before_any_work(indexed, tmp_path, rows):
    short = [row for row in rows if len(row["input_ids"]) < 20]
    with pytest.raises(ModelError, match=r'"row-\d".*depends on the batch.*token_budget=1'):
        indexed(cpm_ant(), "cpm", short, components="all")
    assert not (tmp_path / "cpm" / "shards").exists()
    index = indexed(cpm_ant(), "alone", short, token_budget=1)
    _, losses = read(index)
    reference = cpm_ant()
    for row, given in enumerate(short):
        assert losses[row] == pytest.approx(alone(reference, given["input_ids"])[0], rel=1e-5)


def test_a_layer_that_mixes_the_batch_is_found_before_any_work(indexed):
    model = build("llama", torch.float32)
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: output + output.mean(0, keepdim=True)
    )
    with pytest.raises(ModelError, match="depends on the batch"):
        indexed(model, "mixed")


@pytest.mark.slow
def test_the_doctor_says_where_the_factors_change(rows, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    found = vestige.doctor(model=phi3(), data=rows)
    check = found["batch invariance"]
    assert check.verdict == "warn"
    assert "beyond 12 tokens" in check.advice
    assert "4 of 10 examples are longer" in check.advice
    assert found["padding"].verdict == "good"
    short = vestige.doctor(model=phi3(), data=[row for row in rows if len(row["input_ids"]) <= SWITCH])
    assert short["batch invariance"].verdict == "good"


@pytest.mark.slow
def test_the_doctor_tries_the_longest_and_the_shortest_together(monkeypatch):
    """Four short examples of like length would not show it."""
    monkeypatch.setenv("VESTIGE_QUIET", "1")
    model = build("llama", torch.float32)

    def lift(module, inputs, output):
        return output * (1.0 if output.shape[1] <= 20 else 1.1)

    model.model.layers[0].mlp.register_forward_hook(lift)
    generator = np.random.default_rng(1)
    data = [{"input_ids": generator.integers(3, VOCABULARY, length).tolist()} for length in (8, 8, 9, 9, 30)]
    assert vestige.doctor(model=model, data=data)["padding"].verdict == "bad"


def test_answers_of_such_a_model_are_those_of_each_prompt_alone():
    loaded = load_model(phi3(), tokenizer=_letters())
    prompts = ["ab", "abcabcabcabcabcabc", "c", "bbbbbbbbbbb"]
    examples = [Example(id=str(row), row=row, prompt=prompt) for row, prompt in enumerate(prompts)]
    together = [one.completion for one in generate_answers(loaded, examples, max_new_tokens=6)]
    single = [generate_answers(loaded, [one], max_new_tokens=6)[0].completion for one in examples]
    assert together == single


def _letters():
    tokens = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    core = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, []))
    core.decoder = decoders.Fuse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
