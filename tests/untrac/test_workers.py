"""Real processes share the ascents of a run, and end with the scores of a single one."""

import numpy as np
import pytest

from tests.cli.conftest import furnished, workshop  # noqa: F401
from tests.workshop import write_rows
from vestige.methods import untrac


@pytest.mark.slow
def test_two_workers_give_the_scores_of_one_process(workshop, capfd):  # noqa: F811
    rows = [
        {"prompt": "Why is the sea blue?", "completion": "Water scatters blue light.", "source": "sky"},
        {"prompt": "Is a fern green?", "completion": "Ferns are green.", "source": "leaf"},
    ]
    write_rows(workshop / "tests.jsonl", rows)
    given = {"model": "tiny-model", "data": "train.jsonl", "queries": "tests.jsonl", "learning_rate": 1e-3}
    one = untrac(**given, out="one", direction="untrac", samples=2)
    two = untrac(**given, out="two", direction="untrac", samples=2, workers=2)
    assert "Unlearning: 2 workers" in capfd.readouterr().err
    assert np.array_equal(one.dense(), two.dense())
