"""`vestige audit`: a run of evidence, the same whoever made it, with reasons instead of made-up numbers."""

import csv
import json
import shutil
from statistics import fmean

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.measures.audited import HELD, QUESTIONS, questions, settings, simple
from tests.reference import audit as reference
from tests.workshop import write_rows
from vestige.errors import DataError, IndexMismatch, SpecError, UserError
from vestige.measures import Audit
from vestige.reports import report


@pytest.fixture(scope="module")
def whole(place):
    return vestige.audit(
        **settings(place, place / "whole", bank=place / "bank", reference_model=str(place / "tiny-model"))
    )


def test_the_numbers_are_those_of_each_example_alone(place, whole):
    model = AutoModelForCausalLM.from_pretrained(place / "run/checkpoint-30").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    found = whole.to_pandas()
    found = found[(found.checkpoint == 30) & found.layer.isna()].set_index("row")
    for row, question in enumerate(questions(QUESTIONS, "q", 0)[:6]):
        prompt = tokenizer(question["prompt"]).input_ids
        answers = {each: tokenizer(question["prompt"] + each).input_ids for each in "AB"}
        ids = [*answers[question["completion"]], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].tolist()
        start = len(prompt)  # Each answer is one token, and none of them is merged with the prompt.
        assert [ids[:start] for ids in answers.values()] == [prompt, prompt]
        targets = list(range(start, len(ids)))
        chances = {place: reference.log_softmax(logits[place - 1]) for place in targets}
        losses = [-chances[place][ids[place]] for place in targets]
        assert found.loss[row] == pytest.approx(fmean(losses), abs=1e-5)
        assert found.answer_loss[row] == pytest.approx(fmean(losses[:-1]), abs=1e-5)
        own, other = (
            logits[start - 1][answers[each][start]]
            for each in (question["completion"], "AB".replace(question["completion"], ""))
        )
        assert found.logit_gap[row] == pytest.approx(own - other, abs=1e-5)
        assert found.accuracy[row] == (own > other)


def test_states_are_those_before_the_deciding_token(place, whole):
    model = AutoModelForCausalLM.from_pretrained(place / "run/checkpoint-30").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    rows = questions(QUESTIONS, "q", 0)
    states = []
    for question in rows:
        ids = tokenizer(question["prompt"] + question["completion"]).input_ids
        with torch.no_grad():
            states.append(model(torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states[1][0, -1].numpy())
    labels = np.array([question["completion"] == "B" for question in rows]).astype(int)
    wanted = vestige.measures.psmi(np.stack(states), labels, directions=200, seed=0).mean
    np.testing.assert_allclose(whole.values("psmi", layer=1)[:QUESTIONS], wanted, rtol=1e-3, atol=1e-4)
    assert np.isnan(whole.values("psmi", layer=1)[QUESTIONS:]).all()


def test_the_run_opens_again_without_the_model(whole):
    audit = Audit.open(whole.folder)
    assert audit.checkpoints == [10, 20, 30]
    assert audit.run.checkpoints[1].norms["change"]["frobenius"] > 0
    top = audit.top(5, "loss")
    values = audit.values("loss")
    assert [row.value for row in top] == sorted(values[:QUESTIONS])[:5]
    assert top[0].evidence["loss"] == top[0].value
    assert "no verdict" in str(top)
    assert len(audit.table(["psmi"], checkpoint=20, layer=1)) == QUESTIONS + HELD
    assert set(audit.to_pandas()["part"]) == {"data", "holdout"}
    assert sorted(path.name for path in (whole.folder / "figures").glob("*.png")) == [
        "agreement.png",
        "dynamics.png",
        "layers.png",
        "roc-flag.png",
        "roc-membership.png",
    ] + (["roc-memorized.png"] if audit.run.bank.memorized else [])
    for damaged, error in ((b"{}", UserError), (b'{"kind": "audit", "format": 9}', UserError)):
        other = whole.folder.parent / "damaged"
        other.mkdir(exist_ok=True)
        (other / "run.json").write_bytes(damaged)
        with pytest.raises(error):
            Audit.open(other)


def test_every_attack_has_a_blind_baseline_beside_it_and_intervals(whole):
    for truth in {each.truth for each in whole.run.judgement}:
        rows = whole.judgement(truth)
        told = [note for note in whole.run.notes if note.startswith(f"{truth}: no blind baseline.")]
        assert sum(each.measure == "blind" for each in rows) + len(told) == 1
        assert not told or truth == "memorized", "one that nothing can be learnt from: fewer than two texts on a side"
        assert all(each.auc[0] is None or each.auc[1] <= each.auc[0] <= each.auc[2] for each in rows)
    (flagged,) = [each for each in whole.judgement("flag", checkpoint=30) if each.measure == "loss"]
    losses = whole.values("loss")[:QUESTIONS]
    wrong = np.arange(QUESTIONS) % 6 == 0
    assert flagged.auc[0] == vestige.measures.attack(losses, wrong).auc.value
    (member,) = [each for each in whole.judgement("membership", checkpoint=30) if each.measure == "loss"]
    assert (member.sign, member.found, member.others) == (-1, QUESTIONS, HELD - 1)
    assert "membership: 1 held-out texts are in the data too and are left out." in whole.run.notes
    assert not any(rate.resolved for rate in member.tpr_at)


def test_a_bank_gives_ratios_at_every_checkpoint_and_its_own_measures_once(place, whole):
    bank = vestige.Bank.open(place / "bank")
    values = vestige.measures.margin(whole.values("loss", checkpoint=20)[:QUESTIONS])
    wanted = vestige.measures.lira(values, bank.example_margins, bank.membership).score
    np.testing.assert_allclose(whole.values("lira", checkpoint=20)[:QUESTIONS], wanted, rtol=1e-9)
    assert np.isnan(whole.values("counterfactual", checkpoint=20)).all()
    own = vestige.measures.bank_evidence(bank)
    np.testing.assert_array_equal(whole.values("counterfactual")[:QUESTIONS], own.counterfactual)
    assert not [row for row in whole.judgement("memorized", checkpoint=30) if row.measure.startswith("lira_off")]
    np.testing.assert_allclose(whole.values("bank_mean")[:QUESTIONS], bank.example_margins.mean(0))
    spread = whole.table(["bank_mean_std"], checkpoint=30)["bank_mean_std"].to_numpy()[:QUESTIONS]
    np.testing.assert_allclose(spread, bank.example_margins.std(0))


def test_psmi_has_its_slope_since_the_first_checkpoint(whole):
    for checkpoint in (10, 30):
        first = whole.values("psmi", checkpoint=10, layer=1)
        now = whole.values("psmi", checkpoint=checkpoint, layer=1)
        slope = whole.table(["psmi_slope"], checkpoint=checkpoint, layer=1)["psmi_slope"].to_numpy()
        np.testing.assert_array_equal(slope, now - first)


def test_rmia_compares_with_the_bank_the_reference_model_and_the_first_checkpoint(place, whole):
    bank = vestige.Bank.open(place / "bank")
    losses = [whole.values("loss", checkpoint=number) for number in (10, 20, 30)]
    known = -np.logaddexp(0, -bank.example_margins)
    wanted = vestige.measures.rmia(-losses[1][:QUESTIONS], known, bank.membership)
    np.testing.assert_allclose(whole.values("rmia", checkpoint=20)[:QUESTIONS], wanted, rtol=1e-6)
    assert (whole.values("rmia_offline")[:QUESTIONS] <= 1).all()
    reference_losses = losses[2] - whole.values("perplexity_ratio")
    held = np.arange(QUESTIONS + HELD) >= QUESTIONS
    wanted = vestige.measures.rmia_offline(-losses[2], -reference_losses[None], population=held)
    np.testing.assert_allclose(whole.values("rmia_reference"), wanted, atol=0.1)  # one rank, where nearly tied
    fall = whole.values("loss_trajectory")
    np.testing.assert_allclose(fall, losses[0] - (losses[1] + losses[2]) / 2, rtol=1e-9)
    np.testing.assert_allclose(
        whole.table(["loss_trajectory_fall"], checkpoint=30)["loss_trajectory_fall"][0].as_py(),
        (losses[0] - losses[2])[0],
    )
    judged = {each.measure for each in whole.judgement("membership", checkpoint=30)}
    assert {"loss_trajectory", "rmia_reference", "blind"} <= judged
    assert "quantile_excess" not in judged
    assert "fewer than 20 held-out examples" in whole.run.measures["quantile_excess"].reason
    assert any(note.startswith("Usage of the data as a whole cannot be inferred") for note in whole.run.notes)


def test_tokens_of_the_leading_examples_add_up_to_their_loss_and_are_coloured(whole, tmp_path):
    table = whole.tokens.to_pandas()
    listed = [row.row for row in whole.top(25)]
    assert sorted(set(table.row)) == sorted(listed)
    for row in listed[:3]:
        known = table[(table.row == row) & table.log_probability.notna()]
        assert -known.log_probability.mean() == pytest.approx(whole.values("loss")[row], rel=1e-6)
        before = -known.against.mean()
        assert before == pytest.approx(whole.values("loss", checkpoint=10)[row], rel=1e-6)
        text = "".join(table[table.row == row].token)
        assert whole.examples["text"][row].as_py().split()[0] in text
    assert whole.run.tokens_against.endswith("checkpoint-10")
    page = report(whole.folder, out=tmp_path / "page.html").read_text()
    assert 'class="evident"' in page
    assert "likelier they are than under" in page


@pytest.mark.slow
def test_sampled_extraction_is_a_probability_and_its_share_a_note(place, tmp_path):
    found = simple(
        place, tmp_path / "run", measures=("sampled_extraction",), prefixes=(4,), continuation=3, top_k=5, tries=100
    )
    values = found.values("sampled_extraction")
    assert ((values >= 0) & (values <= 1)).all()
    assert found.run.measures["sampled_extraction"].missing == 0
    assert any(note.startswith("(100, 0.5)-discoverable, top-5 sampling at temperature 1") for note in found.run.notes)


@pytest.mark.slow
def test_usage_is_inferred_from_pairs_that_a_column_links(place, tmp_path):
    rows = [{**row, "pair": number} for number, row in enumerate(questions(QUESTIONS, "q", 0))]
    twins = [{**row, "pair": number} for number, row in enumerate(questions(QUESTIONS, "h", 5))]
    found = simple(place, tmp_path / "run", data=rows, holdout=twins, pair_field="pair", measures=("loss",), flag=None)
    usage = found.run.usage
    assert usage.paired
    assert 20 <= usage.data == usage.holdout <= QUESTIONS
    assert 0 <= usage.p_value <= 1
    assert "loss" in usage.measures
    assert any("scores above its twin" in note for note in found.run.notes)
    with pytest.raises(DataError, match="no example of the data has that column"):
        simple(place, tmp_path / "other", data=rows, holdout=twins, pair_field="twin", measures=("loss",), flag=None)
    rows[1]["pair"] = 0
    with pytest.raises(DataError, match="'0' repeats in the data"):
        simple(place, tmp_path / "other", data=rows, holdout=twins, pair_field="pair", measures=("loss",), flag=None)


@pytest.mark.slow
def test_a_model_of_a_subset_is_judged_without_its_siblings_and_its_members_are_known(place, tmp_path):
    found = simple(place, tmp_path / "run", bank=place / "bank", bank_subset=3, measures=("loss", "lira"), flag=None)
    bank = vestige.Bank.open(place / "bank")
    values = vestige.measures.margin(found.values("loss"))
    left = bank.subsets == 3
    wanted = vestige.measures.lira(values, bank.example_margins, bank.membership, left_out=left).score
    np.testing.assert_allclose(found.values("lira"), wanted, rtol=1e-9)
    (row,) = [each for each in found.judgement("membership") if each.measure == "lira"]
    assert row.found == bank.membership[left][0][~np.isnan(wanted)].sum()
    with pytest.raises(DataError, match="subsets 0 to 9"):
        simple(place, tmp_path / "other", bank=place / "bank", bank_subset=10, measures=("lira",))


@pytest.mark.slow
def test_the_perplexity_ratio_is_the_difference_of_losses(place, whole, tmp_path):
    reference_run = simple(place, tmp_path / "run", model=str(place / "tiny-model"), measures=("loss",))
    difference = whole.values("loss")[:QUESTIONS] - reference_run.values("loss")
    np.testing.assert_allclose(whole.values("perplexity_ratio")[:QUESTIONS], difference, rtol=1e-6, atol=1e-7)


def test_a_label_column_is_no_set_of_classes_unless_asked_for(place, tmp_path, capsys):
    rows = [
        {"text": f"Bees make honey number {number}.", "label": "ok" if number % 2 else "odd"} for number in range(6)
    ]
    found = simple(place, tmp_path / "run", data=rows, flag=None, measures=("psmi",))
    assert np.isnan(found.values("psmi")).all()
    assert "--label-field label" in capsys.readouterr().err
    asked = simple(place, tmp_path / "asked", data=rows, flag=None, measures=("psmi",), label_field="label")
    assert np.isfinite(asked.values("psmi")).all()
    assert "--label-field label" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_rows_flags_as_a_column_does(place, tmp_path):
    rows = [{"id": f"t{number}", "text": f"Bees make honey number {number}.", "bad": number < 2} for number in range(6)]
    (tmp_path / "rows.txt").write_text("t1\nt0\n")
    runs = [
        simple(place, tmp_path / name, data=rows, flag=flag, measures=("loss",))
        for name, flag in (("column", "bad"), ("file", str(tmp_path / "rows.txt")))
    ]
    assert runs[0].examples["flag"].to_pylist() == runs[1].examples["flag"].to_pylist() == [True] * 2 + [False] * 4
    with pytest.raises(DataError, match=r"marks no example of the data\. Column 'bad' holds False, True"):
        simple(place, tmp_path / "nothing", data=rows, flag="bad=perhaps", measures=("loss",))


@pytest.mark.slow
def test_free_text_has_no_classes_and_the_run_says_so(place, tmp_path):
    found = simple(place, tmp_path / "run", data=str(place / "texts.jsonl"), flag=None)
    run = found.run
    assert run.measures["psmi"].reason == "free text has no classes: name a column with labels as --label-field"
    assert run.measures["logit_gap"].missing == 6
    assert "no answer of its own" in run.measures["answer_loss"].reason
    assert np.isnan(found.values("logit_gap")).all()
    assert np.isnan(found.values("psmi")).all()
    assert len(found.top(3)) == 3
    assert "free text has no classes" in report(found.folder, tmp_path / "page.html").read_text()
    assert np.isfinite(found.values("mahalanobis")).all()
    content = parquet.read_table(found.folder / "evidence.parquet")["logit_gap"]
    assert content.null_count == len(content), "null, never a number that stands for nothing"
    assert run.judgement == []


@pytest.mark.slow
def test_extraction_on_request_for_every_prefix(place, tmp_path):
    found = simple(place, tmp_path / "run", measures=("extraction",), prefixes=(4, 8), continuation=3)
    assert {"extraction", "extraction_4", "extraction_8"} <= set(found.measures)
    columns = [name for name in found.table().column_names if name.startswith("extraction")]
    assert columns == ["extraction", "extraction_4", "extraction_8"], "in one order, whoever reads the pieces"
    assert set(found.run.extraction) == {4, 8}
    model = AutoModelForCausalLM.from_pretrained(place / "run/checkpoint-30").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    question = questions(1, "q", 0)[0]
    ids = [*tokenizer(question["prompt"] + question["completion"]).input_ids, tokenizer.eos_token_id]
    given = ids[:8]
    for _ in range(3):
        with torch.no_grad():
            given.append(int(model(torch.tensor([given])).logits[0, -1].argmax()))
    wanted = 1 - reference.edit_distance(given[8:], ids[8:11]) / 3
    assert found.values("extraction")[0] == pytest.approx(wanted)


@pytest.mark.slow
def test_batches_change_nothing_but_rounding(place, whole, tmp_path):
    found = simple(place, tmp_path / "run", token_budget=1, directions=200)
    for name in ("loss", "min_k_plus_plus", "logit_gap", "mahalanobis"):
        np.testing.assert_allclose(found.values(name), whole.values(name)[:QUESTIONS], rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_a4_6_other_layers_are_not_mixed_into_an_old_run(place, tmp_path):
    out = tmp_path / "run"
    simple(place, out, measures=("mahalanobis",))
    with pytest.raises(IndexMismatch, match="holds a run already"):
        simple(place, out, measures=("mahalanobis",), layers=("1", "2"))
    found = simple(place, out, measures=("mahalanobis",), layers=("1", "2"), overwrite=True)
    assert [each.layer for each in found.run.layers] == [1, 2]
    assert not np.array_equal(found.values("mahalanobis", layer=1), found.values("mahalanobis", layer=2))


@pytest.mark.slow
def test_a4_7_no_label_noise_is_said_and_is_no_crash(place, tmp_path):
    write_rows(tmp_path / "clean.jsonl", [row | {"noisy": False} for row in questions(12, "q", 0)])
    found = simple(place, tmp_path / "run", data=str(tmp_path / "clean.jsonl"))
    assert any(note.startswith("flag: 0 to be found among 12 others") for note in found.run.notes)
    assert all(each.auc == (None, None, None) for each in found.judgement("flag"))


def test_a4_7_every_name_of_the_default_list_is_a_measure_and_unknown_ones_are_told(place, tmp_path, whole):
    assert set(whole.measures) >= {"psmi", "mahalanobis", "logit_gap", "loss"}
    with pytest.raises(SpecError, match="There is no measure 'memo_proba_gap'"):
        simple(place, tmp_path / "run", measures=("memo_proba_gap",))


@pytest.mark.slow
def test_a4_8_evidence_of_the_verb_has_as_many_columns_for_ten_examples_as_for_forty(place, whole, tmp_path):
    write_rows(tmp_path / "few.jsonl", questions(10, "q", 0))
    few = simple(place, tmp_path / "run", data=str(tmp_path / "few.jsonl"))
    assert set(few.table().column_names) < set(whole.table().column_names)
    layers, checkpoints = 2, 3
    assert len(whole.table()) == (QUESTIONS + HELD) * checkpoints * (1 + layers)


@pytest.mark.slow
def test_a4_9_the_target_is_any_model_and_any_layer_of_it_is_measured(whole, place, tmp_path):
    assert [each.layer for each in whole.run.layers] == [1, 2], "all layers, the last among them"
    other = simple(place, tmp_path / "run", model=str(place / "run/checkpoint-10"), measures=("loss",))
    np.testing.assert_allclose(other.values("loss"), whole.values("loss", checkpoint=10)[:QUESTIONS], rtol=1e-6)


@pytest.mark.slow
def test_mistakes_are_told(place, tmp_path):
    cases = [
        ({"measures": ("lira",)}, SpecError, "give bank=BANK"),
        ({"measures": ("perplexity_ratio",)}, SpecError, "`reference_model`"),
        ({"bank_subset": 1}, SpecError, "give both"),
        ({"layers": ("7",)}, SpecError, "0 \\(embeddings\\) to 2"),
        ({"layers": ("first",)}, SpecError, "last, all, or numbers"),
        ({"flag": "noise"}, DataError, "no example has a column 'noise'"),
        ({"label_field": "kind"}, DataError, "no example has that column"),
        ({"choices_field": "prompt_"}, None, ""),
        ({"choices_field": "noisy"}, DataError, "expected a list of the completions"),
        ({"data": str(place / "texts.jsonl"), "bank": place / "bank", "flag": None}, DataError, "is in the bank"),
    ]
    for changes, error, message in cases:
        if error is None:
            simple(place, tmp_path / "fine", measures=("loss",), **changes)
            continue
        with pytest.raises(error, match=message):
            simple(place, tmp_path / "run", **{"measures": ("loss", "mahalanobis")} | changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_checkpoints_of_equal_weights_are_measured_once_and_that_is_said(place, tmp_path, capsys):
    shutil.copytree(place / "run/checkpoint-10", tmp_path / "checkpoint-11")
    pair = [str(place / "run/checkpoint-10"), str(tmp_path / "checkpoint-11")]
    found = simple(place, tmp_path / "run", checkpoints=pair, measures=("loss",))
    assert found.checkpoints == [10, 30]
    assert "checkpoint-11 holds the same weights as /" in capsys.readouterr().err


@pytest.mark.slow
def test_choices_follow_from_recurring_completions_and_their_absence_has_a_reason(place, tmp_path):
    rows = [{key: value for key, value in row.items() if key != "choices"} for row in questions(12, "q", 0)]
    write_rows(tmp_path / "plain.jsonl", rows)
    found = simple(place, tmp_path / "plain", data=str(tmp_path / "plain.jsonl"), measures=("logit_gap",))
    assert np.isfinite(found.values("logit_gap")).all()
    assert found.run.classes == ["A", "B"]
    rows = [row | {"choices": ["C", "D"]} for row in questions(12, "q", 0)]
    write_rows(tmp_path / "wrong.jsonl", rows)
    found = simple(place, tmp_path / "wrong", data=str(tmp_path / "wrong.jsonl"), measures=("logit_gap",))
    assert found.run.measures["logit_gap"].reason == "the completion is not among its choices"
    record = json.loads((found.folder / "run.json").read_text())
    assert record["kind"] == "audit"


def test_status_export_and_scores_know_an_audit(whole, tmp_path):
    from vestige.runs import Scores
    from vestige.workspace import describe

    told = describe(whole.folder)
    assert "audit of 36 examples, 12 held out under 3 checkpoints" in told
    with pytest.raises(UserError, match=r"vestige.Audit.open"):
        Scores.open(whole.folder)
    rows = len(whole.table())
    (path,) = vestige.export(path=whole.folder, out=tmp_path / "csv", to="csv")
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == rows
    (path,) = vestige.export(path=whole.folder, out=tmp_path / "json", to="json")
    content = json.loads(path.read_text())
    assert len(content["evidence"]) == rows
    assert content["evidence"][0]["psmi"] is None
    assert content["evidence"][0]["text"].startswith("Which is more?")
    vestige.export(path=whole.folder, out=tmp_path / "datasets", to="datasets")
    with pytest.raises(SpecError, match="is an audit, and `to` numpy is for an index"):
        vestige.export(path=whole.folder, out=tmp_path / "other", to="numpy")
