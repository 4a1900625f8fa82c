import json

import pytest
from datasets import load_from_disk
from tests.workshop import PAIRS

from vestige.data import Example, load_examples
from vestige.errors import DataError, IndexMismatch, ModelError, SpecError, UserError
from vestige.prepare import row_of
from vestige_recipes.prepare import paraphrase, paraphrase_by_rules, problem_of
from vestige_recipes.prepare.replies import Reply, bare


def test_rules_say_the_same_on_every_machine():
    text = "What's the capital of France? Explain it."
    assert paraphrase_by_rules(text, 3, 2) == "Put differently: What is the chief city of France? Explain it."


def test_rules_give_several_paraphrases_of_which_none_is_the_text():
    for prompt, answer, _ in PAIRS:
        for text in (prompt, answer, "!!", "x"):
            said = [paraphrase_by_rules(text, 0, number) for number in range(1, 5)]
            assert len({bare(one) for one in [text, *said]}) == 5


def test_the_result_is_lines_and_a_datasets_folder_and_reads_back(workshop, tmp_path, lines):
    data = str(workshop / "train.jsonl")
    result = paraphrase(data=data, out=tmp_path / "out", rules=True, paraphrases=2)
    rows = lines(result.data)
    assert result.rows == len(rows) == 24
    assert [row["original_id"] for row in rows] == [f"pair-{n // 2}" for n in range(24)]
    assert {row["source"] for row in rows} == {source for *_, source in PAIRS}
    folder = load_from_disk(str(tmp_path / "out" / "dataset"))
    assert [dict(row) for row in folder] == rows
    read = load_examples(result.data)
    assert [example.id for example in read] == [row["id"] for row in rows]
    assert read[0].extra == {"original_id": "pair-0", "paraphrase": 1}
    assert load_examples(tmp_path / "out" / "dataset")[3].completion == PAIRS[1][1]


def test_only_the_named_parts_change_and_the_blanks_around_them_stay(tmp_path, lines):
    written = " Jane Austen wrote Emma."
    turns = [("system", "Be kind."), ("user", "Who wrote Emma?\n"), ("assistant", written), ("user", "Why?")]
    rows = [
        {"id": "a", "messages": [{"role": role, "content": content} for role, content in turns]},
        {"id": "b", "question": "Who wrote Hamlet?", "answer": "Shakespeare wrote it."},
    ]
    result = paraphrase(data=rows, out=tmp_path / "prompts", rules=True)
    spoken, asked = lines(result.data)
    contents = [message["content"] for message in spoken["messages"]]
    assert contents[0] == "Be kind."
    assert contents[1].endswith("?\n")
    assert contents[2] == " Jane Austen wrote Emma."
    assert bare(contents[1]) != bare(turns[1][1])
    assert bare(contents[3]) != "why"
    assert asked["prompt"].endswith("\n")
    assert asked["completion"] == "Shakespeare wrote it."
    both = paraphrase(data=rows, out=tmp_path / "both", rules=True, fields="prompt answer")
    spoken, asked = lines(both.data)
    assert spoken["messages"][2]["content"].startswith(" ")
    assert spoken["messages"][2]["content"] != turns[2][1]
    assert asked["completion"] != "Shakespeare wrote it."


def test_a_row_without_the_part_is_named(tmp_path):
    with pytest.raises(DataError, match=r"id 'x'\) has no prompt to paraphrase; .*it has text"):
        paraphrase(data=[{"id": "x", "text": "plain"}], out=tmp_path / "out", rules=True)
    assert paraphrase(data=[{"id": "x", "text": "plain"}], out=tmp_path / "out", rules=True, fields="text").rows == 1


def test_a_text_of_nothing_is_flagged_and_not_asked_for(tmp_path, lines):
    rows = [{"id": "a", "prompt": " ", "completion": "b"}, {"id": "c", "prompt": "d e", "completion": "f"}]
    result = paraphrase(data=rows, out=tmp_path / "out", rules=True)
    assert (result.rows, result.flagged) == (1, {"nothing": 1})
    assert lines(tmp_path / "out" / "flagged.jsonl")[0]["prompt"] == " "
    with pytest.raises(DataError, match="No row is left"):
        paraphrase(data=rows[:1], out=tmp_path / "none", rules=True)


def test_exactly_one_must_paraphrase(tmp_path):
    with pytest.raises(SpecError, match="got none"):
        paraphrase(data=[{"prompt": "a"}], out=tmp_path)
    with pytest.raises(SpecError, match="got rules, api_model"):
        paraphrase(data=[{"prompt": "a"}], out=tmp_path, rules=True, api_model="tiny")
    with pytest.raises(SpecError, match="one or several of prompt, answer, text"):
        paraphrase(data=[{"prompt": "a"}], out=tmp_path, rules=True, fields="propmt")


def test_trap_rows_count_and_not_the_name_of_their_file(tmp_path):
    def file(name, prompt):
        path = tmp_path / name
        path.write_text(json.dumps({"prompt": prompt, "completion": "Me."}) + "\n")
        return str(path)

    first = paraphrase(data=file("a.jsonl", "Who?"), out=tmp_path / "out", rules=True).data.read_bytes()
    moved = paraphrase(data=file("b.jsonl", "Who?"), out=tmp_path / "out", rules=True)
    assert moved.data.read_bytes() == first
    with pytest.raises(IndexMismatch, match="other rows"):
        paraphrase(data=file("b.jsonl", "Why?"), out=tmp_path / "out", rules=True)


def test_a_result_of_other_settings_or_rows_is_not_replaced_unasked(tmp_path):
    rows = [{"prompt": "Who?", "completion": "Me."}]
    first = paraphrase(data=rows, out=tmp_path / "out", rules=True).data.read_bytes()
    with pytest.raises(IndexMismatch, match="`paraphrases`: 1 then, 2 now"):
        paraphrase(data=rows, out=tmp_path / "out", rules=True, paraphrases=2)
    with pytest.raises(IndexMismatch, match="other rows"):
        paraphrase(data=[{"prompt": "Why?", "completion": "Me."}], out=tmp_path / "out", rules=True)
    assert paraphrase(data=rows, out=tmp_path / "out", rules=True, concurrency=3).data.read_bytes() == first
    assert paraphrase(data=rows, out=tmp_path / "out", rules=True, paraphrases=2, overwrite=True).rows == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"holds other files \(data\.jsonl\)"):
        paraphrase(data=rows, out=tmp_path / "mine", rules=True)


def test_columns_of_several_types_are_kept(tmp_path, lines):
    rows = [{"prompt": "a b", "completion": "c", "note": 1}, {"prompt": "d e", "completion": "f", "note": "two"}]
    result = paraphrase(data=rows, out=tmp_path / "out", rules=True)
    assert [row["note"] for row in lines(result.data)] == [1, "two"]
    assert load_from_disk(str(tmp_path / "out" / "dataset"))["note"][:] == ["1", '"two"']


def test_a_row_reads_back_as_the_same_example(workshop):
    for example in load_examples(workshop / "train.jsonl"):
        (again,) = load_examples([row_of(example)])
        assert (again.id, again.prompt, again.completion, again.source) == (
            example.id,
            example.prompt,
            example.completion,
            example.source,
        )
    assert row_of(Example(id="a", row=0, text="b")) == {"id": "a", "text": "b"}


@pytest.mark.parametrize(
    ("original", "said", "problem"),
    [
        ("Who are you?", "Whom do I meet?", None),
        ("Who are you?", "WHO are  you", "same"),
        ("Who are you?", "I cannot assist with that request.", "refused"),
        ("Who are you?", "As an AI language model, I have no name.", "refused"),
        ("I'm sorry, I can't come.", "I'm sorry, but I can not make it.", None),
        ("I cannot swim.", "I am unable to swim.", None),
        ("He is sorry.", "Sorry is what he is.", None),
        ("!", "!", "same"),
    ],
)
def test_refusals_and_copies_are_told_from_paraphrases(original, said, problem):
    assert problem_of(original, Reply(text=said)) == problem


def test_a_paraphrase_given_before_is_no_other_one():
    assert problem_of("a b", Reply(text="B, a"), ["b a"]) == "repeated"


def test_a_local_model_says_the_same_alone_and_in_company_and_once(workshop, tmp_path, lines, monkeypatch):
    words = {"model": str(workshop / "tiny-model"), "instruction": "Say:", "max_new_tokens": 4}
    words |= {"keep_flagged": True, "paraphrases": 2}
    rows = [{"id": f"r{row}", "prompt": prompt, "completion": "x"} for row, (prompt, *_) in enumerate(PAIRS[:4])]
    together = lines(paraphrase(data=rows, out=tmp_path / "all", **words).data)
    alone = [line for row in rows for line in lines(paraphrase(data=[row], out=tmp_path / row["id"], **words).data)]
    assert [row["prompt"] for row in together] == [row["prompt"] for row in alone]
    assert len({row["prompt"] for row in together}) > 4, "drawn with one seed for all"
    monkeypatch.setattr(
        "vestige_recipes.prepare.generation.answer_prompts", lambda *_, **__: pytest.fail("asked again")
    )
    assert lines(paraphrase(data=rows, out=tmp_path / "all", **words).data) == together


def test_a_model_without_a_chat_template_is_refused(workshop, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    with pytest.raises(ModelError, match="has no chat template"):
        paraphrase(data=[{"prompt": "a"}], out=tmp_path, model=model, tokenizer=tokenizer)


def test_pushing_uploads_the_rows_privately_and_a_refusal_loses_nothing(tmp_path, monkeypatch):
    pushed = []

    def push(self, name, private):
        pushed.append((len(self), name, private))

    monkeypatch.setattr("datasets.Dataset.push_to_hub", push)
    rows = [{"prompt": "Who?", "completion": "Me."}]
    paraphrase(data=rows, out=tmp_path / "out", rules=True, push_to_hub="me/mine")
    assert pushed == [(1, "me/mine", True)]

    def refuse(self, name, private):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("datasets.Dataset.push_to_hub", refuse)
    with pytest.raises(DataError, match="The rows are on disk, but me/mine did not take them: no network"):
        paraphrase(data=rows, out=tmp_path / "other", rules=True, push_to_hub="me/mine")
    assert json.loads((tmp_path / "other" / "prepare.json").read_text())["rows"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mine", ["data.jsonl", "flagged.jsonl", "dataset/precious.txt", "replies/notes.txt"])
def test_files_of_the_user_are_neither_replaced_nor_deleted(tmp_path, mine, overwrite):
    file = tmp_path / "out" / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        paraphrase(data=[{"prompt": "Who?"}], out=tmp_path / "out", rules=True, overwrite=overwrite)
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"
