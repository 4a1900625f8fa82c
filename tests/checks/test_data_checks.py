import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from tests.architectures import VOCABULARY, build
from vestige.checks import doctor
from vestige.errors import DataError


@pytest.fixture
def tokenizer(workshop):
    return AutoTokenizer.from_pretrained(workshop / "tiny-model")


def framed(tokenizer, frame: str):
    named = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=named)
    return tokenizer


def on_texts(workshop, tokenizer, texts, **settings):
    data = [{"id": f"text-{number}", "text": text} for number, text in enumerate(texts)]
    return doctor(model=str(workshop / "tiny-model"), tokenizer=tokenizer, data=data, **settings)


TEXTS = ["The capital of France is Paris.", "Bees make honey and wax."]


@pytest.mark.slow
def test_a_tokenizer_that_writes_its_beginning_three_times_is_bad(workshop, tokenizer):
    report = on_texts(workshop, framed(tokenizer, "<s> <s> <s> $A"), TEXTS)
    found = report["beginning token"]
    assert (found.verdict, found.number) == ("bad", 2)
    assert "'text-0'" in found.advice
    assert not report.ok


@pytest.mark.slow
def test_a_tokenizer_that_writes_it_twice_is_told_of_as_vestige_removes_one(workshop, tokenizer):
    found = on_texts(workshop, framed(tokenizer, "<s> <s> $A"), TEXTS)["beginning token"]
    assert found.verdict == "warn"
    assert "removes one" in found.advice


@pytest.mark.slow
def test_a_chat_template_that_doubles_the_beginning_is_bad(workshop, tokenizer):
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    data = [{"prompt": "Why?", "completion": "Because."}, {"prompt": "Who?", "completion": "Me."}]
    report = doctor(model=str(workshop / "tiny-model"), tokenizer=tokenizer, data=data, chat=True)
    assert (report["beginning token"].verdict, report["beginning token"].number) == ("bad", 2)
    assert report["chat template"].verdict == "good"


@pytest.mark.slow
def test_one_beginning_is_good_and_a_mixture_a_warning(workshop, tokenizer):
    assert on_texts(workshop, framed(tokenizer, "<s> $A"), TEXTS)["beginning token"].verdict == "good"
    mixed = on_texts(workshop, framed(tokenizer, "$A"), [*TEXTS, "<s>Ants have six legs."])
    assert mixed["beginning token"].verdict == "warn"


@pytest.mark.slow
def test_prompts_outside_the_chat_template_are_a_warning(workshop):
    report = doctor(model=str(workshop / "tiny-model"), data=str(workshop / "train.jsonl"))
    assert report["chat template"].verdict == "warn"
    assert "--chat" in report["chat template"].advice
    assert report.ok


@pytest.mark.slow
def test_an_example_without_targets_is_named(examined, rows):
    rows[2]["labels"] = [-100] * len(rows[2]["input_ids"])
    found = examined(build("llama", torch.float32))["targets"]
    assert (found.verdict, found.number) == ("warn", 1)
    assert "'row-2'" in found.advice
    assert "of 8 examples have none" in found.value


def test_no_target_at_all_is_refused_as_the_index_refuses_it(examined, rows):
    for row in rows:
        row["labels"] = [-100] * len(row["input_ids"])
    with pytest.raises(DataError, match="token to learn"):
        examined(build("llama", torch.float32))


@pytest.mark.slow
def test_what_is_cut_off_is_counted_and_named(examined, rows):
    found = examined(build("llama", torch.float32), max_length=6)["length"]
    long = [row["id"] for row in rows if len(row["input_ids"]) > 6]
    assert (found.verdict, found.number) == ("warn", len(long))
    assert "cut at 6" in found.value
    assert repr(long[0]) in found.advice


@pytest.mark.slow
def test_empty_and_repeated_examples_are_counted(examined, rows):
    rows.append({"id": "lone", "input_ids": [5], "labels": [5]})
    rows.append(rows[0] | {"id": "copy"})
    report = examined(build("llama", torch.float32))
    assert (report["empty examples"].number, report["duplicates"].number) == (1, 1)
    assert "'lone'" in report["empty examples"].advice
    assert "'copy'" in report["duplicates"].advice
    assert report.ok


@pytest.mark.slow
def test_the_same_tokens_with_other_targets_are_no_duplicate(examined, rows):
    rows.append({"id": "other", "input_ids": rows[0]["input_ids"], "labels": [-100, -100, *rows[0]["labels"][2:]]})
    assert examined(build("llama", torch.float32))["duplicates"].verdict == "good"


def test_tokens_that_the_model_does_not_know_are_bad_and_nothing_is_run(examined, rows):
    rows[4]["input_ids"][1] = rows[4]["labels"][1] = VOCABULARY
    report = examined(build("llama", torch.float32))
    assert report["vocabulary"].verdict == "bad"
    assert "'row-4'" in report["vocabulary"].advice
    assert report["gradients"].value == "not tried"
    assert report.costs == ()
    assert "vocabulary" in str(report).splitlines()[-1]
