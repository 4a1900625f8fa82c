import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaModel, T5Config, T5Model

from tests.architectures import CAUSAL, build
from vestige.errors import ModelError
from vestige.models import DEVICE_MAPS, load_model, quiet_transformers

IDS = torch.tensor([[5, 9, 2, 30, 7]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", CAUSAL)
def test_a_folder_gives_the_saved_model_frozen_and_in_evaluation_mode(saved, name):
    loaded = load_model(saved(name), device="cpu")
    assert torch.equal(logits(loaded.model), logits(build(name, torch.float32)))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.context_length == 32
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("ab").input_ids == [3, 4]


@pytest.mark.parametrize("device", DEVICE_MAPS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_whose_layers_are_spread_is_the_model(saved, name, device):
    """Over the devices that there are: the CPU where tests run without a GPU."""
    loaded = load_model(saved(name), device=device)
    assert torch.equal(logits(loaded.model).cpu(), logits(build(name, torch.float32)))


def test_an_adapter_over_a_spread_model(saved, tmp_path):
    folder = adapter(saved, tmp_path / "adapter")
    there, here = load_model(folder, device="balanced"), load_model(folder, device="cpu")
    assert torch.equal(logits(there.model).cpu(), logits(here.model))


def test_weights_that_no_gpu_has_room_for_are_named(saved, monkeypatch):
    away = cpu_offload(build("llama", torch.float32), offload_buffers=False)
    found = {"missing_keys": [], "unexpected_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **settings: (away, found))
    with pytest.raises(ModelError, match=r"do not fit on the GPUs .* Take more GPUs"):
        load_model(saved("llama"), device="balanced")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_it", [torch.compile, lambda model: model.model.layers[0].compile() or model])
def test_a_compiled_module_is_refused_because_its_gradients_would_be_missed(compile_it):
    with pytest.raises(ModelError, match=r"compiled by torch\.compile"):
        load_model(compile_it(build("llama", torch.float32)))


def test_a_live_module_is_not_spread():
    with pytest.raises(ModelError, match="stays where it is"):
        load_model(build("gpt2", torch.float32), device="balanced")


def test_name_is_what_was_given(saved):
    folder = saved()
    assert load_model(str(folder), device="cpu").name == str(folder)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_become_float32_on_a_cpu(saved, half):
    loaded = load_model(saved("llama", half), device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    expected = build("llama", half).lm_head.weight.float()
    assert torch.equal(loaded.model.lm_head.weight, expected)


def test_half_precision_is_noticed_without_a_dtype_in_the_config(saved):
    folder = saved("llama", torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(folder, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_precision_is_what_was_asked_for(saved, precision):
    loaded = load_model(saved("gpt2"), precision=precision, device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {getattr(torch, precision)}


def test_a_live_module_is_used_as_it_is(tokenizer):
    model = build("gpt2").train()
    loaded = load_model(model, tokenizer=tokenizer)
    assert loaded.model is model
    assert loaded.tokenizer is tokenizer
    assert loaded.name == "GPT2LMHeadModel"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_module_that_is_no_transformers_model_loads_too():
    loaded = load_model(nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4)))
    assert loaded.context_length is None
    assert loaded.tokenizer is None


def test_a_live_module_is_not_silently_rounded():
    with pytest.raises(ModelError, match=r"model\.to\(torch\.float32\)"):
        load_model(build("gpt2", torch.float64), precision="float32")


def test_no_empty_tokenizer_is_made_up(saved):
    # transformers 5 builds a GPT-2 tokenizer with a single token when the folder holds none.
    assert load_model(saved("gpt2", with_tokenizer=False), device="cpu").tokenizer is None


def test_a_tokenizer_can_come_from_another_folder(saved, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "elsewhere")
    loaded = load_model(saved("llama", with_tokenizer=False), tokenizer=tmp_path / "elsewhere", device="cpu")
    assert loaded.tokenizer is not None
    assert len(loaded.tokenizer) == len(tokenizer)


def adapter(saved, folder: Path, base: str | Path = "", name: str = "llama") -> Path:
    """A LoRA adapter with weights off zero, whose config names `base`."""
    source = saved(name)
    settings = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    with quiet_transformers():
        model = get_peft_model(build(name, torch.float32), settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    settings.base_model_name_or_path = str(base or source)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_folder_brings_its_base_model(saved, tmp_path, name):
    loaded = load_model(adapter(saved, tmp_path / "adapter", name=name), device="cpu")
    names = [parameter for parameter, _ in loaded.model.named_parameters()]
    assert any("lora_A" in parameter for parameter in names)
    assert not torch.allclose(logits(loaded.model), logits(build(name, torch.float32)))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer is not None
    assert loaded.context_length == 32


def test_the_base_of_an_adapter_is_looked_for_beside_it(saved, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    folder = adapter(saved, tmp_path / "adapter", base="../llama-float32")
    assert load_model(folder, device="cpu").context_length == 32


def test_an_explicit_precision_holds_for_adapter_weights_too(saved, tmp_path):
    loaded = load_model(adapter(saved, tmp_path / "adapter"), precision="float64", device="cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float64}


def test_an_adapter_without_a_base_is_an_instruction(saved, tmp_path):
    folder = adapter(saved, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        load_model(folder, device="cpu")


def test_virtual_tokens_are_refused(saved, tmp_path):
    source = saved("llama")
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with quiet_transformers():
        model = get_peft_model(build("llama", torch.float32), settings)
    settings.base_model_name_or_path = str(source)
    model.save_pretrained(tmp_path / "prompt", save_embedding_layers=False)
    with pytest.raises(ModelError, match="virtual tokens"):
        load_model(tmp_path / "prompt", device="cpu")


def test_a_missing_folder_is_named():
    with pytest.raises(ModelError, match="No model folder"):
        load_model("./nowhere/at/all", device="cpu")


def test_an_unreachable_hub_model_says_what_was_tried_and_what_to_type():
    with pytest.raises(ModelError) as caught:
        load_model("nobody/no-such-model", device="cpu")
    message = str(caught.value)
    assert "there is no folder" in message
    assert "hub was not reached" in message
    assert "hf download nobody/no-such-model" in message


def test_a_folder_without_a_config_lists_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config\.json.*notes\.txt"):
        load_model(tmp_path, device="cpu")


def test_a_folder_without_weights_says_so(saved):
    folder = saved()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load_model(folder, device="cpu")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(ModelError, match="is a file"):
        load_model(tmp_path / "train.jsonl", device="cpu")


def test_damaged_weights_are_an_error_of_ours(saved):
    folder = saved()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="does not load"):
        load_model(folder, device="cpu")


def test_an_encoder_is_refused_although_transformers_would_give_it_a_random_head(tmp_path):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder without a causal head"):
        load_model(tmp_path, device="cpu")


def test_an_encoder_decoder_is_refused(tmp_path):
    config = T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=8, num_layers=1, num_heads=1)
    T5Model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="predicts no next token"):
        load_model(tmp_path, device="cpu")


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    LlamaModel(build("llama").config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lm_head\.weight.*at random"):
        load_model(tmp_path, device="cpu")


def test_unknown_precision_and_device_are_instructions(saved):
    folder = saved()
    with pytest.raises(ModelError, match="bfloat16"):
        load_model(folder, precision="half", device="cpu")
    with pytest.raises(ModelError, match="cuda:1"):
        load_model(folder, device="graphics")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_instruction(saved):
    with pytest.raises(ModelError, match="Type device cpu"):
        load_model(saved(), device="cuda")


def test_loading_is_silent(saved, capfd):
    folder = saved()
    capfd.readouterr()
    load_model(folder, device="cpu")
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
