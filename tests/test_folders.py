import pytest

from vestige.errors import UserError
from vestige.folders import Difference, differences, mismatch_message, remove_result, require_no_others

OURS = ("run.json", "part-*", "tokens")


def test_a_folder_of_others_is_neither_written_into_nor_removed(tmp_path):
    require_no_others(tmp_path / "new", OURS)
    for name in ("run.json", "part-1", "run.json.tmp.host.1.abc.1"):
        (tmp_path / name).write_text("")
    require_no_others(tmp_path, OURS)
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "apart-1").write_text("mine")
    for asked in (lambda: require_no_others(tmp_path, OURS), lambda: remove_result(tmp_path, OURS, "run.json")):
        with pytest.raises(UserError, match=r"other files \(apart-1, thesis\.txt\)"):
            asked()
    assert (tmp_path / "run.json").exists()
    with pytest.raises(UserError, match="is a file"):
        require_no_others(tmp_path / "thesis.txt", OURS)


def test_a_result_is_removed_but_for_what_stays(tmp_path):
    folder = tmp_path / "result"
    (folder / "tokens").mkdir(parents=True)
    (folder / "part-1").mkdir()
    (folder / "run.json").write_text("")
    remove_result(folder, OURS, "run.json", keep=["tokens"])
    assert [path.name for path in folder.iterdir()] == ["tokens"]
    remove_result(tmp_path / "absent", OURS, "run.json")


def test_every_difference_is_shown_in_columns():
    old = {"data": "0123456789", "batch_size": 4, "lora_rank": None, "gone": True}
    new = {"data": "abcdefghij", "batch_size": 4, "lora_rank": 8, "checkpoints": [0, 1]}
    found = differences(old, new, {"data": "a.jsonl"}, {"data": "b.jsonl"})
    assert found == [
        Difference("data", "a.jsonl (01234567)", "b.jsonl (abcdefgh)"),
        Difference("lora-rank", "none", "8"),
        Difference("gone", "yes", "none"),
        Difference("checkpoints", "none", "0 1"),
    ]
    lines = mismatch_message("The bank in x", found).splitlines()
    assert lines[0] == "The bank in x was made with other settings; nothing was changed."
    assert len({line.index(shown) for line, shown in zip(lines[1:3], ("on disk", "a.jsonl"), strict=True)}) == 1
