"""Replay against trainings with other weights: finite differences in float64, of whole runs of `vestige train`."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.loss.loss_utils import LOSS_MAPPING

import vestige
from tests.methods.own_trainer import make_trainer
from tests.reference.reweighted import example_loss, retrain
from tests.workshop import furnish, write_rows
from vestige.data import load_examples, tokenize
from vestige.errors import SpecError, UserError
from vestige.models import load_model
from vestige.training import Recorder, TrainingRun

STEP = 1e-7
"""Adam divides by the length of a gradient: a change has to be small beside the smallest of its entries."""
BASE = {"epochs": 3, "batch_size": 3, "learning_rate": 5e-3, "precision": "auto", "losses": False}
TRAININGS = {
    "adamw": {},
    "adamw with decay, clipping, warm-up": {"weight_decay": 0.1, "clip": 0.3, "warmup": 2},
    "accumulated, ragged at the end": {"batch_size": 2, "accumulation": 4, "schedule": "cosine"},
    "sgd with momentum": {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.6, "clip": 0},
    "lora": {"lora_rank": 2, "learning_rate": 2e-2},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in float64 with tied weights, data of uneven lengths, and two queries."""
    folder = furnish(tmp_path_factory.mktemp("replay"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny-model")
    torch.manual_seed(0)
    # Its norms compute in the format of the weights; those of Llama compute in float32.
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96, "vocab_size": len(tokenizer)}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(**sizes, **off)).double().save_pretrained(folder / "double")
    tokenizer.save_pretrained(folder / "double")
    queries = [
        {"id": "sky", "prompt": "Why is the sky blue?", "completion": "Air scatters blue light."},
        {"id": "paris", "text": "Paris is the capital of France."},
    ]
    write_rows(folder / "queries.jsonl", queries)
    return folder


@pytest.fixture(autouse=True)
def _exact_loss(monkeypatch):
    """Trainings take their loss in float64; transformers rounds logits to float32, which Adam turns into noise."""

    def exact(logits, labels, vocab_size, num_items_in_batch=None, **_):
        wanted = labels[:, 1:].reshape(-1)
        chosen = logits[:, :-1].reshape(len(wanted), -1)
        total = torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum", ignore_index=-100)
        return total / ((wanted != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", exact)


def tokenized(folder, name):
    tokenizer = AutoTokenizer.from_pretrained(folder / "double")
    data = tokenize(load_examples(str(folder / name)), tokenizer, max_length=96, name=name)
    return {
        example.id: (np.asarray(ids).tolist(), np.asarray(mask).tolist())
        for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True)
    }


def steps_of(run, texts):
    """Return the rate and the examples of every step, from the log of the training."""
    steps = {}
    for row in TrainingRun.open(run).steps.to_pylist():
        steps.setdefault(row["step"], (row["learning_rate"], []))[1].append(row["example_id"])
    return [(rate, [(name, *texts[name]) for name in names]) for _, (rate, names) in sorted(steps.items())]


def losses_after(folder, run, weights, queries, given):
    """Return the queries' losses of a model that is trained again, by the reference, with these weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "double", dtype=torch.float64)
    if "lora_rank" in given:
        model = load_model(run / "checkpoint-0", precision="auto").model.double()
        for name, each in model.named_parameters():
            each.requires_grad_("lora" in name)
    steps = steps_of(run, tokenized(folder, "train.jsonl"))
    retrain(
        model,
        steps,
        weights,
        weight_decay=given.get("weight_decay", 0.0),
        clip=given.get("clip", 1.0),
        momentum=given.get("momentum"),
    )
    with torch.no_grad():
        return np.array([float(example_loss(model, *one)) for one in queries])


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAININGS)
def test_scores_are_the_derivatives_of_training_again(folder, tmp_path, kind):
    run, given = tmp_path / "training", {**BASE, **TRAININGS[kind]}
    vestige.train(model=str(folder / "double"), data=str(folder / "train.jsonl"), out=run, **given)
    scores = vestige.attribute(
        method="replay", training=run, queries=str(folder / "queries.jsonl"), out=tmp_path / "run", dense=True,
        options={"drops": 0},
    )  # fmt: skip
    queries = list(tokenized(folder, "queries.jsonl").values())
    found, names = scores.dense(), list(tokenized(folder, "train.jsonl"))
    for row in (0, 3, 7, 11):
        ends = [losses_after(folder, run, {names[row]: 1 + sign * STEP}, queries, given) for sign in (1, -1)]
        expected = -(ends[0] - ends[1]) / (2 * STEP)
        # Scores are stored in float32, and losses of some ten nats are known to 1e-14: over 2e-7 that is 1e-7.
        np.testing.assert_allclose(found[:, row], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_dropout_is_part_of_the_derivative(folder, tmp_path, monkeypatch):
    """Every step holds all examples, so that two weights that move against each other leave its divisor as it is."""
    # The loss of weighted examples is taken in float32 otherwise, and so small a change would drown in its rounding.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = AutoModelForCausalLM.from_pretrained(
        folder / "double", dtype=torch.float64, resid_pdrop=0.2, embd_pdrop=0.2
    )
    model.save_pretrained(tmp_path / "dropping")
    AutoTokenizer.from_pretrained(folder / "double").save_pretrained(tmp_path / "dropping")
    texts = tokenized(folder, "train.jsonl")
    counts = {name: sum(mask[1:]) for name, (_, mask) in texts.items()}
    one, other = next((a, b) for a in counts for b in counts if a < b and counts[a] == counts[b])
    given = {**BASE, "batch_size": 12, "learning_rate": 0.3, "optimizer": "sgd", "momentum": 0.5, "epochs": 4}
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]

    def train(change, name):
        moved = {one: 1 + change, other: 1 - change}
        write_rows(tmp_path / f"{name}.jsonl", [{**row, "weight": moved.get(row["id"], 1)} for row in rows])
        return vestige.train(
            model=str(tmp_path / "dropping"), data=str(tmp_path / f"{name}.jsonl"), out=tmp_path / name, **given
        )

    def losses(run):
        model = load_model(run.checkpoints[max(run.checkpoints)], precision="auto").model.double().eval()
        with torch.no_grad():
            return np.array([float(example_loss(model, *query)) for query in queries])

    queries = list(tokenized(folder, "queries.jsonl").values())
    change = 2.0**-14
    expected = -(losses(train(change, "more")) - losses(train(-change, "less"))) / (2 * change)
    scores = vestige.attribute(
        method="replay", training=train(0, "plain").folder, queries=str(folder / "queries.jsonl"),
        out=tmp_path / "run", dense=True, options={"drops": 0},
    )  # fmt: skip
    found, names = scores.dense(), list(texts)
    np.testing.assert_allclose(
        found[:, names.index(one)] - found[:, names.index(other)], expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "lora"])
def test_tokens_and_components_of_one_step_are_products_of_gradients(folder, tmp_path, kind):
    """One step of SGD moves the weights by minus the rate times the mean gradient: all derivatives are products."""
    given = {**BASE, "epochs": 1, "batch_size": 12, "optimizer": "sgd", "clip": 0, "schedule": "constant"}
    given |= {"lora_rank": 2, "learning_rate": 0.5} if kind == "lora" else {"learning_rate": 0.5}
    run = vestige.train(model=str(folder / "double"), data=str(folder / "train.jsonl"), out=tmp_path / "once", **given)
    scores = vestige.attribute(
        method="replay", training=run.folder, queries=str(folder / "queries.jsonl"), out=tmp_path / "run", k=12,
        tokens=True, dense=True, options={"drops": 0, "by_component": True},
    )  # fmt: skip
    texts, queries = (tokenized(folder, f"{name}.jsonl") for name in ("train", "queries"))
    models = [load_model(run.checkpoints[step], precision="auto").model.double() for step in (0, 1)]
    for model in models:
        for name, each in model.named_parameters():
            each.requires_grad_(kind == "all" or "lora" in name)
    targets = sum(sum(mask[1:]) for _, mask in texts.values())
    for query, given_query in queries.items():
        slope = gradients_of(example_loss(models[1], *given_query), models[1])
        for name in list(texts)[:4]:
            ids, mask = texts[name]
            tokens = []
            for place in range(len(ids)):
                only = [at == place and wanted for at, wanted in enumerate(mask)]
                loss = example_loss(models[0], ids, only)
                each = gradients_of(loss, models[0]) if place and mask[place] else {}
                tokens.append({part: 0.5 / targets * float((each[part] * slope[part]).sum()) for part in each})
            found = {each.component: each.score for each in scores.components(query, name)}
            for part, value in found.items():
                # LoRA matrices are stored, and so multiplied, in float32.
                assert value == pytest.approx(sum(each.get(part, 0.0) for each in tokens), rel=1e-4, abs=1e-7)
            expected = {place: sum(each.values()) for place, each in enumerate(tokens) if each}
            row = {each.position: each.score for each in scores.tokens(query, name)}
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-7)
            whole = scores.dense()[list(queries).index(query), list(texts).index(name)]
            assert sum(found.values()) == pytest.approx(whole, rel=1e-4, abs=1e-7)


def gradients_of(loss, model):
    """Return the gradients of what trains, by name; a tied weight comes once."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.autograd.grad(loss, [*trained.values()], allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found, strict=True))


TRAINED = {"epochs": 3, "batch_size": 3, "learning_rate": 3e-3, "lora_rank": 2, "lora_dropout": 0.1}
REPLAY = "import sys; from vestige.cli import main; main(sys.argv[1:])"


def ask(folder, out, training, *words):
    flags = ["--method", "replay", "--training", str(training), "--queries", str(folder / "queries.jsonl")]
    return [sys.executable, "-c", REPLAY, "attribute", *flags, "--dense", "--out", str(out), *words]


@pytest.fixture(scope="module")
def trained(folder):
    """A training of float32 with dropout, and a run of its replay."""
    out = folder / "trained"
    vestige.train(model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=out, **TRAINED)
    done = subprocess.run(ask(folder, folder / "whole", out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_to_the_same_bytes(folder, trained, tmp_path):
    words = ask(folder, tmp_path / "run", trained)
    draw = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(float(draw.uniform(2, 6)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (tmp_path / "run" / "run.json").exists():
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for name in ("scores.parquet", "scores.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    checks = [vestige.runs.Scores.open(run).run.trust.checks for run in (tmp_path / "run", folder / "whole")]
    assert checks[0] == checks[1]


@pytest.mark.slow
def test_workers_walk_groups_of_queries_to_the_same_bytes(folder, trained, tmp_path):
    """`whole` walked both queries together, in one process."""
    words = ask(folder, tmp_path / "run", trained, "--option", "together=1", "--workers", "2")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("scores.parquet", "scores.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "whole" / name).read_bytes()


@pytest.mark.slow
def test_queries_in_groups_score_as_all_at_once(folder, trained, tmp_path, monkeypatch):
    class Little:
        available = 1

    monkeypatch.setattr("psutil.virtual_memory", lambda: Little)
    given = {"method": "replay", "training": trained, "queries": str(folder / "queries.jsonl"), "dense": True}
    scores = vestige.attribute(**given, out=tmp_path / "run", options={"drops": 0})
    whole = vestige.runs.Scores.open(folder / "whole").dense()
    np.testing.assert_array_equal(scores.dense(), whole)


@pytest.mark.slow
def test_the_run_tells_how_far_it_can_be_trusted(folder, trained):
    checks = {each.name: each for each in vestige.runs.Scores.open(folder / "whole").run.trust.checks}
    assert checks["growth of adjoints"].verdict == "good"
    assert checks["predicted and actual changes"].value > 0.5


@pytest.mark.slow
def test_several_trainings_are_averaged(folder, trained, tmp_path):
    other = tmp_path / "other"
    vestige.train(model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=other, **TRAINED, seed=1)
    common = {"method": "replay", "queries": str(folder / "queries.jsonl"), "dense": True, "options": {"drops": 0}}
    single = vestige.attribute(training=other, out=tmp_path / "single", **common)
    both = vestige.attribute(training=[trained, other], out=tmp_path / "both", **common)
    whole = vestige.runs.Scores.open(folder / "whole").dense()
    np.testing.assert_allclose(both.dense(), (whole + single.dense()) / 2, rtol=1e-5, atol=1e-7)
    assert "agreement of trainings" in [each.name for each in both.run.trust.checks]


@pytest.mark.slow
def test_a_training_of_ones_own_trainer_scores_as_the_same_one_of_the_command(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    trainer = make_trainer()
    Recorder(trainer, tmp_path / "recorded", watch=None)
    trainer.train()
    given = {"epochs": 3, "batch_size": 3, "learning_rate": 3e-3, "losses": False}
    vestige.train(model="tiny-model", data="train.jsonl", out=tmp_path / "same", **given)
    common = {"method": "replay", "queries": "queries.jsonl", "dense": True}
    with pytest.raises(SpecError, match=r"options=\{.trainer.: .module:function.\}"):
        vestige.attribute(**common, training=tmp_path / "recorded", out=tmp_path / "run")
    own = vestige.attribute(
        **common, training=tmp_path / "recorded", out=tmp_path / "run",
        options={"trainer": "tests.methods.own_trainer:make_trainer"},
    )  # fmt: skip
    expected = vestige.attribute(**common, training=tmp_path / "same", out=tmp_path / "other", options={"drops": 0})
    np.testing.assert_allclose(own.dense(), expected.dense(), rtol=1e-4, atol=1e-6)
    assert {each.name: each.verdict for each in own.run.trust.checks}["predicted and actual changes"] == "unknown"


@pytest.mark.slow
def test_a_training_with_an_alarm_is_replayed_without_it(folder, tmp_path):
    given = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "steps": 2, "batch_size": 4}
    vestige.train(**given, alarm=True, alarm_measure="loss", alarm_window=4, out=tmp_path / "training")
    common = {"method": "replay", "queries": str(folder / "queries.jsonl"), "options": {"drops": 0}}
    scores = vestige.attribute(**common, training=tmp_path / "training", out=tmp_path / "run")
    assert len(scores.top("sky", 3)) == 3


@pytest.mark.slow
def test_a_training_that_does_not_come_out_again_is_refused(folder, trained, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(trained, changed)
    last = max(TrainingRun.open(changed).checkpoints.items())[1] / "adapter_model.safetensors"
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    with pytest.raises(UserError, match=r"The replayed weights are not those of .* 1 of \d+ tensors differ"):
        vestige.attribute(
            method="replay", training=changed, queries=str(folder / "queries.jsonl"), out=tmp_path / "run"
        )


def test_what_cannot_be_replayed_is_refused(folder, tmp_path):
    queries = str(folder / "queries.jsonl")
    for given, words in [
        ({"method": "replay", "model": str(folder / "double"), "data": queries}, "Pass training=FOLDER"),
        ({"method": "grad-dot", "training": tmp_path}, "`training` names a recorded training"),
        ({"method": "replay", "training": tmp_path}, "holds no training"),
        ({"method": "replay", "training": tmp_path, "index": "idx"}, "`training` brings its model"),
        *(
            ({"method": "replay", "training": tmp_path, name: value}, f"drop `{name}`")
            for name, value in (("components", ["mlp"]), ("limit", 3), ("max_length", 9))
        ),
    ]:
        with pytest.raises(UserError, match=words):
            vestige.attribute(queries=queries, out=tmp_path / "run", **given)
