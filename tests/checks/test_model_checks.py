import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.architectures import build
from tests.workshop import PAIRS
from vestige.checks import doctor


@pytest.mark.slow
def test_tied_weights_are_one_component(examined):
    found = examined(build("gpt2", torch.float32), components="all")["tied weights"]
    assert found.number == 1
    assert found.value == "transformer.wte.weight = lm_head.weight"
    assert "One component, transformer.wte.weight" in found.advice
    assert "Not selected" in examined(build("gpt2", torch.float32))["tied weights"].advice
    assert examined(build("gpt2-untied", torch.float32))["tied weights"].number == 0


@pytest.mark.slow
def test_weights_that_should_be_tied_and_are_not_are_a_warning(examined):
    model = build("llama", torch.float32)
    model.config.tie_word_embeddings = True
    assert examined(model)["tied weights"].verdict == "warn"


@pytest.mark.slow
def test_a_parameter_without_a_rule_is_counted_under_its_kind(examined):
    model = build("llama", torch.float32)
    model.get_submodule("model.layers.0.mlp").register_parameter("scale", torch.nn.Parameter(torch.ones(5)))
    report = examined(model)
    kinds = {row.kind: row for row in report.coverage}
    assert kinds["mlp"].without_rule == 5
    assert kinds["mlp"].selected == kinds["mlp"].parameters - 5
    assert "no rule for 'scale'" in kinds["mlp"].reason
    assert kinds["norm"].reason == "not selected"
    assert (kinds["attention"].reason, kinds["attention"].without_rule) == ("", 0)
    assert report["coverage"].verdict == "warn"
    assert report["coverage"].number == 5
    assert sum(row.parameters for row in report.coverage) == sum(one.numel() for one in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gpt2-untied", "llama", "neox", "opt"])
def test_every_kind_of_parameter_has_its_word(architecture, examined):
    kinds = {row.kind for row in examined(build(architecture, torch.float32)).coverage}
    tied = architecture in ("gpt2", "opt")
    assert kinds == {"embedding", "attention", "mlp", "norm"} | (set() if tied else {"head"})


@pytest.mark.slow
def test_a_head_that_cannot_be_split_off_is_told_of(examined):
    model = build("llama", torch.float32)
    assert examined(model)["output head"].value == "lm_head, split off"

    def soften(module, inputs, output):
        output.logits = 5 * (output.logits / 5).tanh()
        return output

    model.register_forward_hook(soften)
    report = examined(model)
    assert report["output head"].verdict == "warn"
    assert report["gradient check"].verdict == "good"


@pytest.mark.slow
def test_the_precision_of_the_checkpoint_is_shown_beside_that_of_the_run(tmp_path, rows):
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "half")
    report = doctor(model=str(tmp_path / "half"), data=rows)
    assert report["precision"].verdict == "good"
    assert report["precision"].value == "float32, from a bfloat16 checkpoint"
    half = doctor(model=str(tmp_path / "half"), data=rows, precision="float16")["precision"]
    assert (half.verdict, half.value) == ("warn", "float16, from a bfloat16 checkpoint")
    assert "overflow" in half.advice


@pytest.mark.slow
def test_device_and_attention_are_named(examined):
    report = examined(build("llama", torch.float32), device="cpu")
    assert report["device"].value.startswith("cpu")
    assert report["attention"].value in ("sdpa", "eager")


@pytest.mark.slow
def test_the_report_is_json_and_text(examined, empty_folder):
    report = examined(build("llama", torch.float32), components="!norm")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is True
    assert {check["name"] for check in plain["checks"]} == {check.name for check in report.checks}
    assert plain["coverage"][0]["kind"] == report.coverage[0].kind
    text = str(report)
    assert "Parameters covered" in text
    assert "mask:32x32 | sjlt:256" in text
    for check in report.checks:
        assert f"good  {check.name}" in text or f"WARN  {check.name}" in text
    assert max(map(len, text.splitlines())) <= 120
    assert list(empty_folder.iterdir()) == []


@pytest.mark.slow
def test_a_model_that_knows_no_more_than_a_guess_is_a_warning(examined, workshop):
    report = examined(build("llama", torch.float32))
    assert report["learned by the model"].verdict == "warn"
    assert report["learned by the model"].number > 1
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")
    before = doctor(model=model, tokenizer=tokenizer, data=workshop / "train.jsonl")["learned by the model"]
    assert before.verdict == "warn"
    assert "no better than a guess" in before.advice
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [f"{prompt} {completion}" for prompt, completion, _ in PAIRS]
    for _ in range(12):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = doctor(model=model, tokenizer=tokenizer, data=workshop / "train.jsonl")["learned by the model"]
    assert after.verdict == "good"
    assert after.number < before.number
