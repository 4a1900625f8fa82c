"""A model that two processes hold together: what they store and score is what one process does, killed or not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import vestige
from tests.workshop import CONTEXT, PAIRS, furnish, write_rows
from vestige.compress import parse_spec
from vestige.data import load_examples, tokenize
from vestige.distributed import is_rank0, process_group
from vestige.errors import ModelError, SpecError
from vestige.gradients import CausalLoss
from vestige.indexes import CompressedGradients, lay_out
from vestige.models import load_model, select_components
from vestige.settings import AttributeSettings, AuditSettings, IndexSettings

DYING = """
import os
if os.environ.get("RANK") == os.environ.get("DIES"):
    import signal
    from vestige.indexes import IndexWork
    fill = IndexWork._fill
    IndexWork._fill = lambda self, piece, *rest: (
        os.kill(os.getpid(), signal.SIGKILL) if piece == 2 else fill(self, piece, *rest)
    )
"""
"""What a process does before all else: the one that is named in DIES dies in the third piece."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
METHODS = {"tiny-model": "grad-dot", "gpt2": "ekfac"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two tiny models, one with Conv1D and tied embeddings; prompts that carry no label, of uneven lengths."""
    folder = furnish(tmp_path_factory.mktemp("parts"))
    texts = [{"id": "empty", "prompt": "Why?", "completion": ""}, {"id": "text", "text": "Bees. " * 9}]
    pairs = [{"id": prompt, "prompt": prompt, "completion": answer} for prompt, answer, _ in PAIRS[:9]]
    write_rows(folder / "train.jsonl", texts + pairs)
    write_rows(folder / "asked.jsonl", [{"prompt": "Who wrote Emma?", "completion": "Jane."}, {"text": "Bees."}])
    words = AutoTokenizer.from_pretrained(folder / "tiny-model")
    torch.manual_seed(1)
    gpt2 = GPT2Config(
        vocab_size=len(words), n_embd=24, n_layer=3, n_head=2, n_positions=CONTEXT, bos_token_id=0, eos_token_id=1
    )
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    words.save_pretrained(folder / "gpt2")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(DYING)
    return folder


def run(place, *words, **environment):
    path = os.pathsep.join([str(place / "site"), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*TORCHRUN, *words],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def index(place, model, out, device):
    return vestige.index(
        model=place / model,
        data=place / "train.jsonl",
        out=place / out,
        components="all",
        compress="sjlt:8",
        precision="float64",
        token_budget=60,
        device=device,
    )


def everything(place, names, device):
    """What the test compares, by both processes or by one."""
    for model, method in METHODS.items():
        index(place, model, f"{names}-{model}", device)
        vestige.attribute(
            model=place / model,
            data=place / "train.jsonl",
            queries=str(place / "asked.jsonl"),
            method=method,
            components="all",
            out=place / f"{names}-{model}-run",
            token_budget=60,
            device=device,
            dense=True,
            trust=method == "grad-dot",
        )


def rows(place, device):
    """Gradients of five batches at once: of two processes, the second has none in the last round."""
    loaded = load_model(place / "gpt2", device=device, precision="float64")
    components = select_components(loaded.model, ("all",)).components
    spec = parse_spec("sjlt:8")
    data = tokenize(load_examples(place / "train.jsonl"), loaded.tokenizer, max_length=48)
    with CompressedGradients(loaded, components, lay_out(components, spec), spec, 0, "sum") as compute:
        return compute.rows(data, [np.arange(first, min(first + 2, 9)) for first in range(0, 9, 2)])


@pytest.mark.slow
def test_two_processes_leave_the_bytes_of_one_though_one_of_them_was_killed(place):
    words = ("--data", "train.jsonl", "--components", "all", "--compress", "sjlt:8", "--token-budget", "60")
    named = ("--model", "tiny-model", "--out", "two-tiny-model", "--precision", "float64", "--device", "fsdp")
    killed = run(place, "-m", "vestige", "index", *words, *named, DIES="1")
    assert killed.returncode != 0
    assert "Run the same command again" in killed.stderr, killed.stderr[-3000:]
    kept = {path: path.stat().st_mtime_ns for path in (place / "two-tiny-model" / "shards").glob("*.json")}
    assert len(kept) in (1, 2), "the last shard that was computed may not have reached the disk"

    run_again = run(place, "-m", "tests.models.test_in_parts", str(place))
    assert run_again.returncode == 0, run_again.stderr[-3000:]
    assert run_again.stdout.count("holds a part") == 2
    assert len(re.findall(rf"Indexing: {len(kept)} of \d+ pieces are already done", run_again.stderr)) == 1
    assert kept == {path: path.stat().st_mtime_ns for path in kept}

    everything(place, "one", "cpu")
    for model in METHODS:
        one, two = (vestige.Index.open(place / f"{names}-{model}") for names in ("one", "two"))
        assert len(one.manifest.shard_rows) > 4
        assert one.fingerprint == two.fingerprint
        compare(place / f"one-{model}-run", place / f"two-{model}-run")
    for found, expected in zip(torch.load(place / "rows.pt"), rows(place, "cpu"), strict=True):
        assert torch.equal(found, expected)


def compare(one, two):
    for name in ("scores.parquet", "components.parquet"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    records = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    for key in ("distribution", "trust", "model", "coverage"):
        assert records[0][key] == records[1][key]
    dense = [vestige.Scores.open(run).dense() for run in (one, two)]
    assert (dense[0] == dense[1]).all()


def main():
    """One of two processes."""
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    with process_group():
        model = load_model(place / "gpt2", device="fsdp").model
        blocks = list(model.transformer.h.parameters())
        held, whole = sum(part.to_local().numel() for part in blocks), sum(part.numel() for part in blocks)
        assert 0.4 < held / whole < 0.6
        assert model.lm_head.weight is model.transformer.wte.weight
        # The head is whole in every process: logits are computed in chunks, not for all positions at once.
        assert CausalLoss().head_module(model) == "lm_head"
        print("holds a part", flush=True)
        found = rows(place, "fsdp")
        if is_rank0():
            torch.save(tuple(found), place / "rows.pt")
    everything(place, "two", "fsdp")


def test_one_process_alone_is_told_what_to_type(place, tmp_path):
    with pytest.raises(SpecError, match=re.escape("torchrun --nproc-per-node 2 -m vestige")):
        index(place, "tiny-model", tmp_path / "alone", "fsdp")


def test_what_cannot_run_in_step_is_refused(tmp_path):
    with pytest.raises(SpecError, match="works with vestige index and vestige attribute"):
        AuditSettings(model="m", data="d", out=tmp_path, device="fsdp")
    with pytest.raises(SpecError, match="drop --workers and --engine"):
        IndexSettings(model="m", data="d", out=tmp_path, device="fsdp", workers=2)
    shared = {"model": "m", "data": "d", "queries": "q", "out": tmp_path, "device": "fsdp"}
    assert AttributeSettings(**shared).device == "fsdp"
    with pytest.raises(ModelError, match="a live module stays where it is"):
        load_model(torch.nn.Linear(1, 1), device="fsdp")


if __name__ == "__main__":
    main()
