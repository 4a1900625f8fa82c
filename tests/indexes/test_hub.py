"""Runs, audits and indexes on the hub: pushed, opened again, and never over what others have put there."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as parquet
import pytest
import torch

import vestige
from tests.workshop import PAIRS, furnish
from vestige.cli import main
from vestige.errors import SpecError, UserError
from vestige.reports import render_page


class Hub:
    """A hub in memory, by the calls of its client that Vestige makes."""

    def __init__(self):
        self.repositories, self.down = {}, False

    def _find(self, name, repo_type="dataset"):
        if self.down:
            raise ConnectionError("no network\nmore")
        assert repo_type == "dataset"
        if name not in self.repositories:
            raise FileNotFoundError(f"404: {name}")
        return self.repositories[name]

    def repo_exists(self, name, *, repo_type):
        return name in self.repositories

    def dataset_info(self, name, *, timeout=None):
        held = self._find(name)
        content = sorted((path, hashlib.sha256(each).hexdigest()) for path, each in held["files"].items())
        commit = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        siblings = [SimpleNamespace(rfilename=path) for path in held["files"]]
        return SimpleNamespace(sha=commit, private=held["private"], siblings=siblings)

    def create_repo(self, name, *, repo_type, private, exist_ok):
        assert exist_ok
        self.repositories.setdefault(name, {"private": private, "files": {".gitattributes": b""}})
        return f"https://huggingface.co/datasets/{name}"

    def create_commit(self, name, operations, *, commit_message, repo_type):
        files = self._find(name, repo_type)["files"]
        for each in operations:
            if hasattr(each, "path_or_fileobj"):
                place = each.path_or_fileobj
                files[each.path_in_repo] = place if isinstance(place, bytes) else Path(place).read_bytes()
            else:
                del files[each.path_in_repo]

    def hf_hub_download(self, name, path, *, repo_type):
        return self.snapshot_download(name, repo_type=repo_type, local_dir=self.cache / "one") / path

    def snapshot_download(self, name, *, repo_type, local_dir, revision=None):
        for path, content in self._find(name, repo_type)["files"].items():
            (local_dir / path).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / path).write_bytes(content)
        return Path(local_dir)

    def files(self, name):
        return self.repositories[name]["files"]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    made = Hub()
    made.cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: made)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "vestige-cache"))
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and an audit, without a pass through a model for the one."""
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("hub"))
    data, model = str(folder / "train.jsonl"), str(folder / "tiny-model")
    vestige.attribute(data=data, queries=["Why is the sky so blue?"], method="bm25", out=folder / "run")
    vestige.audit(model=model, data=data, measures=("loss",), out=folder / "audit")
    return folder


def test_a_run_is_pushed_privately_and_opens_from_the_hub(made, hub, capsys, monkeypatch):
    monkeypatch.chdir(made)
    main(["export", "run", "--push-to-hub", "me/run"])
    said = capsys.readouterr().err
    assert "its owner alone sees it. It holds texts of the data and of queries." in said
    assert "https://huggingface.co/datasets/me/run" in said
    assert hub.repositories["me/run"]["private"]
    assert "vestige status hub:me/run" in hub.files("me/run")["README.md"].decode()
    opened, own = vestige.Scores.open("hub:me/run"), vestige.Scores.open("run")
    assert str(opened.top(0, 3)) == str(own.top(0, 3))
    main(["report", "hub:me/run", "--out", str(made / "page.html")])
    assert "Air scatters blue light" in (made / "page.html").read_text()
    main(["status", "hub:me/run"])
    assert "1 queries against 12 examples by bm25" in capsys.readouterr().out


def test_the_copy_here_serves_without_a_network_and_follows_the_hub_with_one(made, hub, capsys):
    vestige.export(path=made / "audit", push_to_hub="me/audit")
    first = vestige.Audit.open("hub:me/audit").folder
    hub.down = True
    assert vestige.Audit.open("hub:me/audit").folder == first
    assert "the hub was not reached (no network)" in capsys.readouterr().err
    with pytest.raises(UserError, match="hub:me/other: the hub did not give it"):
        vestige.Audit.open("hub:me/other")
    hub.down = False
    hub.files("me/audit")["README.md"] += b"more"
    assert vestige.Audit.open("hub:me/audit").folder != first


def test_files_of_others_are_never_replaced(made, hub):
    hub.repositories["me/theirs"] = {"private": True, "files": {".gitattributes": b"", "data.jsonl": b"{}"}}
    with pytest.raises(UserError, match=r"me/theirs holds files that Vestige did not push \(data.jsonl\)"):
        vestige.export(path=made / "run", push_to_hub="me/theirs")
    assert hub.files("me/theirs") == {".gitattributes": b"", "data.jsonl": b"{}"}
    hub.repositories["me/public"] = {"private": False, "files": {}}
    with pytest.raises(UserError, match=r"me/public is public\. Pass private=False"):
        vestige.export(path=made / "run", push_to_hub="me/public")
    assert hub.files("me/public") == {}
    vestige.export(path=made / "run", push_to_hub="me/public", private=False)
    with pytest.raises(UserError, match="holds a result of another kind: run"):
        vestige.export(path=made / "audit", push_to_hub="me/public", private=False)
    hub.files("me/public")["notes.md"] = b"mine"
    hub.files("me/public")["scores.parquet"] = b"old"
    vestige.export(path=made / "run", push_to_hub="me/public", private=False)
    assert hub.files("me/public")["notes.md"] == b"mine"
    assert hub.files("me/public")["scores.parquet"] == (made / "run/scores.parquet").read_bytes()


def test_what_an_earlier_push_left_goes_with_it(made, hub):
    vestige.export(path=made / "run", push_to_hub="me/run")
    marker = json.loads(hub.files("me/run")["vestige.json"])
    hub.files("me/run")["vestige.json"] = json.dumps(marker | {"files": [*marker["files"], "dense.f32"]}).encode()
    hub.files("me/run")["dense.f32"] = b"old"
    vestige.export(path=made / "run", push_to_hub="me/run")
    assert "dense.f32" not in hub.files("me/run")


def test_without_texts_no_file_holds_one_and_the_run_still_opens(made, hub, capsys):
    for kind in ("run", "audit"):
        vestige.export(path=made / kind, push_to_hub=f"me/{kind}", texts=False)
        words = [text.encode() for pair in PAIRS for text in pair[:2]] + [b"Why is the sky so blue?", b"chlorophyll"]
        for path, content in hub.files(f"me/{kind}").items():
            if path.endswith(".parquet"):
                table = parquet.read_table(
                    hub.snapshot_download(f"me/{kind}", repo_type="dataset", local_dir=hub.cache) / path
                )
                content = json.dumps(table.to_pylist(), default=str).encode()
            assert not [word for word in words if word in content], path
    assert "It holds no texts, but ids, sources and numbers." in capsys.readouterr().err
    opened, own = vestige.Scores.open("hub:me/run"), vestige.Scores.open(made / "run")
    assert [(row.example_id, row.score) for row in opened.top(0, 5)] == [
        (row.example_id, row.score) for row in own.top(0, 5)
    ]
    assert "pair-0" in render_page(opened.folder)
    audit = vestige.Audit.open("hub:me/audit")
    assert audit.values("loss").tolist() == vestige.Audit.open(made / "audit").values("loss").tolist()
    assert "pair-0" in render_page(audit.folder)


@pytest.mark.slow
def test_without_texts_the_tables_of_every_part_hold_none_and_keep_their_numbers(made, hub, tmp_path):
    """Tokens, verbatim spans with what stands around them, a contrast, and both rungs of a ladder."""
    prompt, completion, _ = PAIRS[0]
    asked = {"id": "q", "prompt": prompt, "completion": completion, "instead": "Zebras."}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked) + "\n")
    own = vestige.attribute(
        model=made / "tiny-model",
        data=made / "train.jsonl",
        queries=tmp_path / "asked.jsonl",
        method="grad-dot",
        out=tmp_path / "run",
        tokens=True,
        verbatim=True,
        trust=False,
    )
    assert own.verbatim(0)
    vestige.audit(
        model=made / "tiny-model", data=made / "train.jsonl", against=made / "train.jsonl", out=tmp_path / "audit"
    )
    names = {one for pair in PAIRS for one in pair[2:]} | {"q", "data", "opponent", "proponent", "verbatim"}
    for kind in ("run", "audit"):
        vestige.export(path=tmp_path / kind, push_to_hub=f"me/{kind}-parts", texts=False)
        copy = hub.snapshot_download(f"me/{kind}-parts", repo_type="dataset", local_dir=hub.cache / f"{kind}-parts")
        for path in sorted(copy.rglob("*.parquet")):
            left, whole = (parquet.read_table(one).to_pydict() for one in (path, tmp_path / kind / path.name))
            for name, column in left.items():
                kept = {each for each in column if isinstance(each, str) and each}
                assert all(each in names or each.startswith(("pair-", "model.")) for each in kept), (path.name, name)
                if any(isinstance(each, int | float) for each in whole[name]):
                    assert str(column) == str(whole[name]), (path.name, name)
    opened = vestige.Scores.open("hub:me/run-parts").verbatim(0)
    assert [span.tokens for span in opened] == [span.tokens for span in own.verbatim(0)]


@pytest.mark.slow
def test_an_index_is_asked_from_the_hub(made, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    settings = {"model": "tiny-model", "data": "train.jsonl", "components": "mlp", "compress": "tensorsketch:16"}
    vestige.index(**settings, out=tmp_path / "idx")
    with pytest.raises(SpecError, match="the rows of an index are named by their texts"):
        vestige.export(path=tmp_path / "idx", push_to_hub="me/idx", texts=False)
    vestige.export(path=tmp_path / "idx", push_to_hub="me/idx")
    assert vestige.Index.open("hub:me/idx").verify() == []
    asked = {"queries": "train.jsonl", "limit": None, "trust": False, "method": "grad-dot"}
    asked.pop("limit")
    there = vestige.attribute(index="hub:me/idx", out=tmp_path / "there", **asked)
    here = vestige.attribute(index=str(tmp_path / "idx"), out=tmp_path / "here", **asked)
    assert [row.score for row in there.top(0, 5)] == [row.score for row in here.top(0, 5)]


def test_a_refusal_of_the_hub_is_in_words_and_a_folder_that_is_none_is_refused(made, hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(made / "run")])
    assert ended.value.code == 2
    assert "--push-to-hub owner/name" in capsys.readouterr().err
    with pytest.raises(UserError):
        vestige.export(path=tmp_path, push_to_hub="me/nothing")
    assert "me/nothing" not in hub.repositories
    hub.create_commit = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("quota\nmore"))
    with pytest.raises(UserError, match=r"me/run did not take it: quota\. Log in with `hf auth login`"):
        vestige.export(path=made / "run", push_to_hub="me/run")
    hub.repositories["me/data"] = {"private": True, "files": {"data.jsonl": b"{}"}}
    with pytest.raises(UserError, match=r"hub:me/data is no result that Vestige pushed"):
        vestige.Scores.open("hub:me/data")
