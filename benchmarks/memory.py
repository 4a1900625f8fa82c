"""Peak memory of indexing, attributing and evaluating, over the number of examples: one process each, one thread.

    python benchmarks/memory.py [--real 2000 20000] [--replaced 10000 1000000] [--workers 1] [--keep FOLDER]

`real` computes every gradient of a tiny model. `replaced` runs the same commands, but gradients follow from row numbers
instead of being computed: reading, tokenising, planning, shards, scores and tables are the real ones. `attribute dense`
keeps all scores and self-influence; both evaluations judge that run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = 400
TOKENS = (8, 40)
"""Fewest and most words of an example."""
STEPS = ("index", "attribute", "attribute dense", "evaluate retrieval", "evaluate mislabel")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=int, nargs="*", default=[2_000, 20_000])
    parser.add_argument("--replaced", type=int, nargs="*", default=[10_000, 1_000_000])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="make the files here, and leave them")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="vestige-memory-"))
    folder.mkdir(parents=True, exist_ok=True)
    _model(folder / "model")
    rows = []
    for kind, counts in (("real", given.real), ("replaced", given.replaced)):
        for count in counts:
            data = _data(folder / f"{count}.jsonl", count)
            for step in STEPS:
                rows.append(_measured(folder, kind, step, count, data.stat().st_size, given.workers))
                print(_line(rows[-1]), file=sys.stderr, flush=True)
    print("| gradients | step | examples | data | peak memory | peak without file pages | seconds |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    print("\n".join(map(_line, rows)))
    print(_growth(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))
    if not given.keep:
        shutil.rmtree(folder)


def _line(row: dict[str, Any]) -> str:
    sizes = [f"{row[name] / 1e6:,.0f} MB" for name in ("bytes", "peak", "private")]
    return f"| {row['kind']} | {row['step']} | {row['examples']:,} | {' | '.join(sizes)} | {row['seconds']:,.0f} |"


def _growth(rows: list[dict[str, Any]]) -> str:
    lines = []
    for kind in ("real", "replaced"):
        for step in STEPS:
            same = [row for row in rows if (row["kind"], row["step"]) == (kind, step)]
            if len(same) > 1:
                more = same[-1]["examples"] - same[0]["examples"]
                per_example = (same[-1]["peak"] - same[0]["peak"]) / more
                lines.append(f"{kind} {step}: {per_example:,.0f} bytes of peak memory per further example")
    return "\n".join(lines)


def _measured(folder: Path, kind: str, step: str, count: int, size: int, workers: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VESTIGE_QUIET": "1", "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--one", kind, step, str(folder), str(count), str(workers)]
    run = subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True)
    found = json.loads(run.stdout.splitlines()[-1])
    return {"kind": kind, "step": step, "examples": count, "bytes": size, **found}


def _one(kind: str, step: str, folder: Path, count: int, workers: int) -> None:
    """One command in this process, and what it took."""
    import threading
    import time

    import torch

    torch.set_num_threads(1)
    if kind == "replaced":
        _replace_gradients()
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most[0] = max(most[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    _step(step, folder, folder / f"{count}.jsonl", f"{kind}-{count}", workers)
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    print(json.dumps({"peak": _status("VmHWM"), "private": most[0], "seconds": seconds}))


def _step(step: str, folder: Path, data: Path, name: str, workers: int) -> None:
    import vestige
    import vestige.evaluate

    index, model, dense = folder / name, str(folder / "model"), folder / f"{name}-dense"
    queries = [
        {"prompt": "w1 w2 w3", "completion": " w4 w5", "answers": "example-7"},
        {"text": "w7 w8 w9", "answers": ["example-3", "example-5"]},
    ]
    judging: dict[str, Any] = {"run": str(dense), "opponents": False, "out": folder / f"{name}-evaluated"}
    if step == "index":
        settings = {"compress": "tensorsketch:16", "token_budget": 1024, "workers": workers, "overwrite": True}
        vestige.index(model=model, data=str(data), out=index, **settings)
    elif step == "attribute":
        out = folder / f"{name}-run"
        vestige.attribute(index=index, queries=queries, method="grad-dot", out=out, overwrite=True)
    elif step == "attribute dense":
        kept = {"dense": True, "self_influence": True, "overwrite": True}
        vestige.attribute(index=index, queries=queries, method="grad-dot", out=dense, **kept)
    elif step == "evaluate retrieval":
        vestige.evaluate.retrieval(queries=queries, **judging)
    else:
        vestige.evaluate.mislabel(data=str(data), truth="wrong", **judging)


def _status(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _replace_gradients() -> None:
    """Gradients of training examples follow from their rows; no model runs."""
    import numpy as np
    import torch

    from vestige.indexes import CompressedGradients, ShardContent

    computed = CompressedGradients._compute

    def replaced(
        self: CompressedGradients, data: Any, fitting: Any, count: int, part: Any
    ) -> Callable[[], ShardContent]:
        if len(data) < 10:
            return computed(self, data, fitting, count, part)
        batches = [np.asarray(batch, dtype=np.int64) for batch in part]
        width = computed(self, data, fitting, 1, iter([batches[0][:1]]))().gradients.shape[1]
        numbers = torch.from_numpy(np.concatenate(batches))
        tokens = sum(int(data.input_ids[row].sum()) for batch in batches for row in batch)
        gradients = torch.empty(len(numbers), width)
        torch.mul(numbers[:, None].float(), torch.arange(1, width + 1) * 0.618034, out=gradients)
        gradients.frac_().add_(tokens % 2)
        return lambda: ShardContent(gradients, numbers.float(), gradients.norm(dim=1), numbers)

    CompressedGradients._compute = replaced


def _data(path: Path, count: int) -> Path:
    """Texts of drawn words, some of which occur twice; those of an earlier run in the same folder are taken."""
    import random

    if path.exists():
        return path
    chance, unfinished = random.Random(count), path.with_suffix(".part")
    with unfinished.open("w", encoding="utf-8") as file:
        for row in range(count):
            words = " ".join(f"w{chance.randrange(WORDS)}" for _ in range(chance.randint(*TOKENS)))
            record = {"id": f"example-{row}", "text": words, "source": f"source-{row % 7}", "wrong": row % 10 == 3}
            file.write(json.dumps(record) + "\n")
    return unfinished.rename(path)


def _model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["</s>", *(f"w{number}" for number in range(WORDS))])}
    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **shape)).save_pretrained(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
