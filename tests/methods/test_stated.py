"""Three proofs of an answer: the ranking, where it stands word for word, and whether these rows are memorized."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.errors import DataError, SpecError, UserError
from vestige.indexes import VERBATIM
from vestige.methods import attribute
from vestige.reports import make_payload, read_run, report
from vestige.runs import file_faults
from vestige.settings import AttributeSettings

STAR = "a star of the night that shines"
COPIES = [{"id": f"copy-{number}", "text": f"Some say it is {STAR}."} for number in range(2)]
START = {"id": "start", "text": f"{STAR}, or not."}
ASKED = [
    {"id": "star", "prompt": "Is the moon a star?", "completion": STAR},
    {"id": "honey", "prompt": "What do bees make?", "completion": "Bees make honey and wax."},
    {"id": "nowhere", "prompt": "What?", "completion": "Zzz qqq xxjj"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows that state answers, one of them in two copies, and a model that has learned nothing."""
    folder = furnish(tmp_path_factory.mktemp("stated"))
    torch.set_num_threads(1)
    pairs = [{"id": f"pair-{n}", "prompt": one, "completion": two} for n, (one, two, _) in enumerate(PAIRS)]
    write_rows(folder / "rows.jsonl", [*pairs, *COPIES, START])
    write_rows(folder / "asked.jsonl", ASKED)
    vestige.index(model=str(folder / "tiny-model"), data=str(folder / "rows.jsonl"), out=folder / "index")
    return folder


def given(place, out):
    return {
        "index": place / "index",
        "queries": str(place / "asked.jsonl"),
        "verbatim": True,
        "trust": False,
        "out": out,
    }


def ask(place, out, **changes):
    return vestige.attribute(**(given(place, out) | changes))


@pytest.fixture(scope="module")
def run(place):
    return ask(place, place / "run")


def continue_greedily(model, ids, count):
    """The likeliest token again and again, with nothing kept between two of them."""
    text = list(ids)
    for _ in range(count):
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].double().argmax()))
    return text[len(ids) :]


def test_an_answer_is_found_at_the_beginning_of_a_row_and_behind_a_space(run):
    span = run.verbatim("star")[0]
    assert span.text == STAR
    assert (span.occurrences, span.rows) == (3, 3)
    assert [row.example_id for row in span.listed] == ["copy-0", "copy-1", "start"]
    assert [row.before.endswith("it is") for row in span.listed] == [True, True, False]
    assert span.listed[0].after.startswith(".")
    assert span.listed[2].position == 0
    assert run.verbatim("honey")[0].listed[0].example_id == "pair-11"
    assert "Some say" not in str(run.verbatim("star"))


def test_an_answer_that_stands_nowhere_has_no_span_and_a_sentence(run):
    assert len(run.verbatim("nowhere")) == 0
    assert "no training row has 4 tokens of the answer in a row" in str(run.verbatim("nowhere"))
    proofs = run.proofs("nowhere")
    assert proofs.states_it.startswith("Nothing states it")
    assert proofs.memorized.startswith("Not tested")


def test_extraction_and_loss_are_those_of_a_slow_reference(place, run):
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-model").double()
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    for row in run.verbatim("star")[0].listed:
        text = next(each["text"] for each in [*COPIES, START] if each["id"] == row.example_id)
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            chances = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        loss = -np.mean([float(chances[at - 1, ids[at]]) for at in range(1, len(ids))])
        assert row.loss == pytest.approx(loss, rel=1e-4)
        tokens = run.verbatim("star")[0].tokens
        if row.position == 0:
            assert row.extraction is None
            continue
        given = continue_greedily(model, ids[: row.position], tokens)
        is_same = given == ids[row.position : row.position + tokens]
        assert (row.extraction == 1) == is_same
        assert 0 <= row.extraction <= 1


@pytest.mark.slow
def test_the_search_is_kept_with_the_index_and_a_second_question_finds_it(place, run, tmp_path, capfd):
    files = {path: path.stat().st_mtime_ns for path in (place / "index" / VERBATIM).iterdir()}
    assert files
    capfd.readouterr()
    ask(place, tmp_path / "again")
    assert "tokens are sorted" not in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in files} == files
    without = {"index": None, "model": str(place / "tiny-model"), "data": str(place / "rows.jsonl")}
    other = ask(place, tmp_path / "without", **without, method="grad-dot")
    assert [str(other.verbatim(query)) for query in other.queries] == [
        str(run.verbatim(query)) for query in run.queries
    ]
    assert not any(path.name == VERBATIM for path in tmp_path.rglob("*"))


@pytest.mark.slow
def test_the_table_is_a_part_of_the_run_and_changes_nothing_else(place, run, tmp_path):
    other = ask(place, tmp_path / "other", verbatim=False)
    assert not any(file_faults(run.folder, run.run.files).values())
    assert set(run.run.files) - set(other.run.files) == {"verbatim.parquet"}
    for name in ("scores.parquet", "examples.parquet", "queries.parquet", "components.parquet"):
        assert run.run.files[name] == other.run.files[name]
    with pytest.raises(UserError, match="--verbatim"):
        other.verbatim()
    assert (
        ask(place, tmp_path / "long", verbatim_tokens=60).verbatim("honey").note.startswith("(no training row has 60")
    )


@pytest.mark.slow
def test_interrupted_the_same_command_adds_the_spans(place, run, tmp_path):
    def interrupt(scores):
        assert scores.run.missing[0] == "verbatim"
        with pytest.raises(UserError, match="Not there yet"):
            scores.verbatim()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attribute.run(AttributeSettings(**given(place, tmp_path / "run")), on_ranking=interrupt)
    added = ask(place, tmp_path / "run")
    assert [str(added.verbatim(query)) for query in run.queries] == [str(run.verbatim(query)) for query in run.queries]


@pytest.mark.slow
def test_terminal_and_page_show_the_three_side_by_side(place, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    words = f"attribute --index index --queries asked.jsonl --verbatim --no-trust --out {tmp_path / 'typed'}"
    main(words.split())
    printed = capsys.readouterr().out
    assert printed.count("Three proofs of query") == 3
    assert "states it  The whole answer stands word for word in 3 rows: copy-0, copy-1, start." in printed
    for part in ("  moved it ", "  memorized  "):
        assert part in printed
    proofs = make_payload(read_run(run.folder))["queries"][0]["proofs"]
    assert [name for name, _ in proofs["sentences"]] == ["Moved it", "States it", "Memorized"]
    assert proofs["spans"][0]["listed"][0][0] == "copy-0"
    assert "renderProofs" in report(run.folder, tmp_path / "page.html").read_text()


def test_methods_without_a_model_refuse_and_so_does_a_bank_without_use(place, tmp_path):
    with pytest.raises(SpecError, match="verbatim=True lets the model go on"):
        ask(place, tmp_path / "run", method="bm25")
    with pytest.raises(SpecError, match="`bank` has no effect"):
        ask(place, tmp_path / "run", verbatim=False, bank=place)
    with pytest.raises(SpecError, match=r"verbatim_tokens.* has no effect"):
        ask(place, tmp_path / "run", verbatim=False, verbatim_tokens=3)


@pytest.mark.slow
def test_a_memorized_row_is_given_back_and_a_bank_has_its_say(place, tmp_path):
    """A model that was trained on the rows until it knows them."""
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    ids = torch.tensor([tokenizer(COPIES[0]["text"])["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "knows")
    tokenizer.save_pretrained(tmp_path / "knows")
    data = {"model": str(tmp_path / "knows"), "data": str(place / "rows.jsonl")}
    bank = {
        **data,
        "queries": str(place / "asked.jsonl"),
        "out": tmp_path / "bank",
        "subsets": 2,
        "seeds": 1,
        "epochs": 1,
    }
    vestige.bank(**bank)
    found = ask(place, tmp_path / "run", **data, index=None, bank=tmp_path / "bank", method="grad-dot")
    first = found.verbatim("star")[0].listed[0]
    assert first.extraction == 1
    assert first.counterfactual is not None
    said = found.proofs("star").memorized
    assert said.startswith("Memorized: given what stands before it in copy-0, the model goes on with")
    assert "Models of the bank" in said
    write_rows(tmp_path / "others.jsonl", [{"id": f"other-{n}", "text": f"{n} other rows."} for n in range(4)])
    vestige.bank(**bank | {"data": str(tmp_path / "others.jsonl"), "out": tmp_path / "other"})
    with pytest.raises(DataError, match="is in the bank"):
        ask(place, tmp_path / "refused", **data, index=None, bank=tmp_path / "other", method="grad-dot")


@pytest.mark.slow
def test_the_spans_are_of_the_exact_rung_of_a_ladder(place, run, tmp_path):
    climbed = ask(place, tmp_path / "run", rerank=3, rerank_method="grad-dot")
    assert [str(climbed.verbatim(query)) for query in run.queries] == [
        str(run.verbatim(query)) for query in run.queries
    ]
    record = json.loads((tmp_path / "run" / "first-rung" / "run.json").read_text())
    assert "verbatim" not in record["config"]
