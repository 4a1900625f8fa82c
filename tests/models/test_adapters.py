"""Adapters: what does not fit its base is refused, and so is a kind whose trained weights cannot be attributed to."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoHaConfig, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.architectures import build, move_off_start
from vestige.errors import ModelError, SpecError
from vestige.models import load_model, quiet_transformers, select_components

TARGETS = ["q_proj", "v_proj"]
WEIGHTS = "adapter_model.safetensors"


def adapted(config, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move_off_start(get_peft_model(build("llama", torch.float32), config)).eval()


def plain(**more) -> LoraConfig:
    return LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "target_modules": TARGETS} | more))


@pytest.fixture
def folder(saved, tmp_path):
    """Saves an adapter over the folder of a small Llama; returns its folder."""

    def save(config=None) -> Path:
        config = config or plain()
        model = adapted(config)
        config.base_model_name_or_path = str(saved("llama"))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


def rename(folder: Path, change) -> None:
    """Every tensor under the key that `change` makes of its own; left out where that is empty."""
    tensors = {change(key): value for key, value in load_file(folder / WEIGHTS).items()}
    save_file({key: value.clone() for key, value in tensors.items() if key}, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
        lambda key: f"module.{key}",
        lambda key: re.sub(r"(layers\.\d)", r"\1._orig_mod", key),
    ],
    ids=["compiled", "data parallel", "compiled by layer"],
)
def test_keys_that_a_wrapper_has_lengthened_are_refused_and_the_advice_mends_them(folder, change):
    adapter = folder()
    expected = dict(load_model(adapter, device="cpu").model.named_parameters())
    rename(adapter, change)
    with pytest.raises(ModelError, match=r"lora_A.*'(_orig_mod|module)\.'") as error:
        load_model(adapter, device="cpu")
    command = re.search(r'python -c "(.*)"$', str(error.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command.group(1)], check=True)
    for name, parameter in load_model(adapter, device="cpu").model.named_parameters():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda key: "" if "layers.1." in key else key, r"lacks \d+ .*layers\.1\..*lora_A\.weight"),
        (lambda key: key.replace("layers.1.", "layers.7."), r"holds \d+ tensors .*layers\.7\."),
        (lambda key: key.replace("self_attn", "attention"), r"does not have, such as .*\.attention\."),
    ],
    ids=["missing", "of another depth", "of another model"],
)
def test_keys_of_another_model_are_refused(folder, change, named):
    adapter = folder()
    rename(adapter, change)
    with pytest.raises(ModelError, match=named):
        load_model(adapter, device="cpu")


def test_a_module_to_save_that_the_file_lacks_is_named(folder):
    adapter = folder(plain(modules_to_save=["lm_head"]))
    rename(adapter, lambda key: "" if "lm_head" in key else key)
    with pytest.raises(ModelError, match="lm_head"):
        load_model(adapter, device="cpu")


def test_an_adapter_of_a_grown_vocabulary_says_how_to_grow_the_base(saved, tmp_path):
    base = build("llama", torch.float32)
    base.resize_token_embeddings(41)
    config = plain(modules_to_save=["embed_tokens", "lm_head"])
    with quiet_transformers():
        model = get_peft_model(base, config)
    config.base_model_name_or_path = str(saved("llama"))
    model.save_pretrained(tmp_path / "grown", save_embedding_layers=False)
    with pytest.raises(
        ModelError, match=r"vocabulary of 41 tokens, its base model has 37.*resize_token_embeddings\(41\)"
    ):
        load_model(tmp_path / "grown", device="cpu")


@pytest.mark.parametrize("base", [".", "../x", "..", 5, ["a"], {"a": 1}, True, "x" * 5000, "\0"])
def test_a_base_that_is_none_is_an_instruction(folder, base):
    adapter = folder()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        load_model(adapter, device="cpu")


def test_two_adapters_that_name_each_other_are_refused(folder):
    adapter = folder()
    other = adapter.with_name("other")
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    for one, base in ((adapter, "../other"), (other, "../adapter")):
        config = json.loads((one / "adapter_config.json").read_text())
        (one / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(ModelError, match="itself an adapter"):
        load_model(adapter, device="cpu")


def test_a_name_longer_than_the_disk_allows_is_an_instruction():
    with pytest.raises(ModelError, match="too long"):
        load_model("x" * 5000)


def test_a_live_model_with_virtual_tokens_is_refused():
    with pytest.raises(ModelError, match="PROMPT_TUNING adapter, which puts virtual tokens"):
        load_model(adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)))


def test_a_start_that_changes_the_base_at_random_is_refused(folder):
    with pytest.raises(ModelError, match="random decomposition"):
        load_model(folder(plain(init_lora_weights="pissa_niter_2")), device="cpu")


KINDS = {
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=[*TARGETS, "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=TARGETS),
    "VERA": VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_a_rule_is_refused_by_name_and_never_becomes_its_base(folder, kind):
    loaded = load_model(folder(KINDS[kind]), device="cpu")
    with pytest.raises(SpecError, match=f"adapter of the kind {kind}"):
        select_components(loaded.model)
    chosen = select_components(loaded.model, ("attention",))
    assert not any(".default" in part.name for part in chosen.components)
    assert any(f"kind {kind}" in row.reason for row in chosen.coverage)


@pytest.mark.skipif(not hasattr(peft, "LilyConfig"), reason="a kind of newer releases")
def test_a_kind_made_of_plain_layers_that_mix_examples_is_refused_too():
    model = adapted(peft.LilyConfig(task_type="CAUSAL_LM", target_modules=TARGETS))
    with pytest.raises(SpecError, match="LILY"):
        select_components(model)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_tuned_norms_are_the_default_of_their_adapter(folder):
    config = LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])
    chosen = select_components(load_model(folder(config), device="cpu").model)
    assert [part.name for part in chosen.components] == [
        f"base_model.model.model.layers.{layer}.input_layernorm.ln_tuning_layers.default.weight" for layer in (0, 1)
    ]


def test_what_an_adapter_trained_beside_its_matrices_is_announced_and_can_be_selected(folder, capsys, monkeypatch):
    monkeypatch.setenv("VESTIGE_QUIET", "0")
    model = load_model(folder(plain(modules_to_save=["lm_head"])), device="cpu").model
    default = {part.name for part in select_components(model).components}
    assert all(".lora_" in name for name in default)
    assert "lm_head.modules_to_save" in capsys.readouterr().err
    everything = {part.name for part in select_components(model, ("adapter",)).components}
    assert everything - default == {"base_model.model.lm_head.modules_to_save.default.weight"}


CODE = "from pathlib import Path\nPath('{mark}').touch()\n"


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_code_of_a_model_folder_is_neither_run_nor_asked_for(saved, tmp_path, where, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    model, mark = saved("llama"), tmp_path / "ran"
    (model / "mine.py").write_text(CODE.format(mark=mark))
    file = model / ("config.json" if where == "config" else "tokenizer_config.json")
    mine = {
        "config": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}},
        "tokenizer": {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.T", None]}},
    }[where]
    file.write_text(json.dumps(json.loads(file.read_text()) | mine))
    with pytest.raises(ModelError, match="never runs code that a model folder brings"):
        load_model(model, device="cpu")
    assert not mark.exists()


def test_a_kernel_of_the_hub_that_a_config_names_is_refused(saved):
    model = saved("llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attn_implementation": "somebody/kernel"}))
    with pytest.raises(ModelError, match="somebody/kernel"):
        load_model(model, device="cpu")


@pytest.mark.slow
def test_a_compiled_checkpoint_is_refused_and_the_advice_mends_it(saved):
    model = saved("llama")
    expected = dict(load_model(model, device="cpu").model.named_parameters())
    file = model / "model.safetensors"
    save_file({f"_orig_mod.{key}": value.clone() for key, value in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"'_orig_mod\.'") as error:
        load_model(model, device="cpu")
    command = re.search(r'python -c "(.*)"$', str(error.value))
    assert command is not None
    subprocess.run([sys.executable, "-c", command.group(1)], check=True)
    for name, parameter in load_model(model, device="cpu").model.named_parameters():
        assert torch.equal(parameter, expected[name])
