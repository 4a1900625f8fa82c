"""What a report, a run or a person lists, every command that removes rows takes; what holds no ids, none does."""

import json

import pytest

import vestige
from tests.workshop import write_lists
from vestige.errors import DataError

IDS = ["pair-3", "pair-7"]


def test_select_never_chooses_what_any_list_names(folder, tmp_path):
    for place in write_lists(tmp_path, IDS):
        out = tmp_path / f"out-{place.name}"
        given = {"data": str(folder / "train.jsonl"), "strategy": "random", "budget": "100%"}
        assert not set(vestige.select(**given, drop=place, out=out).ids) & set(IDS), place


def test_fix_removes_what_any_list_names(run, tmp_path):
    for place in write_lists(tmp_path, IDS):
        found = vestige.fix(run=run, rows=place, dry_run=True)
        assert [one.id for one in found.record.removed] == IDS, place


@pytest.mark.slow
def test_removal_trains_without_what_any_list_names(folder, tmp_path):
    places = write_lists(tmp_path, IDS)
    given = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "steps": 1, "lora_rank": 2}
    found = vestige.evaluate.removal(
        **given,
        queries=str(folder / "train.jsonl"),
        rows=places,
        random_lists=1,
        seeds=1,
        out=tmp_path / "out",
    )
    lists = json.loads((tmp_path / "out" / "removal.json").read_text())["lists"]
    assert all(lists[f"{place.name} 2 #0"] == IDS for place in places)
    assert len(found.rows) == len(places) + 1


def test_what_holds_no_ids_is_refused_in_words(folder, run, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    given = {"data": str(folder / "train.jsonl"), "strategy": "random", "budget": "100%"}
    for place in (tmp_path / "texts.jsonl", tmp_path / "picture.png", tmp_path / "absent.txt", run):
        with pytest.raises(DataError, match=r"Expected|names no list"):
            vestige.fix(run=run, rows=place, dry_run=True)
        with pytest.raises(DataError, match=r"Expected|names no list"):
            vestige.select(**given, drop=place, out=tmp_path / "out")
