"""An index of the whole model goes out and comes back, as a person types it."""

import pytest
from tests.cli.conftest import furnished, index_words, vestige, workshop  # noqa: F401

from vestige.runs import Scores


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["projections", "chunks"])
def test_an_index_of_the_whole_model_is_exported_and_read_back(layout, vestige, workshop):  # noqa: F811
    whole = ("--compress-scope", "model", "--compress", "mask:256 | sjlt:64")
    assert vestige(*index_words(), *whole, "--out", "whole").status == 0
    ask = ("attribute", "--queries", "Why is the sky blue?", "--k", "3")
    assert vestige(*ask, "--index", "whole", "--out", "run").status == 0
    scores = Scores.open("run")
    assert vestige("export", "whole", "--to", layout, "--out", layout).status == 0
    back = ("import", layout, "--out", f"{layout}-back", "--model", "tiny-model", "--data", "train.jsonl")
    outcome = vestige(*back)
    assert outcome.status == 0, outcome.err
    assert vestige(*ask, "--index", f"{layout}-back", "--out", f"{layout}-run").status == 0
    found = Scores.open(f"{layout}-run").top(scores.queries[0], 3)
    assert [row.example_id for row in found] == [row.example_id for row in scores.top(scores.queries[0], 3)]
