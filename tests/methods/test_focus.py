"""What queries choose to have explained, against float64 gradients of single texts by `torch.func`."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige
from tests.reference.gradients import example_gradients
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.errors import SpecError
from vestige.methods import METHODS

SKY, PARIS = "Why is the sky blue?", "What is the capital of France?"
AIR, ROME = " Air scatters blue light.", " The capital of France is Rome, I think."
QUERIES = [
    {"id": "plain", "prompt": SKY, "completion": AIR},
    {"id": "contrast", "prompt": PARIS, "completion": " The capital of France is Paris.", "instead": ROME},
    {"id": "span", "prompt": SKY, "completion": AIR, "span": "blue light"},
    {"id": "spans", "prompt": SKY, "completion": AIR, "span": [[1, 4], "light"], "weights": [2, -0.5]},
    {"id": "text", "text": "Bees make honey and wax.", "span": [5, 9]},
]
CHOICE = {"precision": "float64", "trust": False, "dense": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, its data, and queries of uneven lengths that choose in every way."""
    folder = furnish(tmp_path_factory.mktemp("focus"))
    write_rows(folder / "queries.jsonl", QUERIES)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "tiny-model").double()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "tiny-model")


def refusal(command, capsys):
    """What a command says that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def read(tokenizer, before, answer, ranges=None):
    """Ids of a text, and which of its tokens lie partly in a range of characters of its answer; not given: all."""
    found = tokenizer(before + answer, return_offsets_mapping=True)
    ids, offsets = found["input_ids"], found["offset_mapping"]
    if ranges is None:
        return [*ids, tokenizer.eos_token_id], [end > len(before) for _, end in offsets] + [True]
    ranges = [(len(before) + start, len(before) + stop) for start, stop in ranges]
    inside = [any(begin < stop and end > start for start, stop in ranges) for begin, end in offsets]
    return [*ids, tokenizer.eos_token_id], [*inside, False]


def gradient(model, ids, targets, mean=False):
    found = example_gradients(model, torch.tensor(ids), torch.tensor(targets), mean)
    return torch.cat([found[name].flatten() for name in sorted(found)])


def expected(folder, model, tokenizer, mean):
    """Gradients of the five queries and of all training rows."""

    def of(*text):
        return gradient(model, *read(tokenizer, *text), mean)

    one, other = read(tokenizer, SKY, AIR, [(1, 4)]), read(tokenizer, SKY, AIR, [(19, 24)])
    count = sum(one[1]) + sum(other[1]) if mean else 1
    queries = [
        of(SKY, AIR),
        of(PARIS, " The capital of France is Paris.") - of(PARIS, ROME),
        of(SKY, AIR, [(14, 24)]),
        (2 * gradient(model, *one) - 0.5 * gradient(model, *other)) / count,
        of("", "Bees make honey and wax.", [(5, 9)]),
    ]
    train = [of(question, answer) for question, answer, _ in PAIRS]
    return torch.stack(queries), torch.stack(train)


@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_scores_are_those_of_the_chosen_losses(folder, model, tokenizer, loss, tmp_path):
    queries, train = expected(folder, model, tokenizer, loss == "mean")
    run = vestige.attribute(
        model=folder / "tiny-model",
        data=folder / "train.jsonl",
        queries=str(folder / "queries.jsonl"),
        method="grad-dot",
        loss=loss,
        components="all",
        out=tmp_path / "run",
        **CHOICE,
    )
    wanted = (queries @ train.T).numpy()
    np.testing.assert_allclose(run.dense(), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


def test_trap_what_a_query_chooses_does_not_depend_on_its_batch(folder, tmp_path):
    """Weights and contrasts stay with their rows, whatever the batches are."""
    index = vestige.index(model=folder / "tiny-model", data=folder / "train.jsonl", out=tmp_path / "idx")
    runs = [
        vestige.attribute(
            model=folder / "tiny-model",
            data=folder / "train.jsonl",
            queries=rows,
            method="grad-dot",
            token_budget=budget,
            out=tmp_path / f"run-{budget}-{rows[0]['id']}",
            **CHOICE,
        )
        for budget in (20, 4096)
        for rows in (QUERIES, QUERIES[::-1])
    ]
    first = runs[0].dense()
    for run in runs:
        order = [run.queries.index(query) for query in runs[0].queries]
        np.testing.assert_allclose(run.dense()[order], first, rtol=1e-5, atol=1e-5)
    stored = vestige.attribute(index=index.folder, queries=QUERIES, out=tmp_path / "stored", trust=False, dense=True)
    alone = vestige.attribute(index=index.folder, queries=QUERIES[1:2], out=tmp_path / "alone", trust=False, dense=True)
    np.testing.assert_allclose(alone.dense()[0], stored.dense()[1], rtol=1e-4, atol=1e-5 * np.abs(stored.dense()).max())


def test_the_run_says_what_was_explained_and_can_be_asked_again(folder, tmp_path, capsys):
    command = ["attribute", "--model", str(folder / "tiny-model"), "--data", str(folder / "train.jsonl")]
    command += ["--queries", str(folder / "queries.jsonl"), "--method", "grad-dot", "--dense"]
    main([*command, "--out", str(tmp_path / "run")])
    shown = capsys.readouterr().out
    assert f"instead of: {ROME.strip()}" in " ".join(shown.split())
    assert "explained part: blue light" in shown
    run = vestige.Scores.open(tmp_path / "run")
    assert "1 of 5 as contrasts" in run.run.explained
    asked = run.query("contrast")
    assert (asked.answer, asked.instead) == (QUERIES[1]["completion"], ROME)
    assert (run.query("spans").parts, run.query("spans").weights) == (("Air", "light"), (2.0, -0.5))
    again = vestige.attribute(
        model=folder / "tiny-model",
        data=folder / "train.jsonl",
        queries=tmp_path / "run",
        method="grad-dot",
        dense=True,
        trust=False,
        out=tmp_path / "again",
    )
    assert again.run.queries.fingerprint == run.run.queries.fingerprint
    np.testing.assert_array_equal(again.dense(), run.dense())
    page = vestige.report(tmp_path / "run").read_text()
    assert "instead of" in page
    assert json.dumps(ROME)[1:-1] in page


def test_a_generated_answer_is_compared_with_another(folder, tmp_path):
    """A `prompt` with `instead`: why the model says what it says, and not that."""
    given = {"queries": [{"id": "q", "prompt": SKY, "instead": AIR}], "method": "grad-dot", "components": "all"}
    inputs = {"model": folder / "tiny-model", "data": folder / "train.jsonl"}
    own = vestige.attribute(**inputs, **given, **CHOICE, max_new_tokens=5, out=tmp_path / "own")
    assert own.query().generated
    assert own.query().instead == AIR
    answered = {"id": "q", "prompt": SKY, "completion": own.query().answer, "instead": AIR}
    typed = vestige.attribute(**inputs, **(given | {"queries": [answered]}), **CHOICE, out=tmp_path / "typed")
    np.testing.assert_allclose(typed.dense(), own.dense(), rtol=1e-9)


def test_of_a_conversation_the_last_answer_alone_counts(folder, tmp_path):
    """Earlier turns of the assistant are no part of a contrast, a span or weights; preference rows are contrasts."""
    before = [
        {"role": "user", "content": SKY},
        {"role": "assistant", "content": AIR},
        {"role": "user", "content": PARIS},
    ]

    def talk(answer, *turns):
        return [*(turns or before), {"role": "assistant", "content": answer}]

    silent = [before[0], before[1] | {"weight": 0}, before[2]]
    rows = [
        {"id": "contrast", "messages": talk("Paris."), "instead": "Rome, of course."},
        {"id": "preference", "chosen": talk("Paris."), "rejected": talk("Rome, of course.")},
        {"id": "prompted", "prompt": before, "chosen": talk("Paris.")[3:], "rejected": talk("Rome, of course.")[3:]},
        {"id": "one", "messages": talk("Paris.", *silent)},
        {"id": "other", "messages": talk("Rome, of course.", *silent)},
        {"id": "span", "messages": talk("Paris."), "span": "Paris"},
        {"id": "end", "messages": talk("Paris."), "weights": [0] * (count_tokens(folder, "Paris.</s>") - 1) + [1]},
    ]
    run = vestige.attribute(
        model=folder / "tiny-model",
        data=folder / "train.jsonl",
        queries=rows,
        method="grad-dot",
        out=tmp_path / "run",
        **CHOICE,
    )
    contrast, preference, prompted, one, other, span, end = run.dense()
    size = np.abs(one).max()
    np.testing.assert_allclose(contrast, one - other, rtol=1e-6, atol=1e-6 * size)
    np.testing.assert_allclose(preference, contrast, rtol=1e-9)
    np.testing.assert_allclose(prompted, contrast, rtol=1e-9)
    # The end token and the full stop are no part of the span.
    assert np.abs(span - one).max() > 1e-3 * size
    assert np.abs(end - one).max() > 1e-3 * size


def count_tokens(folder, text):
    return len(AutoTokenizer.from_pretrained(folder / "tiny-model")(text)["input_ids"])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completion": AIR, "instead": AIR}, "is the answer itself"),
        ({"completion": AIR, "instead": 3}, "expected a text: the other answer"),
        ({"completion": AIR, "instead": ROME, "span": "Air"}, "Drop one of them"),
        ({"completion": AIR, "insted": ROME}, "Rename it to `instead`"),
        ({"completion": AIR, "spans": "Air"}, "Rename it to `span`"),
        ({"completion": AIR, "span": "green"}, "does not hold the `span` 'green'"),
        ({"completion": AIR, "span": "t"}, "3 times, at characters 8, 9, 23"),
        ({"completion": AIR, "span": [5, 99]}, "0 <= start < end <= 25"),
        ({"completion": AIR, "span": [True, 3]}, "expected characters [start, end]"),
        ({"completion": AIR, "span": [1.0, 3.0]}, "expected characters [start, end]"),
        ({"completion": AIR, "weights": [1, 2]}, "one for each of the"),
        ({"completion": AIR, "weights": [1, "a"]}, "expected a list of finite numbers"),
        ({"completion": AIR, "weights": [0, 0]}, "not all 0"),
        ({"completion": AIR, "span": ["Air", "Air scatters"], "weights": [1, 2]}, "share a token"),
        ({"chosen": AIR}, "Give both"),
        ({"chosen": AIR, "rejected": ROME, "completion": AIR}, "beside `completion`"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_its_row(folder, tmp_path, capsys, row, words):
    path = write_rows(tmp_path / "asked.jsonl", [{"prompt": SKY, "completion": AIR}, {"prompt": SKY, **row}])
    command = ["attribute", "--model", str(folder / "tiny-model"), "--data", str(folder / "train.jsonl")]
    command += ["--queries", str(path), "--method", "grad-dot", "--out", str(tmp_path / "run")]
    said = refusal(command, capsys)
    assert words in said
    assert "row 1" in said
    assert "asked.jsonl" in said


def test_a_text_has_no_other_answer_and_tokens_have_no_characters(folder, tmp_path):
    inputs = {"model": folder / "tiny-model", "data": folder / "train.jsonl", "method": "grad-dot"}
    for row, words in (
        ({"text": AIR, "instead": ROME}, "a text or a row of tokens has none"),
        ({"input_ids": [5, 6, 7], "span": [0, 1]}, "the row holds tokens"),
        ({"text": "Air", "span": [0, 1]}, "covers no token"),
    ):
        with pytest.raises(vestige.VestigeError, match=words):
            vestige.attribute(**inputs, queries=[row], out=tmp_path / "run")


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_takes_what_it_says_or_refuses_it_by_name(name):
    method = METHODS.find(name)()
    for field in ("instead", "span", "weights"):
        if field in method.reads_focus:
            method.require_focus({field: "q"})
        else:
            with pytest.raises(SpecError, match=f"{field}.*{name}"):
                method.require_focus({field: "q"})


def test_commands_that_read_whole_answers_refuse_by_name(folder, tmp_path, capsys):
    inputs = ["--model", str(folder / "tiny-model"), "--data", str(folder / "train.jsonl")]
    inputs += ["--queries", str(folder / "queries.jsonl"), "--out", str(tmp_path / "out")]
    for command in (["untrac"], ["bank", "--subsets", "1", "--seeds", "1"], ["evaluate", "tail-patch"]):
        said = refusal([*command, *inputs, *(["--methods", "random"] if command[0] == "evaluate" else [])], capsys)
        assert "`instead` chooses what of a query is explained" in said


def test_rewards_scale_the_gradients_of_the_rows_that_have_them(folder, tmp_path):
    """Of either sign, exact and stored, in components and tokens; a cosine keeps the sign alone."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rewards = np.linspace(-1, 2, len(rows))
    rewards[4] = 0
    data = write_rows(
        tmp_path / "rl.jsonl", [row | {"reward": float(each)} for row, each in zip(rows, rewards, strict=True)]
    )
    index = vestige.index(model=folder / "tiny-model", data=data, out=tmp_path / "idx")
    asked = {"queries": QUERIES[:2], "trust": False, "dense": True, "k": 12}
    exact = {"model": folder / "tiny-model", "data": data}
    for number, (method, where) in enumerate(
        [("grad-dot", exact), ("grad-cos", exact), ("influence", {"index": index.folder}), ("ekfac", exact)]
    ):
        plain, weighed = (
            vestige.attribute(**where, **asked, method=method, out=tmp_path / f"{number}-{column}", weigh_by=column)
            for column in (None, "reward")
        )
        factors = np.sign(rewards) if method == "grad-cos" else rewards
        np.testing.assert_allclose(weighed.dense(), plain.dense() * factors, rtol=1e-4, atol=1e-6)
        first = weighed.top(0, 1)[0]
        parts = sum(part.score for part in weighed.components(0, first.example_id))
        assert parts == pytest.approx(first.score, rel=1e-4)
        assert "times its `reward`" in weighed.meaning.normalisation
    tokens = vestige.attribute(
        **exact, **asked, method="grad-dot", weigh_by="reward", tokens=True, out=tmp_path / "tokens"
    )
    last = tokens.bottom(0, 1)[0]
    assert sum(each.score for each in tokens.tokens(0, last.example_id)) == pytest.approx(last.score, rel=1e-4)


def test_a_reward_that_is_no_number_is_refused_with_its_row(folder, tmp_path, capsys):
    rows = [{"prompt": "a", "completion": " b", "reward": 1}, {"prompt": "c", "completion": " d", "reward": "high"}]
    data = write_rows(tmp_path / "rl.jsonl", rows)
    command = [
        "attribute",
        SKY,
        "--model",
        str(folder / "tiny-model"),
        "--data",
        str(data),
        "--out",
        str(tmp_path / "r"),
    ]
    said = refusal([*command, "--method", "grad-dot", "--weigh-by", "reward"], capsys)
    assert "rl.jsonl, row 1 (id '1')" in said
    assert "it is 'high'" in said
    assert "its columns are" in refusal([*command, "--method", "grad-dot", "--weigh-by", "rewrad"], capsys)
    assert "multiplies gradients" in refusal([*command, "--method", "rep-sim", "--weigh-by", "reward"], capsys)
