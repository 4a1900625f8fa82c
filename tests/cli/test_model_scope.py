"""`--compress-scope model` as a person types it."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import contents, index_words
from vestige.errors import SpecError
from vestige.indexes import Index
from vestige.runs import Scores, read_record
from vestige.settings import SHARED_COMPRESSION, IndexSettings

WHOLE = ("--compress-scope", "model", "--compress", "mask:256 | sjlt:64")


@pytest.mark.slow
def test_an_index_of_the_whole_model_is_asked_reported_and_exported(vestige, workshop):
    outcome = vestige(*index_words(), *WHOLE, "--out", "whole")
    assert outcome.status == 0
    assert "mask:256 | sjlt:64 per model, 64 numbers in float16" in outcome.out
    ask = ("attribute", "--queries", "Why is the sky blue?", "--k", "3")
    assert vestige(*ask, "--index", "whole", "--tokens", "--out", "run").status == 0
    assert Scores.open("run").queries
    assert len(read_record("run").components) == len(Index.open("whole").manifest.components)
    assert vestige("report", "run").status == 0
    again = vestige(*ask, "--index", "whole", "--method", "grad-cos", "--self-influence", "--out", "run2")
    assert again.status != 0
    assert vestige("export", "whole", "--to", "safetensors", "--out", "tensors").status == 0
    precondition = vestige("precondition", "whole", "--out", "solved")
    assert precondition.status == 0, precondition.err


@pytest.mark.slow
def test_another_scope_over_an_index_is_refused_with_the_difference(vestige, workshop):
    assert vestige(*index_words(), *WHOLE, "--out", "whole").status == 0
    before = contents(Path("whole"))
    outcome = vestige(*index_words(), "--compress", "mask:256 | sjlt:64", "--out", "whole")
    assert outcome.status != 0
    assert "mask:256 | sjlt:64 (whole model)" in outcome.err
    assert contents(Path("whole")) == before


@pytest.mark.slow
def test_the_default_compression_of_the_whole_model_can_be_shared(vestige, workshop):
    assert vestige(*index_words(), "--compress-scope", "model", "--out", "default").status == 0
    manifest = json.loads(Path("default/manifest.json").read_text())
    assert manifest["compression"] == {"spec": SHARED_COMPRESSION, "scope": "model"}


@pytest.mark.parametrize("spec", ["tensorsketch:256", "mask:64", "none", "logra:16x16"])
def test_what_components_cannot_share_is_refused_with_what_to_type(vestige, workshop, spec):
    """A mask alone would add unrelated coordinates of different components."""
    outcome = vestige(*index_words(), "--compress-scope", "model", "--compress", spec, "--out", "new")
    assert outcome.status != 0
    assert "cannot be summed over the whole model" in outcome.err
    assert "End the spec with gauss:K or rademacher:K or sjlt:K" in outcome.err
    assert not Path("new").exists()


@pytest.mark.slow
def test_auto_chooses_one_width_for_the_whole_model(vestige, workshop):
    words = (*index_words(), "--compress-scope", "model", "--compress", "auto")
    assert vestige(*words, "--disk", "24KB", "--out", "auto").status == 0
    assert Index.open("auto").manifest.compression.spec == "tensorsketch:1000 | sjlt:1000"
    outcome = vestige(*words, "--disk", "1KB", "--out", "small")
    assert outcome.status != 0
    assert "256 numbers for the whole model" in outcome.err


@pytest.mark.slow
def test_the_doctor_compares_what_can_be_shared(vestige, workshop):
    outcome = vestige("doctor", "--model", "tiny-model", "--data", "train.jsonl", "--compress-scope", "model")
    assert outcome.status == 0, outcome.out
    assert SHARED_COMPRESSION in outcome.out
    assert "mask:65536 | sjlt:4096" in outcome.out
    assert "logra:16x16" not in outcome.out


def test_a_scope_that_is_none_is_refused():
    with pytest.raises(SpecError, match="compress_scope"):
        IndexSettings.model_validate({"model": "m", "data": "d", "out": "o", "compress_scope": "layer"})
