"""`vestige evaluate components` from the command line to the table, the figures, the chosen set and the notebook."""

import json

import pytest
import torch

import vestige
import vestige.evaluate
from tests.docs.blocks import ROOT
from tests.evaluate.test_component_pass import workshop  # noqa: F401
from vestige.cli import main
from vestige.evaluate import backward_shares, component_type
from vestige.models import load_model, select_components
from vestige.settings import ComponentsSettings


@pytest.fixture(scope="module")
def run(workshop, tmp_path_factory):  # noqa: F811
    """A finished run with everything, made by the command."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("components") / "components-run"
    words = ["evaluate", "components", "--model", workshop / "tiny-model", "--data", workshop / "all.jsonl"]
    words += ["--queries", workshop / "queries.jsonl", "--candidates", "5,all", "--project", "16,50%"]
    main([*map(str, words), "--folds", "3", "--draws", "50", "--out", str(out)])
    return out


def details(run):
    return json.loads((run / "components.json").read_text())


def test_the_table_holds_every_opponent_with_interval_seconds_and_bytes(run):
    rows = {row["method"]: row for row in details(run)["rows"]}
    for words in ("5", "all"):
        for name in (
            "full gradient",
            "best component, held out",
            "greedy for accuracy, held out",
            "greedy for agreement, held out",
            "projection 16",
            "projection 50%",
            "projection 50%, as published",
            "layer outputs, cosine",
            "rep-sim",
            "bm25 of the prompts",
            "random",
        ):
            row = rows[f"{name} ({words})"]
            low, high = row["accuracy"]["interval"]
            assert 0 <= low <= row["accuracy"]["value"] <= high <= 1
            if "bm25" not in name and name != "random":
                assert row["seconds"] > 0
                assert row["bytes"]
    assert rows["random (5)"]["accuracy"]["value"] == pytest.approx(0.2, abs=0.05)
    assert rows["full gradient (all)"]["agreement"] == pytest.approx(1.0)


def test_everything_is_written_as_files(run):
    for name in (
        "parameters_per_component",
        "accuracy_per_component",
        "by_depth",
        "agreement_with_full_gradient",
        "self_similarity",
        "greedy_paths",
        "greedy_paths_all",
    ):
        assert (run / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    markdown = (run / "components.md").read_text()
    assert "| full gradient (5) |" in markdown
    assert "## Wrong decisions of the full gradient, all candidates" in markdown
    lines = (run / "self_similarity.csv").read_text().splitlines()
    assert lines[0] == "query,candidate,right,component,cosine"
    assert len(lines) == 1 + 3 * 5 * 14


def test_the_details_hold_components_paths_and_wrong_decisions(run):
    found = details(run)["candidates"]["5"]
    assert len(found["components"]) == 14
    assert {one["type"] for one in found["components"]} >= {"mlp.down_proj", "self_attn.q_proj"}
    path = found["searches"]["accuracy"]
    assert len(path["path"]) == len(path["accuracy_along_path"]) == len(path["agreement_along_path"]) == 14
    assert path["agreement_along_path"][-1] == pytest.approx(1.0)
    full = next(row for row in found["representations"] if row["name"] == "full gradient")
    assert path["accuracy_along_path"][-1] == pytest.approx(full["accuracy"]["value"])
    assert sum(found["rank_of_original_by_bm25"].values()) == 12
    assert len(found["wrong"]) == round(12 * (1 - full["accuracy"]["value"]))


def test_the_chosen_set_is_what_index_takes(run, workshop, tmp_path):  # noqa: F811
    chosen = details(run)["candidates"]["5"]["searches"]["agreement"]["chosen"]
    path = run / "agreement.components"
    assert "Accuracy of sets chosen alike, on queries they were not chosen on" in path.read_text()
    built = vestige.index(
        model=str(workshop / "tiny-model"),
        data=str(workshop / "train.jsonl"),
        out=tmp_path / "idx",
        components=f"@{path}",
    )
    assert sorted(part.name for part in built.manifest.components) == sorted(chosen)


def test_the_notebook_reads_a_run(run, monkeypatch):
    notebook = json.loads((ROOT / "docs" / "notebooks" / "components.ipynb").read_text())
    assert notebook["nbformat"] == 4
    monkeypatch.chdir(run.parent)
    names: dict[str, object] = {}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 4
    for cell in cells:
        assert cell["outputs"] == []
        exec("".join(cell["source"]), names)


def test_lower_components_cost_more_of_the_backward_pass(workshop):  # noqa: F811
    model = load_model(str(workshop / "tiny-model")).model
    components = select_components(model, ("all",)).components
    shares = dict(zip((part.name for part in components), backward_shares(model, components), strict=True))
    assert shares["model.embed_tokens.weight"] == pytest.approx(1.0)
    assert shares["model.layers.0.self_attn.q_proj.weight"] > shares["model.layers.0.mlp.up_proj.weight"]
    assert shares["model.layers.0.mlp.down_proj.weight"] > shares["model.layers.1.self_attn.q_proj.weight"]
    head = next(part for part in components if part.name == "lm_head.weight")
    total = sum(part.size for part in components if min(part.shape) > 1 and "embed" not in part.name)
    assert shares["lm_head.weight"] == pytest.approx(head.size / total)
    assert component_type("model.layers.0.self_attn.q_proj.weight") == "self_attn.q_proj"


def test_the_command_of_a_worker_is_the_one_that_was_typed(tmp_path):
    settings = ComponentsSettings(model="m", data="d", queries="q", out=tmp_path, candidates="5,all", project="1%")
    words = settings.command_line("evaluate components").split()
    assert words[:3] == ["vestige", "evaluate", "components"]
