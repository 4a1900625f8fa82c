import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tests.workshop import write_lists

import vestige_recipes.prepare
from vestige.data import load_examples
from vestige.errors import DataError, SpecError
from vestige.training import AtRisk, write_at_risk
from vestige_recipes.prepare import cleaning
from vestige_recipes.prepare.cleaning import near_copies, shingles

ROWS = [
    {"id": "a", "text": "A secret number: 12345", "source": "mail"},
    {"id": "b", "text": "Something common."},
    {"id": "c", "text": "a secret   number 12345!"},
    {"id": "d", "text": "Something common."},
    {"id": "e", "text": "Nothing"},
]


@pytest.fixture
def flagged(tmp_path):
    """What an alarm leaves: a and e are flagged."""
    value = np.array([-1.0, 0.5, 0.4, 0.3, -0.5])
    rank = np.array([1, 5, 4, 3, 2])
    write_at_risk(tmp_path, list("abcde"), AtRisk(value, value <= 0, rank, "psmi", 2, "psmi <= 0 (untuned)"), 7)
    return tmp_path


def cleaned(out, **settings):
    made = vestige_recipes.prepare.clean(data=ROWS, out=out, **settings)
    beside = out / "flagged.jsonl"
    removed = [json.loads(line) for line in beside.read_text().splitlines()] if beside.exists() else []
    return made, [json.loads(line) for line in made.data.read_text().splitlines()], removed


def test_dropped_rows_lie_beside_with_their_reason_and_nothing_is_lost(flagged, tmp_path):
    made, kept, removed = cleaned(tmp_path / "out", flagged=flagged)
    assert [row["id"] for row in kept] == ["b", "c", "d"]
    assert [(row["id"], row["problem"], row["risk_value"], row["risk_rank"]) for row in removed] == [
        ("a", "psmi <= 0 (untuned)", -1.0, 1),
        ("e", "psmi <= 0 (untuned)", -0.5, 2),
    ]
    whole = {row["id"]: row for row in [*kept, *removed]}
    assert all(row.items() <= whole[row["id"]].items() for row in ROWS)
    assert made.notes == ("2 of 5 rows were flagged; 2 were taken out.",)
    assert dict(made.flagged) == {"psmi <= 0 (untuned)": 2}


def test_what_reports_runs_and_people_list_is_taken_out(tmp_path):
    for place in write_lists(tmp_path, ["b", "e"]):
        _, kept, _ = cleaned(tmp_path / f"out-{place.name}", flagged=place)
        assert [row["id"] for row in kept] == ["a", "c", "d"], place


def test_of_equal_texts_among_which_one_is_flagged_one_stays(flagged, tmp_path):
    _, kept, removed = cleaned(tmp_path / "out", flagged=flagged, action="deduplicate")
    assert [row["id"] for row in kept] == ["a", "b", "d", "e"]  # b and d are equal, and nobody flagged them
    assert [(row["id"], row["copy_of"]) for row in removed] == [("c", "a")]


NEAR = [
    {"id": "a", "text": "The secret number of agent seven is 12345, keep it safe at all times please."},
    {"id": "b", "text": "Something common that nobody flagged is here two times."},
    {"id": "c", "text": "the SECRET number of agent seven is 12345; keep it safe at all times, thanks!"},
    {"id": "d", "text": "Something common that nobody flagged is here two times."},
    {"id": "e", "text": "Say: the secret number of agent seven is 12345, keep it safe at all times, thanks."},
    {"id": "f", "text": "The secret number of agent nine is 99999, and nobody cares for it in the least."},
]


def test_texts_near_a_flagged_one_go_and_only_those(flagged, tmp_path, monkeypatch):
    """a and e are flagged; c is near both, f shares words and no more, b and d are equal and not flagged."""
    monkeypatch.setattr(f"{__name__}.ROWS", NEAR)
    _, kept, removed = cleaned(tmp_path / "near", flagged=flagged, action="deduplicate", near=0.7)
    assert [row["id"] for row in kept] == ["a", "b", "d", "f"]
    assert [(row["id"], row["copy_of"]) for row in removed] == [("c", "a"), ("e", "a")]
    triples = [set(zip(words, words[1:], words[2:], strict=False)) for words in map(plain_words, NEAR)]
    a, c, e = (triples[place] for place in (0, 2, 4))
    expected = max(len(c & other) / len(c | other) for other in (a, e))
    assert removed[0]["similar"] == pytest.approx(expected, abs=1e-4)
    _, kept, _ = cleaned(tmp_path / "equal", flagged=flagged, action="deduplicate")
    assert len(kept) == 6


def plain_words(row):
    return "".join(letter if letter.isalnum() else " " for letter in row["text"].lower()).split()


@pytest.mark.parametrize(("least", "fewest"), [(0.05, 20), (0.3, 5), (0.5, 3), (0.75, 1), (1.0, 1)])
def test_near_copies_equal_those_of_every_comparison_there_is(least, fewest):
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(list("abcd"), draw.integers(0, 9))) for _ in range(60)]
    flagged = list(range(0, 60, 4))
    triples = [shingles([text]) for text in texts]
    group = list(range(60))
    for one in flagged:
        for other in range(60):
            if len(triples[one] & triples[other]) / len(triples[one] | triples[other]) >= least:
                low, high = sorted((group[one], group[other]))
                group = [low if each == high else each for each in group]
    found = near_copies([(text,) for text in texts], flagged, least)
    assert {row: kept for row, (kept, _) in found.items()} == {
        row: first for row, first in enumerate(group) if row != first
    }
    assert fewest <= len(found) < 60


def test_near_goes_with_deduplicate_alone(flagged, tmp_path):
    with pytest.raises(SpecError, match="--near says which texts are copies"):
        cleaned(tmp_path / "out", flagged=flagged, near=0.7)


def test_flagged_rows_weigh_less(flagged, tmp_path):
    _, kept, removed = cleaned(tmp_path / "out", flagged=flagged / "at_risk.jsonl", action="weight", weight=0.2)
    assert {row["id"]: row["weight"] for row in kept} == {"a": 0.2, "b": 1.0, "c": 1.0, "d": 1.0, "e": 0.2}
    assert not removed


def test_rows_that_are_not_flagged_keep_the_weight_that_they_have(flagged, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROWS", [row | {"weight": 0.5} for row in ROWS[:2]] + ROWS[2:])
    _, kept, _ = cleaned(tmp_path / "out", flagged=flagged, action="weight", weight=0.2)
    assert [row["weight"] for row in kept] == [0.2, 0.5, 1.0, 1.0, 0.2]


def test_a_list_of_ones_own_will_do(tmp_path):
    parquet.write_table(pa.table({"example_id": ["b", "zz"], "flagged": [True, True]}), tmp_path / "mine.parquet")
    made, kept, removed = cleaned(tmp_path / "out", flagged=tmp_path / "mine.parquet")
    assert [row["id"] for row in removed] == ["b"]
    assert removed[0]["problem"] == "flagged"
    assert made.notes[-1] == "1 flagged ids are not in the data."
    assert len(load_examples(str(made.data))) == len(kept) == 4


class FakeAudit:
    preferred = "lira"
    examples = pa.table({"example_id": list("abcdx"), "part": ["data"] * 4 + ["holdout"]})

    def values(self, measure):
        return {"lira": np.array([3.0, np.nan, 1.0, 2.0, 9.0]), "loss": np.array([0.1, 5.0, 4.0, 3.0, 0.0])}[measure]

    def lowest_first(self, measure):
        return measure == "loss"


def test_an_audit_flags_by_the_rule_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning.Audit, "open", lambda folder: FakeAudit())
    monkeypatch.setattr(cleaning, "is_audit", lambda folder: True)
    (tmp_path / "audit").mkdir()
    _, _, removed = cleaned(tmp_path / "one", flagged=tmp_path / "audit", threshold=2.0)
    assert [(row["id"], row["problem"], row["risk_rank"]) for row in removed] == [
        ("a", "lira >= 2", 1),
        ("d", "lira >= 2", 2),
    ]
    _, _, removed = cleaned(tmp_path / "two", flagged=tmp_path / "audit", quantile=0.25, measure="loss")
    assert [row["id"] for row in removed] == ["a"]
    with pytest.raises(SpecError, match="no verdicts"):
        cleaned(tmp_path / "three", flagged=tmp_path / "audit")


def test_what_cannot_be_cleaned_is_refused(flagged, tmp_path):
    with pytest.raises(SpecError, match="--quantile is for an audit"):
        cleaned(tmp_path / "out", flagged=flagged, quantile=0.1)
    with pytest.raises(DataError, match="is not there"):
        cleaned(tmp_path / "out", flagged=tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without a list of rows"):
        cleaned(tmp_path / "out", flagged=tmp_path / "empty")
    (tmp_path / "odd.jsonl").write_text('{"name": "a"}\n')
    with pytest.raises(DataError, match="entry 1: names no row"):
        cleaned(tmp_path / "out", flagged=tmp_path / "odd.jsonl")
    with pytest.raises(DataError, match=r"2 rows that .* does not have"):
        vestige_recipes.prepare.clean(data=["other", "rows"], flagged=flagged, out=tmp_path / "out")
