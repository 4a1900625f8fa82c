"""`vestige data tokenize --block-size`: the blocks of a language model's pre-training."""

import json
from itertools import chain

import numpy as np
import pytest

import vestige
from tests.workshop import write_rows
from vestige.data import load_examples, tokenize
from vestige.errors import IndexMismatch, SpecError
from vestige.models import load_model

TEXTS = ["The sky is blue because of scattering.", "Paris.", "", "Grass is green, and so it stays for a while."]
ROWS = [{"id": f"t{row}", "text": text, "source": "ab"[row % 2]} for row, text in enumerate(TEXTS)]


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "train.jsonl", ROWS)


def blocks_of(rows, workshop, out, size, **settings):
    made = vestige.prepare.tokenize(
        data=rows, tokenizer=str(workshop / "tiny-model"), out=out, block_size=size, **settings
    )
    return made, tokenize(load_examples(made.data), None, max_length=None)


@pytest.mark.parametrize("size", [2, 5, 8, 1000])
def test_blocks_are_the_texts_joined_and_cut(workshop, tmp_path, rows, size):
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    # As run_clm.py of transformers does it (`group_texts`), but for the rest, which is kept.
    each = [list(tokenizer(text)["input_ids"]) for text in TEXTS]
    each = [ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id] for ids in each]
    joined = list(chain.from_iterable(each))
    made, found = blocks_of(rows, workshop, tmp_path / "out", size)
    expected = [joined[start : start + size] for start in range(0, len(joined), size)]
    assert [ids.tolist() for ids in found.input_ids] == expected
    assert made.rows == len(expected)
    # All is learned but for the first token of a block, which nothing predicts.
    assert all(mask[1:].all() and not mask[0] for mask in found.targets)
    assert sum(json.loads(made.out.joinpath("prepare.json").read_text())[name] for name in ("rows",)) == len(expected)


def test_sources_and_rows_of_a_block_are_kept(workshop, tmp_path, rows):
    _, found = blocks_of(rows, workshop, tmp_path / "out", 1000)
    (block,) = found.examples
    counts = json.loads(block.extra["sources"])
    assert json.loads(block.extra["rows"]) == ["t0", "t1", "t2", "t3"]
    assert sum(counts.values()) == len(found.input_ids[0])
    assert block.source == max(counts, key=counts.get)
    assert all(text in (block.text or "") for text in TEXTS)


def test_what_a_row_does_not_learn_a_block_does_not(workshop, tmp_path):
    pairs = write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"Question {n}? ", "completion": "Yes."} for n in range(3)]
    )
    tokenizer = load_model(str(workshop / "tiny-model")).tokenizer
    wanted = tokenize(load_examples(pairs), tokenizer, max_length=None)
    _, found = blocks_of(pairs, workshop, tmp_path / "out", 1000)
    np.testing.assert_array_equal(found.targets[0], np.concatenate(list(wanted.targets)))
    np.testing.assert_array_equal(found.input_ids[0], np.concatenate(list(wanted.input_ids)))


def test_a_model_trains_on_blocks(workshop, tmp_path, rows):
    made, found = blocks_of(rows, workshop, tmp_path / "out", 8)
    run = vestige.train(
        model=str(workshop / "tiny-model"), data=str(made.data), out=tmp_path / "run", batch_size=2, epochs=1
    )
    assert run.losses.num_rows >= len(found) // 2


def test_other_blocks_are_another_result(workshop, tmp_path, rows):
    blocks_of(rows, workshop, tmp_path / "out", 8)
    for settings in ({"block_size": 5}, {}):
        with pytest.raises(IndexMismatch, match="`block_size`: 8 then"):
            vestige.prepare.tokenize(
                data=rows, tokenizer=str(workshop / "tiny-model"), out=tmp_path / "out", **settings
            )
    with pytest.raises(SpecError, match=r"`max_length` cuts rows|max_length"):
        blocks_of(rows, workshop, tmp_path / "other", 8, max_length=9)
    with pytest.raises(SpecError, match=r"block_size"):
        blocks_of(rows, workshop, tmp_path / "other", 1)
