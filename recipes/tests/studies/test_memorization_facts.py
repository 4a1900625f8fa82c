import json

import numpy as np
import pytest
import torch

from vestige.measures import bank_evidence
from vestige.models import load_model
from vestige_recipes import study
from vestige_recipes.common.texts import byte_gpt
from vestige_recipes.memorization import facts as room
from vestige_recipes.memorization.facts import PER_CLASS, REPEATS, cast_shadows, make_facts, vocabulary
from vestige_recipes.memorization.judging import (
    LATE_SIGNS,
    SUCCESS,
    Contest,
    early_areas,
    late_areas,
    late_scores,
    mean_interval,
    proof_rows,
    proofs,
)
from vestige_recipes.memorization.targets import MEASURES, _exposure, make_prompts, read


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("facts") / "study"


@pytest.fixture(scope="module")
def report(out):
    return study("memorization-facts", size="tiny", out=out, seeds=1)


@pytest.fixture(scope="module")
def made(report, out):
    return cast_shadows(room.PLANS["tiny"], 0, out / "seed-0")


def test_prompts_follow_the_rule_but_for_flips_and_facts():
    found = make_facts(200, 12, 5, 0)
    words = vocabulary()
    first = np.array([ids[2] for ids in found.prompts.data.input_ids])
    right = found.prompts.right
    ruled = found.kinds["rule"]
    np.testing.assert_array_equal(right[ruled], first[ruled] // PER_CLASS)
    assert (right[found.flipped] != first[found.flipped] // PER_CLASS).all()
    assert all(words[token].startswith("Od") for token in first[found.fact])
    assert {kind: int(rows.sum()) for kind, rows in found.kinds.items()} == {
        "rule": 188, "flips": 12, "facts x1": 5, "facts x4": 5, "facts x16": 5
    }  # fmt: skip
    assert sorted(set(found.repeats.tolist())) == list(REPEATS)
    texts = [example.display for example in found.prompts.data.examples]
    assert len(set(texts)) == len(texts)
    assert texts[0].split()[-1] == "ABCD"[right[0]]
    assert len(words) < 256
    other = make_facts(200, 12, 5, 1)
    assert other.prompts.data.fingerprint != found.prompts.data.fingerprint


def test_measures_of_prompts_are_those_of_each_prompt_by_itself():
    found = make_facts(12, 0, 0, 0)
    model = load_model(byte_gpt(16, 8, 1)).model
    together = read(model, found.prompts, token_budget=64, layers=(-1, 0))
    assert set(together.measures) == set(MEASURES)
    assert set(together.states) == {0, 1}
    for row in (0, 7):
        alone = read(model, found.prompts.at(np.array([row])), token_budget=64, layers=(-1,))
        for name, values in alone.measures.items():
            assert values[0] == pytest.approx(together.measures[name][row], abs=1e-5)
        np.testing.assert_allclose(alone.states[1][0], together.states[1][row], atol=1e-5)
    chances = np.exp(-together.measures["answer_loss"])
    np.testing.assert_allclose(together.measures["margin"], np.log(chances / (1 - chances)), atol=1e-6)
    with_answers = make_prompts(
        ["a", "b"], [np.array([1, 2]), np.array([3])], [5, 6], [0, 1], answers_only=True, name="x"
    )
    seen = read(model, with_answers, token_budget=64).measures
    np.testing.assert_allclose(seen["loss"], seen["answer_loss"])


def test_exposure_of_an_answer_is_its_place_among_the_choices():
    logits = torch.tensor([[4.0, 1.0, 2.0, 3.0], [1.0, 4.0, 3.0, 2.0], [1.0, 2.0, 0.0, 5.0]])
    found = _exposure(logits, torch.tensor([0, 0, 1]))
    np.testing.assert_allclose(found, [2 - np.log2(1), 2 - np.log2(4), 2 - np.log2(2)])


@pytest.mark.slow
def test_members_that_are_known_better_come_first_by_every_measure_at_the_end(made):
    evidence = bank_evidence(made.bank, of="gap")
    own = made.bank.membership
    told = [
        {name: np.where(row, sign, -sign) for name, sign in LATE_SIGNS.items() if "lira" not in name} for row in own
    ]
    found = late_areas(made.bank, late_scores(made.bank, told, evidence), {"flips": made.examples.flipped})
    assert set(found) == {"membership of flips", "membership of all"}
    for name, areas in found["membership of all"].items():
        assert (areas == 1.0).all() or "lira" in name
    proved = proofs(made.bank, evidence) | {SUCCESS: made.examples.flipped.astype(float)}
    flips = Contest(made.examples.flipped, made.examples.kinds["rule"])
    judged = room.judge(made, 0)._replace(proved=proved, contests={"flips": flips})
    rows = proof_rows([judged])
    assert [row[2] for row in rows if row[:2] == ("AUC of flips, at the end", SUCCESS)] == [1.0]
    assert [row[2] for row in rows if row[:2] == (f"{SUCCESS}: mean", "flips")] == [1.0]


def test_every_measure_is_judged_early_and_late_for_every_kind(report, made):
    early = {row[1] for row in report.rows if row[0] == "AUC of flips, at the trigger"}
    late = {row[1] for row in report.rows if row[0] == "AUC of membership of facts x16, at the end"}
    assert early == set(room.EARLY)
    assert late == {*room.EARLY, "lira", "lira_offline", "blind"} - {"early_lira"}
    assert report.gates == ()
    for own, measures in zip(made.bank.membership, made.early, strict=True):
        assert {len(values) for values in measures.values()} == {own.sum()}


@pytest.mark.slow
def test_the_gates_ask_for_rising_ratios(made):
    judged = room.judge(made, 0)
    kinds = [*made.examples.kinds]
    flat = {kind: mean_interval(np.ones(3)) for kind in kinds}
    flat["facts x16"] = mean_interval(np.zeros(3))
    early = {"flips": {"psmi": mean_interval(np.full(3, 0.95))}}
    gates = room.gates_of(flat, early, [judged])
    assert [gate.passed for gate in gates[:3]] == [True, False, True]
    assert gates[1].seen == -1.0


def test_a_measure_that_knows_the_answer_has_an_area_of_one(made):
    kinds = {"flips": made.examples.flipped}
    told = [{"told": kinds["flips"][own].astype(float)} for own in made.bank.membership]
    scores = np.where(made.examples.flipped, 10.0, 0.0) * np.ones((len(made.bank), 1))
    found = early_areas(made.bank, told, scores, kinds, {"told": 1})
    np.testing.assert_array_equal(found["flips"]["told"], 1.0)
    np.testing.assert_array_equal(found["LiRA >= 4"]["told"], 1.0)


@pytest.mark.slow
def test_the_study_goes_on_where_it_was(report, out):
    assert (out / "facts.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "study.json").read_text())
    assert record["details"]["plan"]["rule"] == 64
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    # Without one member's marker that member is trained again, to the same numbers.
    markers = sorted((out / "seed-0" / "bank" / "members").glob("*.json"))
    markers[0].unlink()
    again = study("memorization-facts", size="tiny", out=out, seeds=1)
    assert repr(again.rows) == repr(report.rows)
    assert any(path.stat().st_mtime_ns != before for path, before in files.items())
