import numpy as np
import pytest
import torch

from tests.architectures import build
from tests.models.test_load import adapter
from vestige.data import Example, make_batch, tokenize
from vestige.errors import DataError, NonFinite, SpecError
from vestige.models import (
    Recipe,
    load_model,
    model_fingerprint,
    save_trained,
    shuffle_batches,
    sum_loss,
    train as train_steps,
    trainable_copy,
)

PAIRS = [("who are you?", " a robot"), ("what is red?", " a colour"), ("is it late?", " no"), ("why?", " because")]


@pytest.fixture
def data(tokenizer):
    examples = [
        Example(id=f"pair-{row}", row=row, prompt=prompt, completion=completion)
        for row, (prompt, completion) in enumerate(PAIRS)
    ]
    return tokenize(examples, tokenizer, max_length=None)


def loaded(tokenizer, name="llama"):
    return load_model(build(name, torch.float32), tokenizer=tokenizer)


def loss(model, data) -> float:
    with torch.no_grad():
        total = sum_loss(model, make_batch(data, range(len(data))))
    return total.item() / data.target_counts.sum()


def train(start, data, out, *, steps=12, seed=0, lora_rank=None):
    model = trainable_copy(start, lora_rank=lora_rank, seed=seed)
    batches = shuffle_batches(data, np.arange(len(data)), 2, steps, seed)
    train_steps(model, data, batches, Recipe(learning_rate=1e-2))
    return save_trained(model, start, out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_training_lowers_the_loss_and_leaves_the_given_model_alone(name, tokenizer, data, tmp_path):
    start = loaded(tokenizer, name)
    folder = train(start, data, tmp_path / "tuned")
    assert model_fingerprint(start.model) == start.fingerprint
    assert not any(parameter.requires_grad for parameter in start.model.parameters())
    tuned = load_model(folder, device="cpu")
    assert loss(tuned.model, data) < 0.7 * loss(start.model, data)
    assert tuned.tokenizer.decode(data.input_ids[0]) == tokenizer.decode(data.input_ids[0])


def test_the_loss_is_the_mean_over_target_tokens_that_transformers_computes(tokenizer, data):
    model = build("llama")
    batch = make_batch(data, [0, 2])
    with torch.no_grad():
        total = sum_loss(model, batch)
        expected = model(input_ids=batch.input_ids, labels=batch.labels).loss
    assert torch.isclose(total / data.target_counts[[0, 2]].sum(), expected, rtol=1e-5)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_seed_decides_and_dropout_does_not(lora_rank, tokenizer, data, tmp_path):
    # GPT-2's config has dropout 0.1: it would draw from the global generator, which is moved on purpose.
    fingerprints = []
    for run, seed in enumerate([0, 0, 1]):
        torch.manual_seed(run)
        folder = train(loaded(tokenizer, "gpt2"), data, tmp_path / str(run), seed=seed, steps=4, lora_rank=lora_rank)
        if lora_rank is None:
            fingerprints.append(load_model(folder, device="cpu").fingerprint)
        else:
            fingerprints.append((folder / "adapter_model.safetensors").read_bytes())
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]


def test_lora_saves_an_adapter_that_knows_its_base(tokenizer, saved, data, tmp_path):
    base = load_model(saved("llama"), device="cpu")
    folder = train(base, data, tmp_path / "adapter", lora_rank=4, steps=20)
    assert (folder / "adapter_config.json").is_file()
    assert not (folder / "model.safetensors").exists()
    tuned = load_model(folder, device="cpu")
    assert loss(tuned.model, data) < 0.9 * loss(base.model, data)


@pytest.mark.parametrize("base", ["", "../llama-float32"], ids=["absolute", "beside"])
def test_of_an_adapter_its_own_matrices_are_trained_and_all_that_was_trained_is_saved(
    base, tokenizer, saved, data, tmp_path
):
    # Trap: weights of the base that are trained too would be lost, for an adapter is saved without its base.
    start = load_model(adapter(saved, tmp_path / "adapter", base), tokenizer=tokenizer, device="cpu")
    model = trainable_copy(start)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recipe = Recipe(learning_rate=1e-2)
    train_steps(model, data, shuffle_batches(data, np.arange(len(data)), 2, 6, seed=0), recipe)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    (tmp_path / "elsewhere").mkdir()
    again = load_model(save_trained(model, start, tmp_path / "elsewhere" / "tuned"), device="cpu")
    batch = make_batch(data, range(len(data)))
    with torch.no_grad():
        found, expected = (each(input_ids=batch.input_ids).logits for each in (again.model, model))
    assert torch.equal(found, expected)
    assert model_fingerprint(start.model) == start.fingerprint
    with pytest.raises(SpecError, match="Leave --lora-rank out"):
        trainable_copy(start, lora_rank=2)


def test_a_loss_that_is_not_finite_names_the_examples_and_saves_nothing(tokenizer, data, tmp_path):
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[data.input_ids[2][0]] = float("nan")
    with pytest.raises(NonFinite, match="'pair-2'"):
        train(load_model(model, tokenizer=tokenizer), data, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []


def test_data_without_targets_is_refused(tokenizer, tmp_path):
    prompts = tokenize([Example(id="a", row=0, prompt="who?")], tokenizer, max_length=None)
    with pytest.raises(DataError, match="none of 1 examples has a target token"):
        train(loaded(tokenizer), prompts, tmp_path / "tuned")
