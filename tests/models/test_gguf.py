"""A llama-shaped GGUF file of a few kilobytes, unpacked by the same code as a real one."""

import hashlib
import importlib.util
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, PreTrainedModel

from vestige.errors import DiskSpaceError, MissingExtra, ModelError
from vestige.models import load_model

WIDTH, HIDDEN, HEADS, KV_HEADS = 32, 64, 4, 2
TOKENS = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(97, 123)), "Ġ", "Ċ", ".", "ab"]


def write_gguf(file: Path, seed: int = 0) -> Path:
    """One block, 4-bit matrices (Q4_1) as in the demo's model, float32 norms, tied output embedding."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(48)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kv_width = WIDTH // HEADS * KV_HEADS
    matrices = {
        "token_embd": (len(TOKENS), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (kv_width, WIDTH),
        "blk.0.attn_v": (kv_width, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
    }
    for name, shape in matrices.items():
        values = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    write_gguf(tmp_path / "model" / "tiny.Q4_1.gguf")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VESTIGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


@pytest.fixture
def conversions(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were converted, in order."""
    done: list[str] = []
    read = AutoModelForCausalLM.from_pretrained

    def counting(*given, **settings):
        done.extend([settings["gguf_file"]] if "gguf_file" in settings else [])
        return read(*given, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counting)
    return done


def test_weights_are_the_dequantized_ones_and_can_be_trained_and_saved(folder, tmp_path):
    loaded = load_model(folder, device="cpu")
    reader = gguf.GGUFReader(folder / "tiny.Q4_1.gguf")
    packed = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    weights = dict(loaded.model.named_parameters())
    assert np.array_equal(weights["model.embed_tokens.weight"], packed["token_embd.weight"])
    assert np.array_equal(weights["model.layers.0.mlp.down_proj.weight"], packed["blk.0.ffn_down.weight"])
    assert loaded.context_length == 48
    assert not hasattr(loaded.model.config, "quantization_config")
    assert loaded.tokenizer("ab.").input_ids[-1] == TOKENS.index(".")
    loaded.model.requires_grad_(True)
    loaded.model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()
    assert weights["model.embed_tokens.weight"].grad is not None
    loaded.model.save_pretrained(tmp_path / "again")


def test_it_is_unpacked_once_and_says_so(folder, conversions, capfd):
    first = load_model(folder, device="cpu")
    assert "Unpacking tiny.Q4_1.gguf" in capfd.readouterr().err
    second = load_model(folder / "tiny.Q4_1.gguf", device="cpu")
    assert capfd.readouterr().err == ""
    assert len(conversions) == 1
    assert first.fingerprint == second.fingerprint


def test_the_cache_goes_by_content_not_by_name(folder, conversions):
    load_model(folder, device="cpu")
    file = (folder / "tiny.Q4_1.gguf").rename(folder / "renamed.gguf")
    first = load_model(folder, device="cpu")
    assert len(conversions) == 1
    file.unlink()
    write_gguf(file, seed=1)
    assert load_model(folder, device="cpu").fingerprint != first.fingerprint
    assert len(conversions) == 2


def test_a_killed_conversion_is_never_reused(folder, cache, conversions, monkeypatch):
    file = folder / "tiny.Q4_1.gguf"
    finished = cache / hashlib.sha256(file.read_bytes()).hexdigest()

    def killed(model, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            load_model(folder, device="cpu")
    assert not finished.exists()
    leftover = finished.with_name(finished.name + ".part")
    leftover.mkdir(parents=True, exist_ok=True)
    (leftover / "half.safetensors").write_bytes(b"half")
    load_model(folder, device="cpu")
    assert len(conversions) == 2
    assert not leftover.exists()
    assert not (finished / "half.safetensors").exists()


def test_a_process_that_waited_uses_what_the_other_one_made(folder, conversions, monkeypatch):
    acquire = FileLock.acquire

    def acquire_late(lock, *given, **settings):
        """Acquire the lock once another process has converted the file under it."""
        monkeypatch.setattr(FileLock, "acquire", acquire)
        load_model(folder, device="cpu")
        return acquire(lock, *given, **settings)

    monkeypatch.setattr(FileLock, "acquire", acquire_late)
    load_model(folder, device="cpu")
    assert len(conversions) == 1


def test_several_files_are_a_question(folder):
    write_gguf(folder / "other.gguf", seed=1)
    with pytest.raises(ModelError, match="2 GGUF files"):
        load_model(folder, device="cpu")
    assert load_model(folder / "other.gguf", device="cpu").context_length == 48


def test_a_damaged_file_leaves_nothing_behind(folder, cache):
    file = folder / "tiny.Q4_1.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelError, match="cannot be read as a GGUF"):
        load_model(folder, device="cpu")
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]


def test_without_the_reader_the_command_is_named(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(MissingExtra, match=r"pip install 'vestige\[gguf\]'"):
        load_model(folder, device="cpu")


def test_a_full_disk_is_noticed_before_writing(folder, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskSpaceError, match="VESTIGE_CACHE"):
        load_model(folder, device="cpu")
