import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from tests.architectures import CAUSAL, build, move_off_start
from vestige.data import Example, Message
from vestige.errors import DataError, ModelError
from vestige.models import answer_prompts, generate_answers, load_model

PROMPTS = ["a", "why is the sky so", "who are you", "b? c"]


def examples(prompts=PROMPTS):
    return [Example(id=f"q{row}", row=row, prompt=prompt) for row, prompt in enumerate(prompts)]


def completions(loaded, prompts, **settings):
    return [example.completion for example in generate_answers(loaded, examples(prompts), **settings)]


@pytest.mark.parametrize("name", CAUSAL)
def test_a_batch_gives_what_each_prompt_gives_alone(name, tokenizer):
    loaded = load_model(build(name), tokenizer=tokenizer)
    together = completions(loaded, PROMPTS, max_new_tokens=6)
    alone = [completions(loaded, [prompt], max_new_tokens=6)[0] for prompt in PROMPTS]
    assert together == alone
    assert len(set(together)) > 1, "equal answers would hide prompts that were mixed up"


def test_answers_are_the_greedy_continuation(tokenizer):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    ids = tokenizer("who are you").input_ids
    start = len(ids)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert tokenizer.eos_token_id not in ids[start:]
    assert completions(loaded, ["who are you"], max_new_tokens=5) == [expected]


def test_a_tokenizer_that_ends_every_text_does_not_end_a_prompt(tokenizer):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    expected = completions(loaded, PROMPTS, max_new_tokens=5)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("who are you").input_ids[-1] == tokenizer.eos_token_id
    assert completions(loaded, PROMPTS, max_new_tokens=5) == expected


def always_says(token: int):
    """A model whose every next token is `token`."""
    model = build("llama-tied").double()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head = torch.nn.Linear(16, 37, bias=True, dtype=torch.float64)
        model.lm_head.bias.zero_()
        model.lm_head.bias[token] = 1
    return model


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(tokenizer):
    loaded = load_model(always_says(tokenizer.eos_token_id), tokenizer=tokenizer)
    assert completions(loaded, PROMPTS, max_new_tokens=4) == [""] * 4


def test_without_an_end_token_an_answer_ends_with_its_tokens(tokenizer):
    model = always_says(3)
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    assert completions(load_model(model, tokenizer=tokenizer), ["a", "bb"], max_new_tokens=4) == ["aaaa"] * 2


def test_an_answer_stops_where_the_context_is_full(tokenizer):
    loaded = load_model(always_says(3), tokenizer=tokenizer)
    assert loaded.context_length == 32
    assert completions(loaded, ["b" * 30], max_new_tokens=10) == ["aa"]


def test_the_models_own_generation_settings_neither_matter_nor_change(tokenizer):
    model = build("gpt2")
    expected = completions(load_model(model, tokenizer=tokenizer), PROMPTS, max_new_tokens=5)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 100.0
    own = model.generation_config
    assert completions(load_model(model, tokenizer=tokenizer), PROMPTS, max_new_tokens=5) == expected
    assert model.generation_config is own


def test_conversations_get_one_more_turn_and_answered_rows_stay(tokenizer):
    loaded = load_model(always_says(3), tokenizer=tokenizer)
    asked = Example(id="m", row=0, messages=(Message("user", "hi"),))
    answered = Example(id="n", row=1, messages=(Message("user", "hi"), Message("assistant", "yes")))
    complete = Example(id="o", row=2, prompt="a", completion="b")
    text = Example(id="p", row=3, text="plain")
    result = generate_answers(loaded, [asked, answered, complete, text], max_new_tokens=2)
    assert result[0].messages == (Message("user", "hi"), Message("assistant", "aa"))
    assert result[1:] == [answered, complete, text]


def test_each_answer_is_given_as_it_ends_and_is_the_one_of_a_silent_call(tokenizer):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    silent = answer_prompts(loaded, examples(), max_new_tokens=[6, 2, 4, 3])
    given, texts = [], []
    loud = answer_prompts(
        loaded, examples(), max_new_tokens=[6, 2, 4, 3], keep=lambda row, one: given.append((row, one))
    )
    assert loud == silent
    assert sorted(given) == list(enumerate(silent))
    assert [row for row, _ in given] == sorted(range(4), key=lambda row: silent[row].tokens)
    generate_answers(loaded, examples(["who are you"]), max_new_tokens=3, on_text=texts.append)
    assert texts[-1] == silent[2].text[: len(texts[-1])]
    assert len(texts) == 3


def test_a_model_whose_own_way_to_generate_stops_early_ends_its_answers(tokenizer):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    whole = loaded.model.generate
    loaded.model.generate = lambda *, input_ids, attention_mask: whole(input_ids=input_ids)[:, : input_ids.shape[1] + 1]
    (one,) = answer_prompts(loaded, examples(["who are you"]), max_new_tokens=3)
    assert (one.tokens, one.ended) == (1, True)


def test_chat_puts_a_prompt_into_the_template(tokenizer, monkeypatch):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    seen = []
    generate = loaded.model.generate
    monkeypatch.setattr(
        loaded.model, "generate", lambda **inputs: seen.append(inputs["input_ids"]) or generate(**inputs)
    )
    generate_answers(loaded, examples(["hi"]), max_new_tokens=1, chat=True)
    assert tokenizer.decode(seen[0][0]) == "user:hi</s>assistant:"


def test_a_model_that_cannot_generate_says_what_to_do(tokenizer):
    plain = torch.nn.Sequential(torch.nn.Embedding(37, 4), torch.nn.Linear(4, 37))
    with pytest.raises(ModelError, match="completion that is to be explained"):
        generate_answers(load_model(plain, tokenizer=tokenizer), examples(["a"]))
    with pytest.raises(ModelError, match="no tokenizer"):
        generate_answers(load_model(build("llama")), examples(["a"]))


@pytest.mark.parametrize("prompt", ["", "a" * 32])
def test_a_prompt_without_room_names_its_query(prompt, tokenizer):
    loaded = load_model(build("llama"), tokenizer=tokenizer)
    with pytest.raises(DataError, match="'q1'"):
        generate_answers(loaded, examples(["fine", prompt]))


@pytest.mark.filterwarnings("ignore")
def test_an_activated_lora_answers_as_in_pefts_own_generate(tokenizer):
    torch.manual_seed(0)
    invocation = tokenizer("who").input_ids
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules="all-linear", alora_invocation_tokens=invocation
    )
    model = move_off_start(get_peft_model(build("llama"), config, autocast_adapter_dtype=False)).double().eval()
    loaded = load_model(model, tokenizer=tokenizer)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        output = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=1)
        expected.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert completions(loaded, PROMPTS, max_new_tokens=5) == expected
    with model.disable_adapter():
        assert completions(loaded, PROMPTS[2:3], max_new_tokens=5) != expected[2:3], "the adapter changes no answer"
