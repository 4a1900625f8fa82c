"""A run as `vestige.runs` writes it, shown: the two packages agree on every file."""

import json

import numpy as np
import pytest
import torch

from vestige.data import Example, TokenizedData
from vestige.reports import make_payload, read_run
from vestige.runs import ComponentScores, RunRecord, RunTables, ScoreBlock, ScoreCollector, TokenScores, write_run


class Letters:
    """A tokenizer whose tokens are the characters of the text."""

    def decode(self, token_ids, **options) -> str:
        return "".join(chr(number) for number in token_ids)


def tokenized(*examples: Example) -> TokenizedData:
    ids = [np.array([ord(letter) for letter in example.display], dtype=np.int32) for example in examples]
    targets = [np.arange(len(row)) > 3 for row in ids]
    return TokenizedData(list(examples), ids, targets, np.zeros(len(ids), dtype=bool), "f00d")


@pytest.fixture
def written(run_folder, tmp_path):
    train = tokenized(
        Example("a", 0, text="the sky is blue", source="books"),
        Example("b", 1, prompt="why?", completion="because", source="web"),
        Example("c", 2, text="the sky is blue", source="web"),
    )
    queries = tokenized(Example("ask", 0, prompt="sky?", completion="the sky is blue"))
    scores = np.array([[3.0, -1.0, 2.0]], dtype=np.float32)
    collector = ScoreCollector(1, 3, k=2, sources=["books", "web", "web"])
    collector.add(ScoreBlock(torch.arange(3), torch.tensor(scores)))
    summary = collector.finish()
    weights = [row / row.sum() for row in train.targets]
    content = RunTables(
        train=train,
        queries=queries,
        ranked=summary.ranked,
        generated=[True],
        losses=[1.5],
        tokenizer=Letters(),
        components=[ComponentScores(0, row, scores[0, row] * np.array([0.25, 0.75])) for row in range(3)],
        tokens=[TokenScores(0, row, scores[0, row] * weights[row]) for row in range(3)],
    )
    info = json.loads((run_folder / "run.json").read_text())
    info |= {"components": ["h.0.fc.weight", "wte.weight"], "distribution": {"ask": summary.distribution[0]}}
    record = RunRecord(**info | {"groups": {"ask": summary.groups[0]}})
    return write_run(tmp_path / "written", record, content)


def test_a_written_run_is_shown_whole(written):
    data = make_payload(read_run(written))
    (query,) = data["queries"]
    first = query["ranked"][0]
    assert (first["end"], first["row"], first["score"], first["cells"]) == ("proponent", 0, 3.0, [0.75, 2.25])
    assert sum(first["tokens"]) == pytest.approx(3.0, rel=1e-3)
    assert first["overlap"] == 1
    assert data["grid"]["cells"] == ((0, "fc"), (None, "wte"))
    example = data["examples"]["0"]
    assert "".join(example["text"]["pieces"]) == "the sky is blue"
    assert (example["duplicates"], example["source"], example["length"]) == (2, "books", 15)
    assert query["generated"] is True
    assert query["distribution"]["count"] == 3
    assert {group["source"]: group["examples"] for group in query["groups"]} == {"books": 1, "web": 2}
    assert query["groups"][0]["low"] is None, "one example has no interval"


def test_prompt_and_answer_are_told_apart_in_written_tokens(written):
    text = make_payload(read_run(written))["examples"]["1"]["text"]
    assert text["pieces"] == tuple("why?\nbecause")
    assert text["roles"] == "pppp" + "t" + "aaaaaaa"
