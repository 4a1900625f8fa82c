"""`--damping sweep` and `--damping 0.01,0.1,1` as a person types them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vestige.errors import SpecError
from vestige.indexes import Index
from vestige.methods import IndexedGradients
from vestige.runs import Scores, read_record
from vestige.settings import AttributeSettings

ASK = ("attribute", "--index", "idx", "--queries", "questions.jsonl", "--answer", "generate", "--dense", "--k", "4")
ALONE = ("attribute", "--model", "tiny-model", "--data", "train.jsonl", "--queries", "questions.jsonl", "--dense")


def dense(folder: str | Path) -> np.ndarray:
    return Scores.open(folder).dense()


def float64_scores(store, piece, vectors, *, norms):
    """The products of a piece in float64.

    Twelve examples span a small part of the space: outside it a vector is
    1/damping longer than inside, so float32 products cancel, in another order where there are more lines."""
    whole = torch.cat(vectors, dim=1).double()
    for block in store.piece_blocks(piece):
        lengths = block.norm if store.measure is None else store.measure(block.gradients)
        yield block.example, whole @ block.gradients.double().T, lengths if norms else None


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("relative=theta",), ("relative=loss",), ("fisher=model", "relative=cosine")])
def test_every_damping_of_a_sweep_has_the_scores_of_a_run_of_its_own(vestige, idx, options, monkeypatch):
    monkeypatch.setattr(IndexedGradients, "piece_scores", float64_scores)
    words = [word for option in options for word in ("--option", option)]
    outcome = vestige(*ASK, *words, "--damping", "0.01,1,30", "--out", "swept")
    assert outcome.status == 0, outcome.err
    assert "top 4 shared" in outcome.err
    for damping, folder in ((0.01, "swept/damping-0.01"), (1, "swept"), (30, "swept/damping-30")):
        assert vestige(*ASK, *words, "--no-trust", "--damping", str(damping), "--out", f"single-{damping}").status == 0
        single = dense(f"single-{damping}")
        assert np.allclose(dense(folder), single, rtol=0, atol=1e-6 * np.abs(single).max())
        assert read_record(folder).meaning.normalisation.endswith(f"damping {damping:g}")
        assert Scores.open(folder).top(0, 3)
    check = next(one for one in read_record("swept").trust.checks if one.name == "stability over dampings")
    assert check.value is not None
    assert check.reading.startswith("Neighbouring dampings share")
    assert read_record("swept/damping-30").config["damping"] == 30


@pytest.mark.slow
def test_the_index_is_read_once_for_all_dampings(vestige, idx, monkeypatch):
    assert vestige("precondition", "idx").status == 0
    reads = []
    scan = Index.scan

    def read(self, *given, **named):
        reads.append(self.folder.name)
        return scan(self, *given, **named)

    monkeypatch.setattr(Index, "scan", read)
    assert vestige(*ASK, "--damping", "sweep", "--out", "swept").status == 0
    assert reads.count("idx") == 1, "what the free checks read lies elsewhere"
    found = {path.name for path in Path("swept").glob("damping-*")}
    assert found == {"damping-0.001", "damping-0.01", "damping-0.1", "damping-10", "damping-100"}
    assert vestige("report", "swept/damping-10").status == 0
    assert json.loads(Path("swept/run.json").read_text())["config"]["damping"] == [0.001, 0.01, 0.1, 1, 10, 100]
    assert not list(Path().glob(".swept*"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ekfac", "kfac", "datainf"])
def test_methods_on_whole_gradients_measure_once(method, vestige, workshop):
    assert vestige(*ALONE, "--method", method, "--damping", "0.1", "1", "--no-trust", "--out", "swept").status == 0
    for damping, folder in ((0.1, "swept/damping-0.1"), (1, "swept")):
        words = ("--method", method, "--damping", str(damping), "--no-trust", "--out", f"single-{damping}")
        assert vestige(*ALONE, *words).status == 0
        single = dense(f"single-{damping}")
        assert np.allclose(dense(folder), single, rtol=1e-4, atol=1e-5 * np.abs(single).max())


@pytest.mark.slow
def test_a_damping_at_which_a_matrix_is_singular_is_left_out_and_said(vestige, idx):
    outcome = vestige(*ASK, "--damping", "1e-30,1,10", "--option", "fisher=model", "--out", "swept")
    assert outcome.status == 0, outcome.err
    assert "The damping 1e-30 is left out" in outcome.err
    assert {path.name for path in Path("swept").glob("damping-*")} == {"damping-10"}
    outcome = vestige(*ASK, "--damping", "1e-31,1e-30", "--option", "fisher=model", "--out", "none")
    assert outcome.status != 0
    assert "singular" in outcome.err


@pytest.mark.parametrize("method", ["grad-dot", "cg", "lissa", "arnoldi", "bm25", "trak"])
def test_methods_that_cannot_sweep_refuse_before_any_work(method, vestige, workshop):
    outcome = vestige(*ALONE, "--method", method, "--damping", "sweep", "--out", "swept")
    assert outcome.status != 0
    assert "Several dampings" in outcome.err
    assert not Path("swept").exists()


@pytest.mark.parametrize("given", ["0.1,x", "0", "0.1,-1", "nan", "inf", [], "sweeep"])
def test_what_is_no_damping_is_refused(given):
    with pytest.raises(SpecError, match="damping"):
        AttributeSettings.model_validate({"index": "i", "queries": "q", "out": "o", "damping": given})


def test_a_replayed_sweep_is_the_same_command():
    given = {"index": "i", "queries": "q", "out": "o"}
    settings = AttributeSettings.model_validate(given | {"damping": "1,0.1,1"})
    assert settings.damping == (0.1, 1.0)
    assert "--damping 0.1 --damping 1.0" in settings.command_line("attribute")
    assert AttributeSettings.model_validate(given | {"damping": "0.3"}).damping == 0.3
