import pytest
import torch

from tests.architectures import build
from tests.models.test_load import adapter
from vestige.data import Example, make_batch, tokenize
from vestige.errors import NonFinite, SpecError
from vestige.gradients import token_losses
from vestige.models import load_model, model_fingerprint, save_trained, trainable_copy
from vestige.training import Recipe, Rows, fit

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
        total = token_losses(model, make_batch(data, range(len(data)))).sum()
    return total.item() / data.target_counts.sum()


def train(start, data, out, *, steps=12, seed=0, lora_rank=None):
    model = trainable_copy(start, lora_rank=lora_rank, seed=seed)
    fit(model, Rows(data, range(len(data))), Recipe(1e-2, batch_size=2), steps=steps, seed=seed)
    return save_trained(model.eval(), start, out)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_training_lowers_the_loss_and_leaves_the_given_model_alone(name, tokenizer, data, tmp_path):
    start = loaded(tokenizer, name)
    folder = train(start, data, tmp_path / "tuned")
    assert model_fingerprint(start.model) == start.fingerprint
    assert not any(parameter.requires_grad for parameter in start.model.parameters())
    tuned = load_model(folder, device="cpu")
    assert loss(tuned.model, data) < 0.7 * loss(start.model, data)
    assert tuned.tokenizer.decode(data.input_ids[0]) == tokenizer.decode(data.input_ids[0])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_the_mean_over_target_tokens_that_transformers_computes(accumulation, tokenizer, data):
    model = build("llama", torch.float32)
    batch = make_batch(data, range(4))
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, labels=batch.labels).loss
    seen = []
    recipe = Recipe(1e-2, batch_size=4 // accumulation, accumulation=accumulation)
    fit(model, Rows(data, range(4)), recipe, steps=1, seed=0, after_step=seen.append)
    assert [step.number for step in seen] == [1]
    assert seen[0].loss == pytest.approx(float(expected), rel=1e-5)


def test_an_example_without_weight_stays_in_its_batch_and_teaches_nothing(tokenizer, data):
    # Plain gradient descent on one batch: what moved the weights is the gradient of the others, over all targets.
    model, other = build("llama", torch.float32), build("llama", torch.float32)
    without = torch.tensor([False, True, False, False]).numpy()
    recipe = Recipe(0.5, batch_size=4, optimizer="sgd", clip=0.0)
    fit(model, Rows(data, range(4), without=without), recipe, steps=1, seed=0)
    kept = [row for row in range(4) if not without[row]]
    losses = token_losses(other, make_batch(data, kept)).sum() / data.target_counts.sum()
    losses.backward()
    for name, weight in other.named_parameters():
        moved = weight.detach() - 0.5 * weight.grad
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_seed_decides_the_order_and_dropout(lora_rank, tokenizer, data, tmp_path):
    # GPT-2's config has dropout 0.1: it must not draw from where the caller's generator stands.
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
    fit(model, Rows(data, range(len(data))), Recipe(1e-2, batch_size=2), steps=6, seed=0)
    model.eval()
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
    with pytest.raises(NonFinite, match=r"The loss of 'pair-[12]'( and|, 'pair-2'| in)"):  # the letter is in both
        train(load_model(model, tokenizer=tokenizer), data, tmp_path / "tuned")
    assert list(tmp_path.iterdir()) == []
