"""From a bare question to a ranking: asked as the training data are, refused where the model says nothing."""

import json

import numpy as np
import pytest
import torch

import vestige
from tests.workshop import PAIRS, furnish, write_rows
from vestige.cli import main
from vestige.errors import DataError
from vestige.models import load_model

SYSTEM = "Answer in one sentence."


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A workshop with conversations as data, and an index of each kind of data."""
    folder = furnish(tmp_path_factory.mktemp("chat"))
    rows = [{"id": f"talk-{number}", "messages": talk(*pair[:2])} for number, pair in enumerate(PAIRS)]
    write_rows(folder / "talks.jsonl", rows)
    for name in ("talks", "train"):
        data = str(folder / f"{name}.jsonl")
        vestige.index(model=str(folder / "tiny-model"), data=data, out=folder / f"{name}-idx", compress="sjlt:64")
    return folder


def talk(question, answer=None):
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return turns + ([] if answer is None else [{"role": "assistant", "content": answer}])


def scores(place, out, queries, index="talks-idx", **given):
    return vestige.attribute(
        index=place / index, queries=queries, out=out, dense=True, trust=False, method="grad-dot", **given
    )


@pytest.mark.slow
@pytest.mark.parametrize("query", [{"prompt": "Who wrote Emma?\n"}, {"question": "Who wrote Emma?"}])
@pytest.mark.parametrize("answer", [None, "Jane Austen."])
def test_a_bare_question_scores_as_the_conversation_does(place, tmp_path, query, answer, capsys):
    column = "completion" if "prompt" in query else "answer"
    given = [query | ({} if answer is None else {column: answer})]
    bare = scores(place, tmp_path / "bare", given)
    assert "12 of 12 rows" in capsys.readouterr().err
    spoken = scores(place, tmp_path / "spoken", [{"messages": talk("Who wrote Emma?", answer)}])
    assert np.array_equal(bare.dense(), spoken.dense())
    assert "12 of 12 rows" in bare.run.asked
    assert spoken.run.asked == ""
    typed = scores(place, tmp_path / "chat", given, chat=True)
    assert np.array_equal(typed.dense(), spoken.dense())
    unasked = scores(place, tmp_path / "no-chat", given, chat=False)
    assert unasked.run.asked == ""
    assert not np.allclose(unasked.dense(), spoken.dense(), rtol=0.1)


@pytest.mark.slow
def test_a_string_without_an_index_is_asked_alike(place, tmp_path):
    model, data = str(place / "tiny-model"), str(place / "talks.jsonl")
    given = {"model": model, "data": data, "method": "grad-dot", "dense": True, "trust": False}
    bare = vestige.attribute(**given, queries="Who wrote Emma?", out=tmp_path / "bare")
    spoken = vestige.attribute(**given, queries=[{"messages": talk("Who wrote Emma?")}], out=tmp_path / "spoken")
    assert np.array_equal(bare.dense(), spoken.dense())


@pytest.mark.slow
def test_plain_data_are_asked_plainly_and_chat_is_never_refused(place, tmp_path):
    query = [{"prompt": "Who wrote Emma?", "completion": " Jane Austen."}]
    plain = scores(place, tmp_path / "plain", query, "train-idx")
    assert plain.run.asked == ""
    assert np.array_equal(scores(place, tmp_path / "no", query, "train-idx", chat=False).dense(), plain.dense())
    chat = scores(place, tmp_path / "chat", query, "train-idx", chat=True)
    spoken = scores(
        place, tmp_path / "spoken", [{"messages": talk("Who wrote Emma?", " Jane Austen.")[1:]}], "train-idx"
    )
    assert np.array_equal(chat.dense(), spoken.dense())


def test_the_queries_of_a_run_can_be_asked_again_with_their_answers(place, tmp_path):
    first = scores(place, tmp_path / "first", [{"id": "emma", "prompt": "Who wrote Emma?"}])
    again = scores(place, tmp_path / "again", str(tmp_path / "first"))
    assert again.queries == ["emma"]
    assert again.generated == 0
    assert first.generated == 1
    assert np.array_equal(first.dense(), again.dense())


def test_nothing_is_ranked_for_a_model_that_says_nothing(place, tmp_path):
    loaded = load_model(str(place / "tiny-model"))
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight.zero_()  # every token is as likely, so the first, <s>, is given
    given = {"model": loaded.model, "tokenizer": loaded.tokenizer, "data": str(place / "train.jsonl")}
    with pytest.raises(DataError, match=r"2 of 2 queries \('0', '1'\).*--chat.*--max-new-tokens.*`completion`"):
        vestige.attribute(**given, queries=["Who?", "Why?"], out=tmp_path / "run")
    with pytest.raises(DataError, match="answer is empty"):
        vestige.untrac(**given, queries=["Who?"], out=tmp_path / "untrac")
    assert not (tmp_path / "run").exists()


def test_untrac_asks_as_the_data_are(place, tmp_path, capsys):
    rows = [{"messages": talk(*pair[:2]), "source": pair[2]} for pair in PAIRS]
    vestige.untrac(
        model=str(place / "tiny-model"),
        data=rows,
        queries=["Who wrote Emma?"],
        out=tmp_path / "out",
        max_new_tokens=4,
        learning_rate=1e-4,
    )
    assert "12 of 12 rows" in capsys.readouterr().err


def test_the_terminal_keeps_turns_apart_and_shows_the_answer(place, tmp_path, capsys):
    write_rows(tmp_path / "asked.jsonl", [{"id": "emma", "prompt": "Who wrote Emma?", "completion": "Jane Austen."}])
    words = ["--index", str(place / "talks-idx"), "--queries", str(tmp_path / "asked.jsonl"), "--no-trust"]
    main(["attribute", *words, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "query emma: user: Who wrote Emma? | assistant: Jane Austen." in printed
    assert printed.count(SYSTEM) == 1
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["chat"] is None
    assert "12 of 12 rows" in record["asked"]
