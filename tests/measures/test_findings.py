"""What an audit says to people: which rows come back word for word, which are likely memorized, what to type next."""

import json
import shlex

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.measures.audited import simple
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import build_app, main, summarise_audit
from vestige.data import read_row_list
from vestige.measures import Batch, ChoiceLogits, recitation, token_scores
from vestige.progress import manner

NO_CHOICES = ChoiceLogits(np.zeros(0, dtype=np.int64), *(torch.zeros(0),) * 3)


def batch_of(rows):
    """A batch of (targets, what the model would write there, where the answer is), with padding behind."""
    width = max(len(targets) for targets, _, _ in rows)
    labels, logits = torch.full((len(rows), width), -100), torch.zeros(len(rows), width, 9)
    answer = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, (targets, written, span) in enumerate(rows):
        for place, (target, token) in enumerate(zip(targets, written, strict=True)):
            labels[row, place] = target
            if token is not None:
                logits[row, place, token] = 1.0
        answer[row, slice(*span)] = True
    return Batch(token_scores(logits, labels), answer, NO_CHOICES)


def test_a_row_comes_back_only_if_every_token_is_the_likeliest():
    ten = [*range(1, 9), 1, 2]
    cases = [
        (ten, ten, (0, 10), 1.0),
        (ten, [*ten[:9], 8], (0, 10), 0.9),  # the last token differs
        (ten, [8, *ten[1:]], (0, 10), 0.0),  # what comes after the first miss does not count
        (ten, [*ten[:4], None, *ten[5:]], (0, 10), 0.4),  # a tie is not the likeliest
        ([-100, -100, *ten[:8]], [3, 3, *ten[:8]], (2, 10), 1.0),  # masked labels ahead of the answer
        ([*ten, *ten], [8] * 10 + ten, (10, 20), 1.0),  # of a conversation the last answer alone
        (ten[:7], ten[:7], (0, 7), np.nan),  # too short to say anything
        ([*ten, *ten], [8] * 10 + ten, (0, 0), 1.0),  # a text: its second half
        ([*ten, *ten], [*ten, 8, *ten[1:]], (0, 0), 0.0),
    ]
    found = recitation(batch_of([case[:3] for case in cases]))
    np.testing.assert_allclose(found.numpy(), [case[3] for case in cases])
    alone = [float(recitation(batch_of([case[:3]]))[0]) for case in cases]
    np.testing.assert_allclose(found.numpy(), alone)


def test_of_a_long_text_fifty_tokens_are_given_and_fifty_have_to_come_back():
    text = [1 + place % 8 for place in range(130)]
    wrong_before, wrong_after = list(text), list(text)
    wrong_before[49], wrong_after[100] = 0, 0
    wrong_inside = [*text[:99], 0, *text[100:]]
    found = recitation(batch_of([(text, one, (0, 0)) for one in (wrong_before, wrong_after, wrong_inside)]))
    np.testing.assert_allclose(found.numpy(), [1.0, 1.0, 49 / 50])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with a model that has learned eight of the twelve rows, one of them twice, and an audit of it."""
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("learned"))
    rows = [
        {"id": f"pair-{number}", "prompt": prompt, "completion": f" {completion} So says pupil {number}."}
        for number, (prompt, completion, _) in enumerate(PAIRS)
    ]
    write_rows(folder / "rows.jsonl", [*rows[:8], rows[0] | {"id": "again"}])
    write_rows(folder / "held.jsonl", rows[8:])
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-model")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    texts = [(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids) for row in rows[:6]]
    for _ in range(60):
        for prompt, completion in texts:
            ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "learned")
    tokenizer.save_pretrained(folder / "learned")
    vestige.audit(
        model=str(folder / "learned"),
        data=str(folder / "rows.jsonl"),
        holdout=str(folder / "held.jsonl"),
        checkpoints=str(folder / "tiny-model"),
        out=folder / "audit",
    )
    return folder


@pytest.mark.slow
def test_what_comes_back_is_what_greedy_decoding_writes(learned):
    audit = vestige.Audit.open(learned / "audit")
    model = AutoModelForCausalLM.from_pretrained(learned / "learned").double().eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "learned")
    values, rows = audit.values("recitation"), []
    for name in ("rows", "held"):
        rows += [json.loads(line) for line in (learned / f"{name}.jsonl").read_text().splitlines()]
    for value, row in zip(values, rows, strict=True):
        ids = tokenizer(row["prompt"]).input_ids
        wanted = tokenizer(row["prompt"] + row["completion"]).input_ids[len(ids) :][:50]
        written = []
        for _ in wanted:
            with torch.no_grad():
                written.append(int(model(torch.tensor([[*ids, *written]])).logits[0, -1].argmax()))
        same = [one == other for one, other in zip(written, wanted, strict=True)]
        share = (same.index(False) if False in same else len(same)) / len(same)
        assert value == pytest.approx(share), row["id"]
    assert list(values[:6] == 1) == [True] * 6
    assert not (values[9:] == 1).any()


@pytest.mark.slow
def test_the_findings_name_the_rows_and_what_a_model_would_guess(learned):
    returned, likely, after = vestige.Audit.open(learned / "audit").run.findings
    assert returned.title == "What comes back word for word"
    assert returned.sentences[0] == "7 of 9 rows come back word for word (78%)."
    assert returned.sentences[1].endswith("Every row was tried, no sample.")
    assert returned.sentences[2:4] == [
        "Of 4 held-out rows 0 come back (0% [0%, 60%]): any model guesses that many.",
        "2 of the 2 rows whose text repeats come back, and 5 of the 7 others.",
    ]
    assert likely.sentences[0].startswith("7 rows were learned word for word since tiny-model")
    assert likely.sentences[1].startswith("The model tells them from held-out rows")
    assert likely.sentences[2].startswith("By loss_trajectory (")
    assert "by their texts alone, without the model, " in likely.sentences[2]
    listed = read_row_list(learned / "audit")
    assert {entry.name for entry in listed} == {"again", *(f"pair-{number}" for number in range(6))}
    assert listed[0].about["rule"] == "comes back word for word (recitation)"
    assert [each.command.split()[:3] for each in after.commands][:3] == [
        ["vestige", "attribute", "--model"],
        ["vestige", "data", "clean"],
        ["vestige", "fix", f"{learned / 'audit'}-rows"],
    ]


@pytest.mark.slow
def test_the_commands_of_the_findings_run(learned):
    (*_, after) = vestige.Audit.open(learned / "audit").run.findings
    for each in after.commands:
        build_app().parse_args(shlex.split(each.command)[1:], exit_on_error=False, print_error=False)
    for each in after.commands[:2]:
        main(shlex.split(each.command)[1:] + (["--no-trust"] if "attribute" in each.command else []))
    kept = (learned / "audit-cleaned/data.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept] == ["pair-6", "pair-7"]
    assert set(vestige.Scores.open(learned / "audit-rows").queries) >= {"pair-0", "pair-5", "again"}


@pytest.mark.slow
def test_sentences_come_first_and_tables_with_verbose(learned):
    found = vestige.Audit.open(learned / "audit")
    assert "What comes back word for word\n  7 of 9 rows" in summarise_audit(found)
    assert "members among" not in summarise_audit(found)
    with manner(quiet=False, verbose=True):
        assert "members among" in summarise_audit(found)
    assert repr(found) == str(found)
    assert "<b>What is likely memorized</b>" in found._repr_html_()


@pytest.mark.slow
def test_without_anything_to_compare_with_nothing_is_claimed(place, tmp_path):
    found = simple(place, tmp_path / "run", data=str(place / "texts.jsonl"), flag=None)
    returned, likely, after = found.run.findings
    assert "is not known" in " ".join(returned.sentences) or returned.sentences[0].startswith("0 of 6 rows")
    assert likely.sentences[0] == "Not known."
    assert [each.command.split()[1] for each in after.commands] == ["audit", "bank"]
    assert not (found.folder / "flagged.jsonl").exists()
    some = simple(place, tmp_path / "some", measures=("loss",), flag=None)
    assert some.run.findings[0].sentences == ["Not tried: no requested measure tries it. Type --measures default."]


@pytest.mark.slow
def test_a_bank_says_which_rows_and_psmi_leads_no_list(place, tmp_path):
    found = simple(place, tmp_path / "run", bank=place / "bank", flag=None)
    assert "distinct texts are likely memorized" in found.run.findings[1].sentences[0]
    assert "; 10 models)" in found.run.findings[1].sentences[1]
    assert found.preferred == "lira"
    plain = simple(place, tmp_path / "plain", flag=None)
    assert plain.preferred != "psmi"
