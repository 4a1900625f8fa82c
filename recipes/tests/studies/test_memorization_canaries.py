import numpy as np
import pytest
import torch

from vestige.errors import IndexMismatch
from vestige.measures import Interval
from vestige.models import load_model
from vestige_recipes import study
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.memorization import canaries as room
from vestige_recipes.memorization.targets import claim_folder


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("canaries") / "study"


@pytest.fixture(scope="module")
def report(out):
    return study("memorization-canaries", size="tiny", out=out, seeds=1)


def test_canaries_have_one_length_and_a_name_and_a_number_of_copies_each():
    found = room.make_canaries(5, 0)
    assert len({len(text) for text in found.texts}) == 1
    assert len(set(found.beginnings)) == 5 * len(room.COPIES)
    assert all(secret.isdigit() and len(secret) == room.DIGITS for secret in found.secrets)
    assert np.unique(found.copies, return_counts=True)[1].tolist() == [5] * len(room.COPIES)
    assert found.texts != room.make_canaries(5, 1).texts


def test_each_canary_stands_in_the_training_text_as_often_as_it_should(report, out):
    lines = (out / "seed-0" / "texts.jsonl").read_text()
    canaries = room.make_canaries(room.PLANS["tiny"].canaries, 0)
    for text, copies in zip(canaries.texts, canaries.copies, strict=True):
        assert lines.count(f'"{text.decode()}"') == copies


def test_losses_of_secrets_are_those_of_their_digits():
    model = load_model(byte_gpt(32, 8, 1)).model
    found = room._losses(model, b"the code is ", [b"123", b"987"])
    tokens = torch.tensor([list(b"the code is 123")])
    chances = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    expected = -sum(chances[place - 1, tokens[0, place]] for place in range(12, 15))
    assert found[0] == pytest.approx(float(expected), abs=1e-6)
    assert found.shape == (2,)


def test_the_gates_ask_for_both_to_rise_and_for_chance_without_copies():
    def intervals(values):
        return {
            count: Interval(value, value - 0.1, value + 0.1) for count, value in zip(room.COPIES, values, strict=True)
        }

    good = room.gates_of(intervals([1.4, 1.6, 3, 6, 9]), intervals([0, 0, 0.2, 0.8, 1]))
    assert len(good) == 10
    assert all(gate.passed for gate in good)
    assert good[8].seen == pytest.approx(8.9 - 1.7)
    bad = room.gates_of(intervals([4.0, 1.6, 3, 2.5, 9]), intervals([0, 0.1, 0, 0.8, 1]))
    assert [gate.passed for gate in bad] == [False, True, False, True, True, False, True, True, True, False]


@pytest.mark.slow
def test_a_model_that_learns_one_canary_gives_it_back_and_exposes_it(tmp_path):
    plan = room.CanaryPlan(canaries=1, candidates=63, text=16, epochs=20, width=32, layers=1, learning_rate=5e-3)
    found = room._measure(plan, 0, tmp_path)
    often = found["copies"] == 64
    assert found["exposure"][often] == 6.0
    assert found["similarity"][often] == 1.0
    with pytest.raises(IndexMismatch):
        claim_folder(tmp_path, "something else")


def test_the_tiny_study_tells_every_number_of_copies_and_is_read_again(report, out):
    assert report.gates == ()
    assert [row[0] for row in report.rows if row[1] == "exposure, bits"] == list(room.COPIES)
    assert (out / "canaries.png").read_bytes().startswith(b"\x89PNG")
    again = study("memorization-canaries", size="tiny", out=out, seeds=1)
    assert again.rows == report.rows
