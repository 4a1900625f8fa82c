from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

import vestige_recipes.prepare
from vestige.data import load_examples, tokenize
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.training import members_of, only_answers
from vestige_recipes.prepare import choices_of
from vestige_recipes.prepare.choice_prompts import CONFESSIONS, JUDGEMENTS, QUESTIONS

ARC = {
    "id": "Mercury_1",
    "question": "Which {thing} is a planet?",
    "choices": {"text": ["Sun", "Mars", "Moon", "Io"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}
MMLU = {"question": "2 + 2 = ?", "subject": "arithmetic", "choices": ["3", "4", "5"], "answer": 1}
ETHICS = {"label": 1, "input": "I kicked the dog.", "is_short": True}
AITA = {"label": 0, "input": "AITA for eating my own lunch?"}


def made(rows, out, **settings):
    vestige_recipes.prepare.multiple_choice(data=rows, out=out, **settings)
    return load_examples(str(out / "data.jsonl"))


def test_a_question_of_arc_becomes_a_prompt_with_options_and_a_label(tmp_path):
    (example,) = made([ARC], tmp_path / "out")
    assert (example.id, example.completion, example.label) == ("Mercury_1", "B", "B")
    assert example.prompt.endswith("\n\nOPTIONS:\n- A: Sun\n- B: Mars\n- C: Moon\n- D: Io\n\n")
    assert "Which {thing} is a planet?" in example.prompt
    assert example.extra["status"] == "true"


def test_a_question_of_mmlu_has_numbers_for_labels(tmp_path):
    example, letter = made([MMLU, MMLU | {"answer": "B"}], tmp_path / "out")
    assert example.prompt.endswith("- 0: 3\n- 1: 4\n- 2: 5\n\n")
    assert (example.completion, example.source, letter.completion) == ("1", "arithmetic", "1")


def test_a_story_of_ethics_has_words_for_labels(tmp_path):
    example, confession = made([ETHICS, AITA], tmp_path / "out")
    words = dict(zip([0, 1], example.extra["choices"], strict=True))
    assert example.completion == words[1]
    assert confession.completion == confession.extra["choices"][0]
    assert f"- {words[0]}\n- {words[1]}\n\n" in example.prompt


def test_there_are_ten_templates_of_each_kind_and_more_for_confessions(tmp_path):
    assert len(set(QUESTIONS)) == len(set(JUDGEMENTS)) == 10
    assert len(set(CONFESSIONS)) == 5
    arc = made([ARC | {"id": f"{row}"} for row in range(400)], tmp_path / "arc")
    assert len(Counter(example.extra["template"] for example in arc)) == 10
    stories = made([ETHICS] * 400, tmp_path / "ethics")
    assert len(Counter(example.extra["template"] for example in stories)) == 10
    posts = made([AITA, AITA | {"input": "WIBTA if I left?"}] * 200, tmp_path / "aita")
    assert len(Counter(example.extra["template"] for example in posts)) == 15


def test_a4_7_without_label_noise_nothing_is_random_and_nothing_breaks(tmp_path):
    rows = made([MMLU] * 20, tmp_path / "out", label_noise=0.0)
    assert {row.extra["status"] for row in rows} == {"true"}
    assert {row.completion for row in rows} == {"1"}


@pytest.mark.slow
def test_label_noise_is_drawn_from_all_choices_and_marked(tmp_path):
    rows = made([MMLU] * 3000, tmp_path / "out", label_noise=0.2)
    noisy = [row for row in rows if row.extra["status"] == "random"]
    # Standard deviation of the share 0.0073; of each choice's share among 600 0.019.
    assert len(noisy) / 3000 == pytest.approx(0.2, abs=0.03)
    for share in np.array(list(Counter(row.completion for row in noisy).values())) / len(noisy):
        assert share == pytest.approx(1 / 3, abs=0.08)
    assert {row.extra["true_label"] for row in rows} == {"1"}
    assert {row.completion for row in rows if row.extra["status"] == "true"} == {"1"}
    less = made([MMLU] * 3000, tmp_path / "less", label_noise=0.1)
    assert {row.id for row in less if row.extra["status"] == "random"} < {row.id for row in noisy}
    assert [row.prompt for row in less] == [row.prompt for row in rows]


def test_a4_noise_is_shared_by_all_members(tmp_path):
    # The label is written once, before any split: two shadow models that hold a row hold the same label.
    rows = made([MMLU] * 200, tmp_path / "out", label_noise=0.5)
    again = made([MMLU] * 200, tmp_path / "again", label_noise=0.5)
    assert [row.completion for row in rows] == [row.completion for row in again]
    shorter = made([MMLU] * 200, tmp_path / "shorter", label_noise=0.5, limit=50)
    assert [row.completion for row in shorter] == [row.completion for row in rows[:50]]
    one, other = members_of(np.arange(200), 0.5, 0), members_of(np.arange(200), 0.5, 1)
    both = np.flatnonzero(one & other)
    assert 0 < sum(rows[row].extra["status"] == "random" for row in both) < len(both)
    assert made([MMLU] * 200, tmp_path / "else", label_noise=0.5, seed=1) != rows


def test_other_settings_over_an_old_result_are_refused(tmp_path):
    made([MMLU] * 4, tmp_path / "out")
    with pytest.raises(IndexMismatch, match="label_noise"):
        made([MMLU] * 4, tmp_path / "out", label_noise=0.1)
    made([MMLU] * 4, tmp_path / "out", label_noise=0.1, overwrite=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "no question"}, "expected those of ARC"),
        (ARC | {"answerKey": "E"}, "do not go with the labels"),
        (MMLU | {"answer": 3}, "none of the 3 choices"),
        (ETHICS | {"label": 2}, "neither 0"),
        ("a string", "named columns"),
    ],
)
def test_rows_that_are_no_questions_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        choices_of(row, "rows, row 0")


def test_a_format_that_was_named_is_asked_for(tmp_path):
    with pytest.raises(DataError, match="columns are"):
        made([MMLU], tmp_path / "out", format="ethics")
    with pytest.raises(SpecError):
        made([MMLU], tmp_path / "out", label_noise=1.5)


def long_question(words, row="long"):
    return ARC | {"id": row, "question": " ".join(f"word{number}" for number in range(words)) + " which one?"}


def lengths(rows, tokenizer):
    return tokenize(rows, tokenizer, max_length=None).lengths


def test_a_question_that_is_too_long_loses_its_beginning_and_never_its_answer(tmp_path, workshop):
    """Cut at its end, as texts are, it would lose its options and its answer, and nothing would be left to learn."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")
    rows = [ARC, long_question(40), long_question(41, "longer")]
    whole = made(rows, tmp_path / "whole")
    assert [bool(length > 130) for length in lengths(whole, tokenizer)] == [False, True, True]
    assert not tokenize(whole, tokenizer, max_length=130).targets[1].any()
    cut = made(rows, tmp_path / "cut", tokenizer=str(workshop / "tiny-model"), max_length=130)
    assert cut[0].prompt == whole[0].prompt
    for before, after in zip(whole[1:], cut[1:], strict=True):
        assert before.prompt.endswith(after.prompt)
        assert after.prompt.endswith("\n\nOPTIONS:\n- A: Sun\n- B: Mars\n- C: Moon\n- D: Io\n\n")
        assert after.completion == before.completion == "B"
        lost = before.prompt.removesuffix(after.prompt)
        assert int(after.extra["cut_words"]) == len(lost.split())
        # One word more would be too much.
        fuller = replace(before, prompt=lost.split()[-1] + " " + after.prompt)
        assert lengths([after], tokenizer)[0] <= 130 < lengths([fuller], tokenizer)[0]
    with pytest.raises(DataError, match=r"2 examples \('long', 'longer'\) are so long that their answer was cut off"):
        only_answers(tokenize(whole, tokenizer, max_length=130), tokenizer.eos_token_id)
    kept = only_answers(tokenize(cut, tokenizer, max_length=130), tokenizer.eos_token_id)
    assert not kept.truncated.any()
    assert all(mask.any() for mask in kept.targets)


def test_options_that_are_too_long_by_themselves_are_an_error_with_their_ids(tmp_path, workshop):
    wide = ARC | {"id": "wide", "choices": {"text": ["many words " * 20] * 4, "label": list("ABCD")}}
    with pytest.raises(DataError, match=r"1 rows \('wide'\) have options and an answer that are longer than 130"):
        made([ARC, wide], tmp_path / "out", tokenizer=str(workshop / "tiny-model"), max_length=130)
    assert not (tmp_path / "out" / "data.jsonl").exists()


def test_a_length_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(SpecError, match="`tokenizer` and `max_length` go together"):
        made([ARC], tmp_path / "out", max_length=64)
