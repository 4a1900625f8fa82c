"""Every kind from files to files: tables that hold what was planted, opponents, costs, and answers to mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from transformers import AutoModelForCausalLM

import vestige.evaluate
from tests.workshop import furnish, write_rows
from vestige.banks import Bank
from vestige.data import load_queries
from vestige.errors import DataError, IndexMismatch, SpecError, UserError
from vestige.evaluate import Estimate, Scored, align_scores, find_right_examples, open_truth, train_temporarily
from vestige.methods import attribute
from vestige.runs import Scores
from vestige.training import bank

OPPONENTS = {"random", "bm25", "rep-sim", "grad-cos"}
QUERIES = [
    {"id": "sky", "prompt": "Why is the sky so blue?", "completion": "Air scatters blue light.", "answers": "pair-0"},
    {"id": "france", "prompt": "The capital of France?", "completion": "It is Paris.", "answers": ["pair-2"]},
    {"id": "ant", "prompt": "Legs of an ant?", "completion": "An ant has six.", "answers": ["pair-7", "pair-6"]},
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("workshop"))
    write_rows(folder / "q.jsonl", QUERIES)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write_rows(folder / "marked.jsonl", [row | {"mislabelled": number in (1, 5)} for number, row in enumerate(rows)])
    return folder


@pytest.fixture(scope="module")
def given(workshop):
    names = {"model": "tiny-model", "data": "train.jsonl", "queries": "q.jsonl"}
    return {name: str(workshop / file) for name, file in names.items()}


@pytest.fixture(scope="module")
def halves(workshop, given):
    bank(**given, out=workshop / "halves", subsets=5, epochs=1, batch_size=4, keep_weights=True)
    return workshop / "halves"


@pytest.fixture(scope="module")
def runs(workshop, given):
    for method in ("grad-dot", "bm25"):
        attribute(**given, method=method, out=workshop / method, dense=True, trust=False)
    return [str(workshop / method) for method in ("grad-dot", "bm25")]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def files_of(result):
    table, document, picture = map(Path, result.files)
    assert [path.name for path in (table, document, picture)] == [
        f"{result.kind}.{end}" for end in ("json", "pdf", "png")
    ]
    assert document.read_bytes().startswith(b"%PDF")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(table.read_text())


@pytest.mark.slow
def test_lds_judges_methods_and_opponents_against_a_bank(halves, given, tmp_path):
    result = vestige.evaluate.lds(**given, bank=halves, methods="grad-dot", out=tmp_path / "lds", draws=50)
    assert {row.method for row in result.rows} == OPPONENTS | {"grad-dot"}
    assert {row.method for row in result.rows if row.opponent} == OPPONENTS
    content = files_of(result)
    assert content["subsets"] == 5
    assert all(row["seconds"] > 0 and row["memory_bytes"] > 0 for row in content["rows"])
    truth, run = Bank.open(halves), Scores.open(tmp_path / "lds" / "runs" / "grad-dot")
    expected = vestige.evaluate.datamodeling_score(
        run.dense(), truth.membership, truth.query_losses, subset=truth.subsets, draws=0
    )
    assert result["grad-dot"].values["LDS"].value == pytest.approx(expected.estimate.value)
    assert "Noise ceiling" in str(result)


def test_lds_predicts_margins_where_they_are_asked_for_or_all_there_is(halves, given, runs, tmp_path):
    truth, run = Bank.open(halves), Scores.open(runs[0])
    asked = {"run": runs[:1], "opponents": False, "draws": 2}
    result = vestige.evaluate.lds(**asked, bank=halves, value="margin", out=tmp_path / "margin")
    scores = run.dense().astype(np.float64) @ truth.subset_membership.T
    margins = truth.by_subset(truth.query_margins).mean(1)
    of_subsets = [np.corrcoef(rankdata(scores[q]), rankdata(margins[:, q]))[0, 1] for q in range(3)]
    assert result["grad-dot"].values["LDS"].value == pytest.approx(np.mean(of_subsets), abs=1e-6)
    assert "the margin" in result.title


@pytest.mark.slow
def test_a_second_call_scores_nothing_again_and_changed_settings_are_refused(halves, given, tmp_path):
    arguments = {**given, "bank": halves, "methods": ("grad-dot",), "out": tmp_path / "lds", "draws": 10}
    first = vestige.evaluate.lds(**arguments)
    runs = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "lds" / "runs").rglob("*"))}
    assert str(vestige.evaluate.lds(**arguments)) == str(first)
    assert runs == {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "lds" / "runs").rglob("*"))}
    with pytest.raises(IndexMismatch, match="other settings"):
        vestige.evaluate.lds(**arguments | {"damping": 0.5})


def test_planted_scores_in_a_run_reach_one(halves, given, runs, workshop, tmp_path):
    """Truth that follows a run's own scores, with examples and queries of the run in another order than the bank's."""
    truth = open_truth(halves)
    scored = Scored("grad-dot", Scores.open(runs[0]))
    backwards = align_scores(scored.run, truth.bank.query_ids[::-1], truth.bank.example_ids[::-1])
    assert np.array_equal([backwards.of_query(query) for query in range(3)], scored.run.dense()[::-1, ::-1])
    losses = -(truth.bank.membership @ scored.run.dense().T.astype(np.float64))
    found = vestige.evaluate.datamodeling_score(truth.scores_of(scored), truth.bank.membership, losses, draws=0)
    assert found.estimate.value == pytest.approx(1.0)


@pytest.mark.slow
def test_trap_a_model_of_the_bank_is_not_judged_by_it(halves, given, workshop, tmp_path):
    member = next(path for path in sorted((halves / "members").iterdir()) if path.is_dir())
    # A copy elsewhere is the same model.
    copy = tmp_path / "copied"
    AutoModelForCausalLM.from_pretrained(member).save_pretrained(copy)
    arguments = {**given, "bank": halves, "methods": "grad-dot", "opponents": False, "draws": 10}
    for number, model in enumerate((member, copy)):
        choice = {"model": str(model), "tokenizer": given["model"], "out": tmp_path / f"out{number}"}
        with pytest.raises(SpecError, match=f"own model {member.name}"):
            vestige.evaluate.lds(**arguments | choice)
        result = vestige.evaluate.lds(**arguments | choice, shared_model=True)
        assert "biased upwards" in str(result)


@pytest.mark.slow
def test_dampings_are_judged_on_queries_that_they_were_not_chosen_on(halves, given, tmp_path):
    result = vestige.evaluate.lds(
        **given,
        bank=halves,
        methods="influence",
        damping_grid="0.1,10",
        out=tmp_path / "out",
        draws=10,
        opponents=False,
    )
    assert next(row.method for row in result.rows) == "influence"
    assert result.rows[1].method.startswith("influence damping")
    assert "judged on the other 2" in str(result)
    assert list(files_of(result)["damping_grid"]["all_queries"]) == ["0.1", "1", "10"]


@pytest.mark.slow
def test_sources_compares_with_leaving_each_out(workshop, given, tmp_path):
    bank(**given, out=workshop / "sources", leave_source_out=True, epochs=1, batch_size=4)
    result = vestige.evaluate.sources(
        **given, bank=workshop / "sources", methods="grad-dot", out=tmp_path / "out", draws=50
    )
    content = files_of(result)
    assert content["groups"] == ["biology", "books", "physics", "places"]
    truth = Bank.open(workshop / "sources")
    losses = truth.by_subset(truth.query_losses).mean(1)
    assert content["truth"] == pytest.approx((losses[1:] - losses[0]).mean(1))
    assert result["grad-dot"].values["Pearson"].value == pytest.approx(
        np.corrcoef(content["truth"], content["predicted"]["grad-dot"])[0, 1]
    )
    with pytest.raises(DataError, match="no model of everything"):
        vestige.evaluate.sources(**given, bank=workshop / "halves", methods="grad-dot", out=tmp_path / "out")


@pytest.mark.slow
def test_removal_retrains_without_the_top_examples(given, tmp_path):
    arguments = {**given, "methods": "grad-dot", "remove": "2,4", "random_lists": 2, "seeds": 1, "epochs": 1}
    result = vestige.evaluate.removal(**arguments, out=tmp_path / "out", draws=50)
    content = files_of(result)
    assert {row.method for row in result.rows} == {"grad-dot", "bm25", "rep-sim", "grad-cos", "random lists"}
    run = Scores.open(tmp_path / "out" / "runs" / "grad-dot")
    best = np.argsort(-run.dense().mean(0))[:2]
    assert content["lists"]["grad-dot 2 #0"] == [f"pair-{row}" for row in best]
    truth = Bank.open(tmp_path / "out" / "bank")
    losses = truth.query_losses.mean(1)
    rise = losses[truth.subset_names.index("grad-dot 2 #0")] - losses[0]
    assert result["grad-dot"].values["without 2"].value == pytest.approx(rise)
    with pytest.raises(SpecError, match="leaves nothing"):
        vestige.evaluate.removal(**arguments | {"remove": 12}, out=tmp_path / "out")


@pytest.mark.slow
def test_removal_of_listed_rows_is_compared_with_random_lists_of_their_size(given, tmp_path):
    (tmp_path / "rows.txt").write_text("pair-3\npair-7\n")
    arguments = {**given, "rows": tmp_path / "rows.txt", "random_lists": 2, "seeds": 1, "epochs": 1, "lora_rank": 2}
    result = vestige.evaluate.removal(**arguments, out=tmp_path / "out", draws=50)
    content = files_of(result)
    assert [row.method for row in result.rows] == ["rows.txt", "random lists"]  # no method is judged, so none is run
    assert content["lists"]["rows.txt 2 #0"] == ["pair-3", "pair-7"]
    assert sorted(map(len, content["lists"].values())) == [2, 2, 2]
    truth = Bank.open(tmp_path / "out" / "bank")
    assert truth.identity["lora_rank"] == 2
    losses = truth.query_losses
    rise = losses[truth.subset_names.index("rows.txt 2 #0")] - losses[0]
    assert result["rows.txt"].values["without 2"].value == pytest.approx(rise.mean())
    assert content["rise_by_query"]["rows.txt 2 #0"] == pytest.approx(rise)
    assert "Without rows.txt, by query" in str(result)
    (tmp_path / "unknown.txt").write_text("pair-3\nnobody\n")
    with pytest.raises(DataError, match="'nobody'"):
        vestige.evaluate.removal(**arguments | {"rows": tmp_path / "unknown.txt"}, out=tmp_path / "two")
    with pytest.raises(SpecError, match="rows=FILE"):
        vestige.evaluate.removal(**given, out=tmp_path / "three")


@pytest.mark.slow
def test_tail_patch_takes_the_step_and_restores_every_bit(given, tmp_path):
    result = vestige.evaluate.tail_patch(**given, methods="grad-dot", k=2, learning_rate=0.1, out=tmp_path / "out")
    content = files_of(result)
    model = AutoModelForCausalLM.from_pretrained(given["model"])
    from vestige.data import load_examples, make_batch, tokenize
    from vestige.models import load_model

    loaded = load_model(given["model"])
    data = tokenize(load_examples(given["data"]), loaded.tokenizer, max_length=96)
    query = tokenize(load_queries(given["queries"]), loaded.tokenizer, max_length=96).subset([0])

    def loss(of, row):
        batch = make_batch(of, np.array([row]))
        return model(input_ids=batch.input_ids, labels=batch.labels).loss

    run, rises = Scores.open(tmp_path / "out" / "runs" / "grad-dot"), []
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for best in run.top("sky", 2):
        before = float(torch.exp(-loss(query, 0).detach()))
        loss(data, best.row).backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
                weight.grad = None
        rises.append(float(torch.exp(-loss(query, 0).detach())) - before)
        model.load_state_dict(start)
    assert content["per_query"]["grad-dot"][0] == pytest.approx(np.mean(rises), rel=1e-3)


def test_a_step_that_fails_leaves_the_weights_as_they_were(given):
    model = AutoModelForCausalLM.from_pretrained(given["model"]).requires_grad_(False)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}

    def interrupted():
        with train_temporarily(model), torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(weight, start[name]) for name, weight in model.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


@pytest.mark.slow
def test_mislabel_ranks_by_self_influence(workshop, given, tmp_path):
    arguments = {"model": given["model"], "data": str(workshop / "marked.jsonl"), "draws": 50}
    result = vestige.evaluate.mislabel(**arguments, methods="grad-dot", out=tmp_path / "out")
    own = {row.row: row.score for row in Scores.open(tmp_path / "out" / "runs" / "grad-dot").self_influence()}
    better = [own[wrong] > own[right] for wrong in (1, 5) for right in own if right not in (1, 5)]
    assert result["grad-dot"].values["AUC"].value == pytest.approx(np.mean(better))
    assert result["random"].values["AUC"] == 0.5
    files_of(result)
    with pytest.raises(SpecError, match="cosine of a gradient with itself"):
        vestige.evaluate.mislabel(**arguments, methods="grad-dot,grad-cos", out=tmp_path / "out")
    with pytest.raises(DataError, match="no column 'wrong'"):
        vestige.evaluate.mislabel(**arguments, methods="grad-dot", truth="wrong", out=tmp_path / "out")


def test_retrieval_finds_the_right_examples(given, runs, tmp_path):
    result = vestige.evaluate.retrieval(run=runs, queries=given["queries"], k="1,12", out=tmp_path / "out", draws=50)
    assert [row.method for row in result.rows] == ["grad-dot", "bm25"]
    assert "random, rep-sim, grad-cos" in str(result)
    dense = Scores.open(runs[1]).dense()
    ranks = [
        1 + int((dense[query] > dense[query][right].max()).sum()) for query, right in enumerate(([0], [2], [7, 6]))
    ]
    assert result["bm25"].values["MRR"].value == pytest.approx(np.mean([1 / rank for rank in ranks]), abs=0.05)
    assert result["bm25"].values["recall@12"].value == 1.0
    files_of(result)


def test_right_examples_may_be_one_or_several_and_must_exist(given):
    queries, ids = load_queries(given["queries"]), [f"pair-{number}" for number in range(12)]
    right = find_right_examples(queries, "answers", ["ant", "sky"], ids)
    assert [rows.tolist() for rows in right] == [[6, 7], [0]]
    with pytest.raises(DataError, match="nothing in 'truth'"):
        find_right_examples(queries, "truth", ["ant"], ids)
    with pytest.raises(DataError, match="no id of the training data"):
        find_right_examples(queries, "answers", ["ant"], ids[:7])


def test_randomisation_scores_on_noise(given, tmp_path):
    result = vestige.evaluate.randomisation(
        **given, methods="rep-sim", seeds=1, opponents=False, out=tmp_path / "out", draws=50
    )
    one = Scores.open(tmp_path / "out" / "runs" / "rep-sim").dense()
    other = Scores.open(tmp_path / "out" / "runs" / "rep-sim-random-weights-0").dense()
    from scipy.stats import spearmanr

    expected = np.mean([spearmanr(*pair).statistic for pair in zip(one, other, strict=True)])
    found = result["rep-sim"].values["correlation"]
    assert isinstance(found, Estimate)
    assert found.value == pytest.approx(expected)
    assert abs(found.value) < 0.99
    with pytest.raises(SpecError, match="in place of `run`"):
        vestige.evaluate.randomisation(run="anything", out=tmp_path / "out")


def test_overlap_reads_the_lists_of_runs(runs, tmp_path):
    result = vestige.evaluate.overlap(run=runs, k=3, out=tmp_path / "out")
    lists = [{row.row for row in Scores.open(runs[0]).top(query, 3)} for query in range(3)]
    pairs = [(0, 1), (0, 2), (1, 2)]
    expected = np.mean([len(lists[a] & lists[b]) / len(lists[a] | lists[b]) for a, b in pairs])
    assert result["grad-dot"].values["overlap of queries"] == pytest.approx(expected)
    content = files_of(result)
    assert np.diag(content["between_methods"]) == pytest.approx(1.0)
    one, other = (Scores.open(run).dense().astype(float) for run in runs)
    wanted = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(one, other, strict=True)])
    assert content["correlations"][0]["methods"] == ["grad-dot", "bm25"]
    assert content["correlations"][0]["pearson"] == pytest.approx(wanted)
    assert "All scores of grad-dot and bm25: Pearson" in str(result)
    assert "Without the baselines" in str(result)


@pytest.mark.slow
def test_mistakes_are_answered(given, halves, runs, workshop, tmp_path):
    with pytest.raises(SpecError, match="Nothing to judge"):
        vestige.evaluate.lds(bank=halves, out=tmp_path / "out")
    with pytest.raises(SpecError, match="needs `queries`"):
        vestige.evaluate.overlap(methods="grad-dot", model=given["model"], data=given["data"], out=tmp_path / "out")
    with pytest.raises(SpecError, match="grad-dto"):
        vestige.evaluate.overlap(**given, methods="grad-dto", out=tmp_path / "out")
    attribute(**given, method="bm25", out=workshop / "thin", trust=False)
    with pytest.raises(UserError, match="--dense"):
        vestige.evaluate.lds(run=str(workshop / "thin"), bank=halves, out=tmp_path / "out")
    other = attribute(**given | {"queries": "Why?"}, answer="generate", max_new_tokens=2, method="grad-dot", dense=True,
                      trust=False, out=workshop / "other")  # fmt: skip
    with pytest.raises(IndexMismatch, match="other queries"):
        vestige.evaluate.lds(run=str(other.folder), bank=halves, out=tmp_path / "out")
    with pytest.raises(UserError, match="different queries"):
        vestige.evaluate.overlap(run=[runs[0], str(other.folder)], k=3, out=tmp_path / "out")
