"""What studies read: pieces of bytes, topics of the help, blocks of tokens."""

import json

import numpy as np
import pytest
import torch

from vestige.data import Example
from vestige.errors import DataError, IndexMismatch
from vestige.training import Recipe
from vestige_recipes.common.texts import byte_gpt, byte_rows, draw_pieces, help_topics, pieces, write_rows
from vestige_recipes.common.training import Training, train_checkpoints
from vestige_recipes.text_lds import run as _wikitext

ASKED = {"length": 32, "subjects": 3, "sequences": 12, "queries": 6, "before": 20}


def test_pieces_are_whole_and_in_order():
    assert pieces("äbcdefg", 3) == ["äb".encode(), b"cde"]
    assert pieces("ab", 3) == []


def test_rows_hold_the_bytes_and_can_be_read():
    (row,) = byte_rows(["é".encode()[:1] + b"a"], "s", first=4)
    assert row == {"id": "s/4", "source": "s", "text": "\ufffda", "input_ids": [195, 97]}


def test_what_is_drawn_keeps_its_order_and_its_last_zero_byte():
    cut = [bytes([number, 0]) for number in range(9)]
    few = draw_pieces(cut, 4, np.random.default_rng(0))
    assert len(few) == 4
    assert few == sorted(few)
    assert all(len(piece) == 2 for piece in few)
    assert draw_pieces(cut, 99, np.random.default_rng(0)) == cut


def test_help_topics_never_share_a_piece_between_training_and_questions():
    made = help_topics(0, **ASKED)
    assert [len(each) for each in made] == [20, 12, 6]
    ids = [row["id"] for row in made.train + made.queries]
    assert len(set(ids)) == len(ids)
    assert {row["source"] for row in made.train} == {row["source"] for row in made.queries}
    assert {len(row["input_ids"]) for rows in made for row in rows} == {32}
    topics = {row["source"] for row in made.train}
    assert all(sum(row["source"] == name for row in made.train) == 4 for name in topics)


def test_a_seed_draws_the_same_topics_and_another_one_others():
    assert help_topics(1, **ASKED) == help_topics(1, **ASKED)
    assert help_topics(1, **ASKED).train != help_topics(2, **ASKED).train


def test_more_topics_than_there_are_is_told():
    with pytest.raises(DataError, match="1000 are needed"):
        help_topics(0, **ASKED | {"subjects": 1000, "sequences": 1000, "queries": 1000})


def test_a_model_of_bytes_is_the_same_each_time_and_draws_nothing_from_the_caller():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = byte_gpt(16, 8, 1), byte_gpt(16, 8, 1)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))
    assert one.config.vocab_size == 256
    assert one.config.n_positions == 16


def test_checkpoints_are_spread_over_the_training_and_made_once(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", byte_rows(pieces("abcdefgh" * 16, 16), "s"))
    training = Training(Recipe(1e-2, 4), steps=6)
    found = train_checkpoints(byte_gpt(16, 8, 1), data, tmp_path / "model", training, seed=0, count=3)
    assert [folder.rsplit("-", 1)[1] for folder in found.folders] == ["2", "4", "6"]
    # Falling linearly from 0.01: the rates of steps 2, 4 and 6, counted from one.
    assert found.rates == pytest.approx([1e-2 * (1 - done / 6) for done in (1, 3, 5)])
    weights = tmp_path / "model" / "checkpoint-6" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert train_checkpoints(byte_gpt(16, 8, 1), data, tmp_path / "model", training, seed=0, count=3) == found
    assert weights.stat().st_mtime_ns == before


def test_a_training_without_its_last_checkpoint_is_done_again_to_the_same_bytes(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", byte_rows(pieces("abcdefgh" * 16, 16), "s"))
    training = Training(Recipe(1e-2, 4), steps=4)
    start = byte_gpt(16, 8, 1)
    found = train_checkpoints(start, data, tmp_path / "model", training, seed=0, count=2)
    last = tmp_path / "model" / "checkpoint-4"
    content = (last / "model.safetensors").read_bytes()
    last.rename(tmp_path / "lost")
    assert train_checkpoints(start, data, tmp_path / "model", training, seed=0, count=2) == found
    assert (last / "model.safetensors").read_bytes() == content


def test_trap_a_training_never_goes_on_from_another_one(tmp_path):
    data = write_rows(tmp_path / "data.jsonl", byte_rows(pieces("abcdefgh" * 16, 16), "s"))
    start, training = byte_gpt(16, 8, 1), Training(Recipe(1e-2, 4), steps=4)
    train_checkpoints(start, data, tmp_path / "model", training, seed=0)
    with pytest.raises(IndexMismatch, match="seed"):
        train_checkpoints(start, data, tmp_path / "model", training, seed=1)


def test_rows_that_are_there_are_left_alone(tmp_path):
    path = write_rows(tmp_path / "new" / "rows.jsonl", [{"id": "a"}])
    before = path.stat().st_mtime_ns
    assert write_rows(path, [{"id": "a"}]).stat().st_mtime_ns == before
    write_rows(path, [{"id": "b"}])
    assert json.loads(path.read_text()) == {"id": "b"}


def test_wikitext_is_joined_by_a_thousand_rows_and_the_rest_of_each_thousand_is_dropped(monkeypatch):
    """Joined over all rows, the number of blocks would not be the published one."""

    class Letters:
        def __call__(self, texts, **settings):
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        def decode(self, ids):
            return "".join(map(chr, ids))

    class Loaded:
        tokenizer = Letters()

    texts = ["ab"] * 1000 + ["", "cde"]
    examples = [Example(str(row), row, text=text) for row, text in enumerate(texts)]
    monkeypatch.setattr(_wikitext, "load_model", lambda model: Loaded())
    monkeypatch.setattr(_wikitext, "load_examples", lambda source, split: examples)
    train, validation = _wikitext.wikitext("model", 3)
    # 2000 letters make 666 blocks and 2 letters that are dropped; the second thousand makes one block.
    assert len(train) == 667
    assert train[-1]["text"] == "cde"
    assert validation[0]["id"] == "validation/0"
    assert train[0]["input_ids"] == [97, 98, 97]
