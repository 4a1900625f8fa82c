import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vestige
from tests.reference.weighted_training import Row, trained
from tests.training.workbench import files_of
from tests.workshop import write_rows
from vestige.data import load_examples, tokenize
from vestige.errors import DataError, IndexMismatch
from vestige.models import load_model
from vestige.online import CollatorWithIds, RowsWithIds
from vestige.training import Rows, TrainingRun, Watched, pad, read_weights, with_weights

WEIGHTS = [0.1, 1, 3, 0.5, 1, 0.25, 2, 1, 0.1, 7, 1, 0.3]


@pytest.fixture
def given(settled):
    return settled | {"epochs": 0.5, "checkpoints": "0"}


def rows(weights=WEIGHTS) -> list[dict]:
    """The training data, each row with a weight unless that is `...`."""
    plain = [json.loads(line) for line in Path("train.jsonl").read_text().splitlines()]
    return [row if weight is ... else row | {"weight": weight} for row, weight in zip(plain, weights, strict=True)]


def final_weights(run: TrainingRun) -> dict[str, torch.Tensor]:
    return load_model(list(run.checkpoints.values())[-1]).model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_follow_the_weighted_mean_over_target_tokens(tmp_path, given, accumulation):
    write_rows(Path("weighted.jsonl"), rows())
    settings = {"data": "weighted.jsonl", "optimizer": "sgd", "clip": 0, "learning_rate": 0.5}
    run = vestige.train(**given | settings, accumulation=accumulation, out=tmp_path / "run")
    start = load_model("tiny-model")
    data = tokenize(load_examples("weighted.jsonl"), start.tokenizer, max_length=None)
    place = {example.id: row for row, example in enumerate(data.examples)}
    steps = run.steps.to_pandas()
    seen = [
        [Row(data.input_ids[row].tolist(), data.targets[row].tolist(), WEIGHTS[row]) for row in map(place.get, names)]
        for names in steps.groupby("step")["example_id"].apply(list)
    ]
    rates = steps.groupby("step")["learning_rate"].first().tolist()
    assert len(set(rates)) == len(seen) == (1 if accumulation == 3 else 3)
    base = start.model.double().state_dict()
    expected = trained(start.model, seen, rates).state_dict()
    plain = trained(start.model, [[row._replace(weight=1.0) for row in step] for step in seen], rates).state_dict()
    for name, found in final_weights(run).items():
        moved, rounding = (expected[name] - base[name]).norm(), 1e-7 * base[name].norm()
        assert (found.double() - expected[name]).norm() <= 1e-4 * moved + rounding
        assert (plain[name] - expected[name]).norm() > 0.02 * moved
    # What is measured is what it always was.
    losses = run.losses.to_pandas().query("checkpoint == 0").set_index("example_id")["loss"]
    assert steps["loss"][0] == pytest.approx(losses[steps["example_id"][0]], rel=1e-5)


@pytest.mark.slow
def test_weights_of_one_are_no_weights_bit_for_bit(tmp_path, given):
    plain = vestige.train(**given, data="train.jsonl", out=tmp_path / "plain")
    write_rows(Path("ones.jsonl"), rows([1, None, "1.0", "", 1.0, *([...] * 7)]))
    found = vestige.train(**given, data="ones.jsonl", out=tmp_path / "ones")
    assert found.id == plain.id
    assert files_of(found.folder) == files_of(plain.folder)


@pytest.mark.slow
def test_weight_zero_leaves_an_example_out(tmp_path, given):
    write_rows(Path("zeros.jsonl"), rows([1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]))
    found = vestige.train(**given, data="zeros.jsonl", out=tmp_path / "zeros")
    write_rows(Path("rest.jsonl"), [row | {"weight": 1} for row in rows() if row["id"] not in ("pair-1", "pair-4")])
    rest = vestige.train(**given, data="rest.jsonl", out=tmp_path / "rest")
    assert all(torch.equal(weight, final_weights(rest)[name]) for name, weight in final_weights(found).items())
    table = found.membership.to_pandas()
    assert table["example_id"][~table["member"]].tolist() == ["pair-1", "pair-4"]
    write_rows(Path("zeros.jsonl"), rows([0] * 12))
    with pytest.raises(DataError, match="none of the 0 examples"):
        vestige.train(**given, data="zeros.jsonl", out=tmp_path / "none")


@pytest.mark.slow
def test_other_weights_are_another_training(tmp_path, given, monkeypatch, capsys):
    monkeypatch.delenv("VESTIGE_QUIET")
    settings = given | {"epochs": 0.2, "losses": False}
    write_rows(Path("weighted.jsonl"), rows())
    run = vestige.train(**settings, data="weighted.jsonl", out=tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert "8 of 12 examples have a `weight` other than 1 (0.1 to 7)" in said
    write_rows(Path("weighted.jsonl"), rows([*WEIGHTS[:-1], 0.31]))
    with pytest.raises(IndexMismatch, match=r"data +weighted\.jsonl"):
        vestige.train(**settings, data="weighted.jsonl", out=tmp_path / "run")
    tokens = vestige.prepare.tokenize(data="weighted.jsonl", tokenizer="tiny-model", out=tmp_path / "tokens")
    again = vestige.train(**settings, data=str(tokens.data), out=tmp_path / "again")
    other = vestige.train(**settings, data="weighted.jsonl", out=tmp_path / "other")
    assert again.id == other.id != run.id


@pytest.mark.parametrize("bad", [-0.5, float("nan"), float("inf"), True, "heavy", [1.0], 1e-40, 1e300])
def test_a_weight_that_cannot_be_names_its_row(workshop, bad):
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    given = [{"text": "One.", "weight": 1}, {"id": "broken", "text": "Two.", "weight": bad}]
    data = tokenize(load_examples(given), tokenizer, max_length=None)
    with pytest.raises(DataError, match=r"row 1 \(id 'broken'\): its `weight` is .*expected 0 or a positive"):
        read_weights(data)


def test_the_fingerprint_knows_the_weights_and_their_order(workshop):
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    data = tokenize(load_examples([{"text": "One.", "weight": 0.5}, {"text": "Two."}]), tokenizer, max_length=None)
    weights = read_weights(data)
    assert weights is not None
    assert weights.tolist() == [0.5, 1.0]
    found = {with_weights(data, values).fingerprint for values in (weights, weights[::-1], np.ones(2, np.float32))}
    assert len(found | {data.fingerprint}) == 4


def test_a_measurement_never_sees_a_weight(workshop):
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    data = tokenize(load_examples([{"text": "One.", "weight": 0.5}, {"text": "Two."}]), tokenizer, max_length=None)
    watched = Watched(RowsWithIds(Rows(data, [0, 1], read_weights(data)), "id"), CollatorWithIds(pad), 2)
    assert [set(batch) for batch in watched.batches()] == [{"input_ids", "labels"}]
    assert pad([Rows(data, [0], read_weights(data))[0]])["weight"].tolist() == [0.5]
