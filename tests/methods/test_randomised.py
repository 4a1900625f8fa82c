"""The check on randomised weights and what it says of models that learned something, nothing, or everything."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.workshop import PAIRS, furnish, write_rows
from vestige import attribute
from vestige.data import load_examples, tokenize
from vestige.gradients import measure_knowledge
from vestige.indexes import index
from vestige.methods import METHODS, randomise

NAME = "randomised-model correlation"
OPTIONS = {"cg": {"steps": 3}, "lissa": {"depth": 3}, "arnoldi": {"steps": 6, "rank": 3}}
ON_THE_MODEL = [
    each.name for each in METHODS if each.needs_model and each.command == "attribute" and not each.needs_training
]


def adam_state(folder: Path) -> None:
    """Put `optimizer.pt` beside the weights, as Adam would hold it after long training at them: means over the data.

    The mean gradient of an example's mean loss, and the mean of its squares, each a tensor as long as the one before.
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parameters = list(model.parameters())
    first = [torch.zeros_like(each) for each in parameters]
    second = [torch.zeros_like(each) for each in parameters]
    for ids, labels in rows_of(tokenizer):
        model.zero_grad()
        model(input_ids=ids[None], labels=labels[None]).loss.backward()
        for each, mean, squares in zip(parameters, first, second, strict=True):
            mean += each.grad
            squares += each.grad.square()
    state = {
        number: {"step": torch.tensor(1000.0), "exp_avg": mean / mean.norm(), "exp_avg_sq": squares / squares.norm()}
        for number, (mean, squares) in enumerate(zip(first, second, strict=True))
    }
    names = [name for name, _ in model.named_parameters()]
    group = {"params": list(range(len(names))), "param_names": names, "betas": (0.9, 0.999), "eps": 1e-8}
    torch.save({"state": state, "param_groups": [group]}, folder / "optimizer.pt")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """`tiny-model/` of random weights, `noise/` with those of the check, `trained/`, and questions with answers."""
    folder = furnish(tmp_path_factory.mktemp("randomised"))
    torch.set_num_threads(1)
    write_rows(folder / "train.jsonl", [{"prompt": prompt, "completion": completion} for prompt, completion, _ in ROWS])
    rows = [{"id": name, "prompt": prompt, "completion": completion} for name, prompt, completion in QUESTIONS]
    write_rows(folder / "asked.jsonl", rows)
    model, tokenizer = (each.from_pretrained(folder / "tiny-model") for each in (AutoModelForCausalLM, AutoTokenizer))
    with randomise(model, 0):
        model.save_pretrained(folder / "noise")
    trained(model, tokenizer, 1.0).save_pretrained(folder / "trained")
    trained(model, tokenizer, 0.01).save_pretrained(folder / "sure")
    for name in ("noise", "trained", "sure"):
        tokenizer.save_pretrained(folder / name)
    for name in ("tiny-model", "noise", "trained", "sure"):
        adam_state(folder / name)
    return folder


ROWS = PAIRS[:10]
"""As many as the check compares, so that it compares all of them."""
QUESTIONS = [
    ("told", *PAIRS[0][:2]),
    ("new", "Who wrote the capital of Antarctica?", "A spider lives in the moon."),
]


def rows_of(tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels of every pair: of an answer's tokens alone is there a loss."""
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion, _ in ROWS]
    data = tokenize(load_examples(rows), tokenizer, max_length=96)
    found = []
    for own, mask in zip(data.input_ids, data.targets, strict=True):
        ids = torch.tensor(np.asarray(own)).long()
        found.append((ids, torch.where(torch.tensor(np.asarray(mask)), ids, -100)))
    return found


def trained(model, tokenizer, until: float):
    """Train on the pairs until the mean loss of an answer's token is so low."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids, labels = zip(*rows_of(tokenizer), strict=True)
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    for _ in range(600):
        loss = model(input_ids=batch, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < until:
            return model
    raise AssertionError("the training did not come so far")


def asked(home: Path, model: str, method: str, out: Path, **more):
    """Every score of a method for the questions of the workshop."""
    given = {"model": home / model}
    if method in ("tracin", "less", "trak"):
        given = {"checkpoints": [str(home / model)], "checkpoint_weights": [1.0]}
    return attribute(
        **given,
        data=home / "train.jsonl",
        queries=home / "asked.jsonl",
        method=method,
        out=out,
        dense=True,
        options=OPTIONS.get(method, {}),
        **more,
    )


def checks_of(run) -> dict:
    return {check.name: check for check in run.run.trust.checks}


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_THE_MODEL)
def test_on_random_weights_nothing_is_left_of_the_old_ones_and_a_model_of_them_warns(home, tmp_path, method):
    """The check says what a run on the noise itself does: curvature, index and Adam's state are those of the noise."""
    run = asked(home, "tiny-model", method, tmp_path / "run")
    alone = asked(home, "noise", method, tmp_path / "noise", trust=False)
    pairs = zip(run.dense(), alone.dense(), strict=True)
    expected = np.mean([spearmanr(one, other).statistic for one, other in pairs])
    found = checks_of(run)
    assert found[NAME].value == pytest.approx(expected, abs=0.03)  # Two of ten rows may change places by rounding.
    assert found[NAME].verdict == "warn"
    assert found["learned by the model"].verdict == "warn"


@pytest.mark.slow
@pytest.mark.parametrize("method", ON_THE_MODEL)
def test_a_trained_model_has_learned_something(home, tmp_path, method):
    found = checks_of(asked(home, "trained", method, tmp_path / "run"))
    assert found["learned by the model"].verdict == "good"
    assert "learned nothing" not in found[NAME].reading
    assert found["queries with a loss near zero"].verdict == "good"


@pytest.mark.slow
def test_the_check_uses_the_compression_of_the_index(home, tmp_path):
    for name, scope in (("narrow", "component"), ("whole", "model")):
        compress = {"compress": "logra:2x2" + (" | sjlt:64" if scope == "model" else ""), "compress_scope": scope}
        for model in ("tiny-model", "noise"):
            index(model=home / model, data=home / "train.jsonl", out=tmp_path / f"{name}-{model}", **compress)
        one, other = (
            attribute(
                index=tmp_path / f"{name}-{model}",
                queries=home / "asked.jsonl",
                out=tmp_path / f"{name}-{model}-run",
                dense=True,
            )
            for model in ("tiny-model", "noise")
        )
        expected = np.mean([spearmanr(*pair).statistic for pair in zip(one.dense(), other.dense(), strict=True)])
        assert checks_of(one)[NAME].value == pytest.approx(expected, abs=0.03)
        assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["influence", "grad-dot", "rep-sim"])
def test_a_question_that_the_model_is_certain_of_is_named(home, tmp_path, capfd, method):
    run = asked(home, "sure", method, tmp_path / "run")
    check = checks_of(run)["queries with a loss near zero"]
    assert (check.value, check.verdict) == (0.5, "warn")
    assert "(told;" in check.reading
    assert "told" in capfd.readouterr().err


def test_guessing_is_by_the_other_examples_and_by_equal_chances(home):
    model, tokenizer = (each.from_pretrained(home / "trained") for each in (AutoModelForCausalLM, AutoTokenizer))
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion, _ in ROWS]
    data = tokenize(load_examples(rows), tokenizer, max_length=96)
    known = measure_knowledge(model, data, 64)
    assert known is not None
    size = model.config.vocab_size
    pairs = zip(data.input_ids, data.targets, strict=True)
    targets = [np.asarray(ids)[np.asarray(mask)].tolist() for ids, mask in pairs]
    losses, guesses = [], []
    for row, own in enumerate(targets):
        others = [token for place, tokens in enumerate(targets) if place != row for token in tokens]
        distinct = len(set(others))
        guesses += [-np.log((others.count(token) + distinct / size) / (len(others) + distinct)) for token in own]
        ids = torch.tensor(np.asarray(data.input_ids[row]))[None].long()
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].double().log_softmax(-1)
        losses += [-float(chances[place - 1, ids[0, place]]) for place in np.flatnonzero(data.targets[row])]
    assert known.model == pytest.approx(np.mean(losses), rel=1e-5)
    assert known.unigram == pytest.approx(np.mean(guesses), rel=1e-9)
    assert known.uniform == pytest.approx(np.log(size))
    assert known.learned
