import json

import pytest
from tests.cli.conftest import furnished, workshop  # noqa: F401
from tests.workshop import write_rows

from vestige.errors import PieceFailed, SpecError
from vestige_recipes.common.scaling import scaling_experiment


@pytest.mark.slow
def test_sizes_are_compared_with_a_figure(workshop):  # noqa: F811
    rows = [{"prompt": "Why is the sea blue?", "completion": "Water scatters light.", "source": "sky"}]
    write_rows(workshop / "tests.jsonl", rows)
    given = {"data": "train.jsonl", "queries": "tests.jsonl", "learning_rate": 1e-3}
    reports = scaling_experiment(["tiny-model", str(workshop / "tiny-model")], out="sizes", **given)
    assert [report.agreement for report in reports] == [pytest.approx(1.0), None]
    assert all(report.seconds > 0 and report.peak_memory_bytes > 0 for report in reports)
    assert len(json.loads((workshop / "sizes" / "scaling.json").read_text())) == 2
    assert (workshop / "sizes" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert (workshop / "sizes" / "scaling.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.slow
def test_a_model_that_fails_says_why(workshop):  # noqa: F811
    with pytest.raises(PieceFailed, match="nowhere"):
        scaling_experiment(["nowhere/", "tiny-model"], out="sizes", data="train.jsonl", queries="questions.jsonl")
    with pytest.raises(SpecError, match="at least two"):
        scaling_experiment(["tiny-model"], out="sizes")
