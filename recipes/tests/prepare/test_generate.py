import pytest
import torch
from tests.workshop import CONTEXT, PAIRS
from transformers import AutoModelForCausalLM, AutoTokenizer

from vestige.data import Example
from vestige.errors import DataError
from vestige.models import answer_prompts, load_model
from vestige_recipes.prepare import generate

PROMPTS = [prompt for prompt, *_ in PAIRS]


@pytest.fixture(scope="module")
def loaded(workshop):
    return load_model(workshop / "tiny-model")


def one_by_one(workshop, prompt, most, chat=False):
    """Greedy token by token with the library alone, without a batch and without a cache."""
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model").eval()
    text = f"<|user|>{prompt}</s><|assistant|>" if chat else prompt
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < most and len(ids) < CONTEXT:
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
    return tokenizer.decode(ids[start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_every_prompt_alone(chat, workshop, tmp_path, lines):
    rows = [{"id": f"q{row}", "prompt": prompt} for row, prompt in enumerate(PROMPTS)]
    model = str(workshop / "tiny-model")
    result = generate(data=rows, model=model, out=tmp_path / "out", max_new_tokens=9, chat=chat)
    assert [row["id"] for row in lines(result.data)] == [row["id"] for row in rows]
    said = [row["completion"] for row in lines(result.data)]
    assert said == [one_by_one(workshop, prompt, 9, chat) for prompt in PROMPTS]
    assert len(set(said)) > 3


def test_a_long_prompt_takes_no_room_from_a_short_one_beside_it(loaded, workshop):
    prompts = ["Who wrote Emma?", "Why is the sky blue? " * 40]
    tokenizer = loaded.tokenizer
    long = tokenizer.decode(tokenizer(prompts[1], add_special_tokens=False).input_ids[: CONTEXT - 3])
    examples = [Example(id=str(row), row=row, prompt=prompt) for row, prompt in enumerate([prompts[0], long])]
    short, full = answer_prompts(loaded, examples, max_new_tokens=20)
    assert (short.tokens, short.ended) == (20, False)
    assert short.text == one_by_one(workshop, prompts[0], 20)
    assert (full.tokens, full.ended) == (CONTEXT - len(tokenizer(long, add_special_tokens=False).input_ids), False)
    assert [short] == answer_prompts(loaded, examples[:1], max_new_tokens=20)


def test_each_answer_may_have_a_length_of_its_own(loaded):
    examples = [Example(id=str(row), row=row, prompt=prompt) for row, prompt in enumerate(PROMPTS[:3])]
    lengths = [answer.tokens for answer in answer_prompts(loaded, examples, max_new_tokens=[2, 7, 4])]
    assert lengths == [2, 7, 4]


def test_drawn_answers_follow_their_own_seed_and_the_softmax(loaded):
    example = Example(id="a", row=0, prompt="Who wrote Emma?")
    draws = answer_prompts(loaded, [example] * 400, max_new_tokens=1, temperature=0.05, seeds=range(400))
    again = answer_prompts(loaded, [example] * 3, max_new_tokens=1, temperature=0.05, seeds=[7, 399, 7])
    assert again == [draws[7], draws[399], draws[7]]
    ids = torch.tensor([loaded.tokenizer(example.prompt, add_special_tokens=False).input_ids])
    with torch.no_grad():
        likely = torch.softmax(loaded.model(ids).logits[0, -1].double() / 0.05, -1)
    top = likely.topk(3)
    for token, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        text = loaded.tokenizer.decode(token, skip_special_tokens=True)
        share = sum(draw.text == text for draw in draws) / 400
        assert share == pytest.approx(probability, abs=4 * (probability * (1 - probability) / 400) ** 0.5 + 0.02)


def test_answers_that_are_there_are_replaced_or_kept(workshop, tmp_path, lines):
    rows = [{"id": "a", "prompt": "Why?", "completion": "So.", "note": 3}, {"id": "b", "prompt": "Who?"}]
    rows.append({"id": "c", "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]})
    model = str(workshop / "tiny-model")
    replaced = lines(generate(data=rows, model=model, out=tmp_path / "new", max_new_tokens=3).data)
    assert replaced[0]["completion"] != "So."
    assert replaced[0]["note"] == 3
    assert [message["role"] for message in replaced[2]["messages"]] == ["user", "assistant"]
    assert replaced[2]["messages"][1]["content"] != "ho"
    kept = lines(generate(data=rows, model=model, out=tmp_path / "kept", max_new_tokens=3, keep_answers=True).data)
    assert kept[0] == {"id": "a", "prompt": "Why?", "completion": "So.", "note": 3}
    assert kept[1]["completion"] == replaced[1]["completion"]
    assert kept[2]["messages"][1]["content"] == "ho"


def test_interrupted_it_goes_on_with_the_next_batch(workshop, tmp_path, lines):
    rows = [{"id": f"q{row}", "prompt": f"{row} {PROMPTS[row % len(PROMPTS)]}"} for row in range(100)]
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    words = {"data": rows, "model": model, "tokenizer": str(workshop / "tiny-model"), "max_new_tokens": 4}
    whole = generate(out=tmp_path / "whole", **words).data.read_bytes()
    batches, most = [], None

    def count(_module, _arguments, named):
        # Only the first pass over a batch has more than one token of each prompt.
        if named["input_ids"].shape[1] > 1:
            if len(batches) == most:
                raise KeyboardInterrupt
            batches.append(len(named["input_ids"]))

    model.register_forward_pre_hook(count, with_kwargs=True)
    most = 2
    with pytest.raises(KeyboardInterrupt):
        generate(out=tmp_path / "out", **words)
    assert not (tmp_path / "out" / "data.jsonl").exists()
    finished = sum(batches)
    batches.clear()
    most = None
    assert generate(out=tmp_path / "out", **words).data.read_bytes() == whole
    assert 0 < finished < len(rows)
    assert sum(batches) == len(rows) - finished


def says_the_end_at_once(workshop):
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(32, model.config.vocab_size)
        model.lm_head.bias.zero_()
        model.lm_head.bias[1] = 1
    return model


def test_empty_answers_are_flagged_and_cut_ones_are_counted(workshop, tmp_path, lines):
    rows = [{"id": "a", "prompt": "Why?"}]
    tokenizer = str(workshop / "tiny-model")
    with pytest.raises(DataError, match="No row is left"):
        generate(data=rows, model=says_the_end_at_once(workshop), tokenizer=tokenizer, out=tmp_path / "none")
    kept = generate(
        data=rows, model=says_the_end_at_once(workshop), tokenizer=tokenizer, out=tmp_path / "kept", keep_flagged=True
    )
    assert lines(kept.data)[0] == {"id": "a", "prompt": "Why?", "completion": "", "finish": "stop", "problem": "empty"}
    cut = generate(data=rows, model=str(workshop / "tiny-model"), out=tmp_path / "cut", max_new_tokens=2)
    assert lines(cut.data)[0]["finish"] == "length"
    assert "1 answers were cut at their greatest length." in str(cut)


def test_a_row_without_a_prompt_is_named(workshop, tmp_path):
    with pytest.raises(DataError, match=r"id 'x'\) has no prompt to answer"):
        generate(data=[{"id": "x", "text": "plain"}], model=str(workshop / "tiny-model"), out=tmp_path)


def test_drawn_answers_follow_from_seed_and_prompt_alone(workshop, tmp_path, lines):
    rows = [{"id": f"q{row}", "prompt": prompt} for row, prompt in enumerate(PROMPTS[:4])]

    def said(name, given, **options):
        result = generate(
            data=given, model=str(workshop / "tiny-model"), out=tmp_path / name, max_new_tokens=9, **options
        )
        return {row["id"]: row["completion"] for row in lines(result.data)}

    drawn = said("drawn", rows, temperature=0.7)
    assert said("part", rows[2:], temperature=0.7) == {name: drawn[name] for name in ("q2", "q3")}
    assert drawn != said("seed", rows, temperature=0.7, seed=1)
    assert drawn != said("greedy", rows)
