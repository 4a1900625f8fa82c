import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainerCallback

from tests.online.workbench import HELD_OUT, validation
from tests.training.workbench import DATA, Seen, rows, same_bits, trainer
from vestige.data import NO_TARGET, Example, TokenizedData
from vestige.errors import UserError
from vestige.online import OnlineLog, attach, write_in_run_influence
from vestige.reports import report

COUNT = len(DATA.ids)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama-tied"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1}, {"bf16": True}],
    ids=["plain", "accumulation-clipping", "bfloat16"],
)
def test_the_trainer_trains_the_same_bit_for_bit(tmp_path, name, settings):
    plain = trainer(tmp_path / "a", name, **settings)
    expected = plain.train()
    watched = trainer(tmp_path / "b", name, **settings)  # a Trainer sets the seed when it is made
    attached = attach(watched, validation(4), out=tmp_path / "log")
    found = watched.train()
    assert found.training_loss == expected.training_loss
    assert same_bits(plain.model, watched.model)
    table = attached.engine.log.table()
    # An epoch has three batches of four: with accumulation its second step has one micro-batch.
    sizes = [8, 4, 8, 4, 8, 4] if "gradient_accumulation_steps" in settings else [4] * 6
    assert table["step"].to_pylist() == [step for step, size in enumerate(sizes, 1) for _ in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["datasets", "list", "without-ids"])
def test_ids_follow_their_rows_through_the_shuffling_sampler(tmp_path, kind):
    data = {
        "datasets": Dataset.from_list(rows()),
        "list": rows(),
        "without-ids": Dataset.from_list(rows()).remove_columns("id"),
    }[kind]
    given = trainer(tmp_path / "out", data=data, steps=COUNT // 4)
    seen = Seen(given)
    attached = attach(given, validation(1), out=tmp_path / "log")
    given.train()
    ids = attached.engine.log.table()["id"].to_pylist()
    prefix = "" if kind == "without-ids" else "doc-"
    assert sorted(ids) == sorted(f"{prefix}{row}" for row in range(COUNT))
    assert ids != [f"{prefix}{row}" for row in range(COUNT)]
    for name, tokens in zip(ids, seen.tokens, strict=True):
        wanted = DATA.ids[int(name.removeprefix("doc-"))].tolist()
        assert tokens[: len(wanted)] == wanted


@pytest.mark.slow
def test_scores_are_shares_in_the_clipped_gradient_at_the_scheduled_rate(tmp_path):
    given = trainer(tmp_path / "out", "llama", steps=3, max_grad_norm=0.05, gradient_accumulation_steps=2)
    attached = attach(given, validation(4), out=tmp_path / "log", score_optimizer="sgd")
    sums: list[float] = []

    class Check(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            gradient = [p.grad.double().clone() for p in given.model.parameters()]
            given.model.eval()
            held_out = HELD_OUT.batch(range(4))
            logits = given.model(input_ids=held_out.input_ids).logits[:, :-1].transpose(1, 2)
            losses = nn.functional.cross_entropy(logits, held_out.labels[:, 1:], reduction="none").sum(1)
            loss = (losses / (held_out.labels[:, 1:] != NO_TARGET).sum(1)).mean()
            slope = torch.autograd.grad(loss, list(given.model.parameters()))
            given.model.train()
            sums.append(sum(float((one * other).sum()) for one, other in zip(gradient, slope, strict=True)))

    given.add_callback(Check)
    given.train()
    table = attached.engine.log.table().to_pandas()
    assert table.groupby("step")["score"].sum().tolist() == pytest.approx(sums, rel=1e-3)
    assert table.groupby("step")["learning_rate"].first().tolist() == pytest.approx([0.01, 0.02 / 3, 0.01 / 3])


@pytest.mark.slow
def test_a_training_resumed_from_a_checkpoint_continues_the_log(tmp_path):
    whole = trainer(tmp_path / "whole", steps=6, save_strategy="steps", save_steps=3)
    attach(whole, validation(2), out=tmp_path / "whole-log")
    whole.train()
    cut = trainer(tmp_path / "cut", steps=6, save_strategy="steps", save_steps=3)
    attached = attach(cut, validation(2), out=tmp_path / "log", flush_every=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    cut.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    assert OnlineLog.open(tmp_path / "log").last_step() == 5
    attached.detach()
    again = trainer(tmp_path / "cut", steps=6, save_strategy="steps", save_steps=3)
    attach(again, validation(2), out=tmp_path / "log", flush_every=2)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    found, expected = (OnlineLog.open(tmp_path / folder).table() for folder in ("log", "whole-log"))
    assert found.equals(expected)


@pytest.mark.slow
def test_trap_b4_8_detach_and_attach_again(tmp_path):
    given = trainer(tmp_path / "out", steps=2)
    data, collator = given.train_dataset, given.data_collator
    for turn in range(2):
        attached = attach(given, validation(1), out=tmp_path / f"log-{turn}")
        with pytest.raises(UserError, match="attached to this Trainer already"):
            attach(given, validation(1))
        given.train()
        attached.detach()
        attached.detach()
        assert OnlineLog.open(tmp_path / f"log-{turn}").last_step() == 2
        assert (given.train_dataset, given.data_collator) == (data, collator)
        assert "training_step" not in given.__dict__
    given.train()


@pytest.mark.slow
def test_selecting_trains_on_the_chosen_ones_alone(tmp_path):
    given = trainer(tmp_path / "out", steps=3)
    seen = Seen(given)
    attached = attach(given, validation(2), out=tmp_path / "log", select=2)
    given.train()
    table = attached.engine.log.table()
    assert table["step"].to_pylist() == [1, 1, 2, 2, 3, 3]
    for name, tokens in zip(table["id"].to_pylist(), seen.tokens, strict=True):
        wanted = DATA.ids[int(name.removeprefix("doc-"))].tolist()
        assert tokens[: len(wanted)] == wanted


def test_what_a_trainer_cannot_do_is_refused(tmp_path):
    with pytest.raises(UserError, match="gradient_accumulation_steps=1"):
        attach(trainer(tmp_path, gradient_accumulation_steps=2), validation(1), select=2)
    with pytest.raises(UserError, match="select=0"):
        attach(trainer(tmp_path), validation(1), select=0)


def as_data(source, name: str, prefix: str) -> TokenizedData:
    examples = [Example(id=f"{prefix}{row}", row=row, text=f"text {row}") for row in range(len(source.ids))]
    ids = [row.numpy().astype(np.int32) for row in source.ids]
    masks = [mask.numpy() for mask in source.targets]
    return TokenizedData(examples, ids, masks, np.zeros(len(ids), dtype=bool), name, name)


@pytest.mark.slow
def test_a_log_becomes_a_run_that_the_report_opens(tmp_path):
    given = trainer(tmp_path / "out", steps=2)
    train, held_out = as_data(DATA, "train", "doc-"), as_data(HELD_OUT, "held-out", "val-")
    attached = attach(given, held_out, out=tmp_path / "log")
    given.train()
    log = attached.engine.log
    scores = write_in_run_influence(log, train, held_out, tmp_path / "run")
    best = log.top(1)[0]
    assert (scores.top(0, 1)[0].example_id, scores.top(0, 1)[0].score) == (best.id, pytest.approx(best.influence))
    assert scores.dense()[0].sum() == pytest.approx(sum(log.table()["influence"].to_pylist()), rel=1e-5)
    page = report(run=str(tmp_path / "run"), out=str(tmp_path / "report.html"))
    assert "doc-" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page is not None
    with pytest.raises(UserError, match="does not have"):
        write_in_run_influence(log, train.subset([0]), held_out, tmp_path / "other")
