import json
import multiprocessing
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.banks.conftest import contents
from tests.reference.retraining import gaps, retrained, token_losses
from tests.workshop import write_rows
from vestige.banks import EVERYTHING, Bank, run_seed
from vestige.data import load_examples, load_queries, tokenize
from vestige.errors import CorruptFile, DataError, IndexMismatch, PieceFailed, SpecError, UserError
from vestige.models import load_model
from vestige.training import bank, train

PROCESSES = multiprocessing.get_context("fork")


@pytest.mark.slow
def test_each_member_is_the_model_that_a_bare_loop_retrains(recipe, tmp_path):
    made = bank(**recipe | {"steps": 5})
    loaded = load_model(recipe["model"], device="cpu")
    data = tokenize(load_examples(recipe["data"]), loaded.tokenizer, max_length=loaded.context_length)
    queries = tokenize(load_queries(recipe["queries"]), loaded.tokenizer, max_length=loaded.context_length)
    member = 3
    subset, seed = int(made.subsets[member]), int(made.seeds[member])
    rows = np.flatnonzero(made.membership[member])
    # A training on the same rows with the member's seed, whose log says in which order they come.
    own = [json.loads(line) for line in Path(recipe["data"]).read_text().splitlines()]
    again = {name: recipe[name] for name in ("model", "batch_size", "learning_rate", "device")} | {
        "data": str(write_rows(tmp_path / "own.jsonl", [own[row] for row in rows])),
        "seed": run_seed(0, subset, seed),
    }
    log = train(**again, steps=5, out=tmp_path / "own").steps.to_pandas()
    place = {name: row for row, name in enumerate(made.example_ids)}
    batches = [[place[name] for name in names] for names in log.groupby("step")["example_id"].apply(list)]
    assert [len(each) for each in batches] == [4, 2, 4, 2, 4]
    texts = list(zip(data.input_ids, data.targets, strict=True))
    model = retrained(loaded.model, texts, batches, 1e-2)
    with torch.no_grad():
        for kind, items in (("example", data), ("query", queries)):
            for row in range(len(items)):
                losses = token_losses(model, items.input_ids[row], items.targets[row]).double()
                gap = np.array(gaps(model, items.input_ids[row], items.targets[row]))
                chance = np.exp(-losses.mean().item())
                measured = [made.values(f"{kind}_{name}")[member, row] for name in ("loss", "margin", "gap")]
                expected = [losses.sum().item(), np.log(chance / (1 - chance)), gap.mean()]
                assert measured == pytest.approx(expected, rel=2e-3)
                assert made.values(f"{kind}_accuracy")[member, row] == pytest.approx((gap > 0).mean())
    assert made.query_token_losses[member, 0] * made.query_targets[0] == pytest.approx(made.query_losses[member, 0])


def test_a_bank_says_who_was_trained_on_what(recipe):
    made = bank(**recipe | {"subsets": 3})
    assert len(made) == 6
    assert made.membership.shape == (6, 12)
    assert (made.membership.sum(axis=1) == 6).all()
    assert made.subsets.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.seeds.tolist() == [0, 1, 0, 1, 0, 1]
    # The runs of a subset share it, and differ all the same: what they disagree in is the noise ceiling.
    assert (made.membership[0] == made.membership[1]).all()
    assert (made.query_losses[0] != made.query_losses[1]).all()
    assert made.by_subset(made.query_losses).shape == (3, 2, 2)
    assert made.subset_membership.shape == (3, 12)
    assert made.query_ids == ["sky", "paris"]
    assert made.query_sources == ["p", None]
    assert made.example_ids[0] == "pair-0"
    assert made.sources[0] == "physics"
    assert np.isfinite(made.example_losses).all()
    with pytest.raises(DataError, match="holds no query_speed; it holds example_accuracy"):
        made.values("query_speed")


@pytest.mark.slow
def test_epochs_decide_the_steps_and_every_member_takes_as_many(recipe):
    with steps_taken() as steps:
        bank(**{**recipe, "steps": None, "epochs": 3})
    # Six of twelve examples in batches of four: two steps a pass.
    assert list(steps.values()) == [6, 6, 6, 6]


@pytest.mark.slow
def test_leaving_a_source_out_keeps_the_number_of_steps_and_the_seed(recipe):
    # Trap: at a fixed number of epochs a large source would also take its steps with it.
    start = {"from_scratch": True, "learning_rate": 1e-12}
    with steps_taken() as steps:
        made = bank(**{**recipe, **start, "subsets": 50, "leave_source_out": True, "steps": None, "epochs": 2})
    assert made.subset_names == [EVERYTHING, "biology", "books", "physics", "places"]
    assert list(steps.values()) == [6] * 10
    # Hardly trained, a model's losses are those of its random start.
    losses = made.by_subset(made.query_losses)[:, :, 0]
    assert losses[:, 0] == pytest.approx(losses[0, 0], abs=1e-4)
    assert losses[:, 1] == pytest.approx(losses[0, 1], abs=1e-4)
    assert abs(losses[0, 0] - losses[0, 1]) > 1e-3
    sources = np.array(made.sources)
    for number, name in enumerate(made.subset_names):
        assert (made.membership[2 * number] == (sources != name)).all()


@contextmanager
def steps_taken():
    """Steps of each optimizer that is used in the block, in the order of their first ones."""
    steps: dict[torch.optim.Optimizer, int] = {}
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: steps.update({optimizer: steps.get(optimizer, 0) + 1})
    )
    yield steps
    hook.remove()


@pytest.mark.slow
def test_lists_and_single_examples_are_left_out_and_lists_can_be_added(recipe, tmp_path):
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"top-1": ["pair-3"], "top-2": ["pair-3", "pair-5"]}))
    chosen = recipe | {"subsets": 50, "seeds": 1, "leave_out_lists": str(lists)}
    made = bank(**chosen)
    assert made.subset_names == [EVERYTHING, "top-1", "top-2"]
    assert np.flatnonzero(~made.membership[2]).tolist() == [3, 5]
    before = contents(recipe["out"])
    more = {"top-1": ["pair-3"], "top-2": ["pair-3", "pair-5"], "random": ["pair-0"]}
    assert len(bank(**chosen | {"leave_out_lists": more})) == 4
    after = contents(recipe["out"])
    assert all(after[name] == digest for name, digest in before.items() if name.startswith("members/"))
    with pytest.raises(IndexMismatch, match="Give all of them"):
        bank(**chosen)
    with pytest.raises(IndexMismatch, match="subsets"):
        bank(**chosen | {"leave_out_lists": {"other": ["pair-3"]}})
    one = bank(**recipe | {"subsets": 50, "seeds": 1, "leave_one_out": 2, "out": tmp_path / "one"})
    assert (~one.membership).sum(axis=1).tolist() == [0, 1, 1]


CHANGES = {
    "epochs": {"steps": None, "epochs": 1},
    "steps": {"steps": 3},
    "fraction": {"fraction": 0.25},
    "seed": {"seed": 1},
    "from-scratch": {"from_scratch": True},
    "lora-rank": {"lora_rank": 2},
    "learning-rate": {"learning_rate": 1e-3},
    "batch-size": {"batch_size": 3},
    "optimizer": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.5},
    "weight-decay": {"weight_decay": 0.1},
    "schedule": {"schedule": "constant"},
    "warmup": {"warmup": 1},
    "clip": {"clip": 0.0},
    "precision": {"precision": "float64"},
    "loss": {"loss": "mean"},
    "accumulation": {"accumulation": 2},
    "bf16": {"bf16": True},
    "learn": {"learn": "answer", "limit": 10},
    "drop-by": {"drop_by": "weight"},
    "data": {"limit": 10},
    "queries": {"queries": None},
    "left-out": {"subsets": 50, "leave_source_out": True},
}
ONE_MODEL = {"subsets": 1, "seeds": 1}
"""An id does not depend on either."""


@pytest.mark.slow
def test_every_setting_has_an_id_of_its_own_and_is_refused_over_an_old_bank(recipe, tmp_path):
    # Trap: ids without epochs let runs of different length share a folder.
    ids = {"": bank(**recipe).id}
    before = contents(recipe["out"])
    for name, change in CHANGES.items():
        with pytest.raises(IndexMismatch) as refused:
            bank(**recipe | change)
        assert f"\n  {name} " in str(refused.value), name
        ids[name] = bank(**recipe | ONE_MODEL | change | {"out": tmp_path / name}).id
    assert len(set(ids.values())) == len(CHANGES) + 1
    assert contents(recipe["out"]) == before
    other = recipe | ONE_MODEL | {"steps": None}
    two = [bank(**other | {"epochs": epochs, "out": tmp_path / str(epochs)}) for epochs in (1, 2)]
    assert two[0].id != two[1].id


@pytest.mark.slow
def test_what_only_changes_speed_or_size_keeps_the_id(recipe):
    recipe |= {"lora_rank": 2, "lora_targets": ["q_proj", "v_proj"]}
    changes = ({"subsets": 1, "seeds": 1}, {"subsets": 2, "seeds": 1}, {"keep_weights": True, "checkpoint_every": 2})
    ids = {bank(**recipe | change).id for change in changes}
    assert len(ids) == 1


@pytest.mark.slow
def test_a_larger_bank_keeps_the_members_of_the_smaller_one(recipe):
    small = bank(**recipe)
    before = contents(recipe["out"] / "members")
    large = bank(**recipe | {"subsets": 4, "seeds": 3})
    after = contents(recipe["out"] / "members")
    assert len(large) == 12
    assert {name: after[name] for name in before} == before
    kept = large.by_subset(large.query_losses)[:2, :2]
    np.testing.assert_array_equal(kept, small.by_subset(small.query_losses))
    # Asked for less, it stays as it is.
    assert len(bank(**recipe)) == 12


@pytest.mark.slow
def test_the_same_settings_give_the_same_bytes_in_another_folder(recipe, tmp_path):
    bank(**recipe)
    torch.manual_seed(17)
    bank(**recipe | {"out": tmp_path / "again", "token_budget": None})
    assert contents(recipe["out"]) == contents(tmp_path / "again")


@pytest.mark.slow
def test_two_workers_leave_the_bytes_of_one(recipe, tmp_path):
    bank(**recipe)
    bank(**recipe | {"out": tmp_path / "two", "workers": 2})
    assert contents(recipe["out"]) == contents(tmp_path / "two")


def killed(settings, ready) -> None:
    """Build in another process, and kill it with SIGKILL once `ready()`."""
    child = PROCESSES.Process(target=bank, kwargs=settings)
    child.start()
    give_up = time.monotonic() + 60
    while not ready():
        assert child.is_alive(), "it ended before it could be killed"
        assert time.monotonic() < give_up
        time.sleep(0.001)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_bank_resumes_to_the_same_numbers(recipe, tmp_path):
    settings = recipe | {"subsets": 12, "steps": 8}
    whole = bank(**settings)
    folder = tmp_path / "killed"
    for count in (2, 9):
        killed(settings | {"out": folder}, lambda count=count: len(list(folder.glob("members/*.json"))) >= count)
    partial = Bank.open(folder, allow_missing=True)
    assert 9 <= len(partial) < 24
    with pytest.raises(CorruptFile, match="members of"):
        Bank.open(folder)
    with pytest.raises(UserError, match="Finish it first"):
        partial.by_subset(partial.query_losses)
    resumed = bank(**settings | {"out": folder})
    np.testing.assert_array_equal(resumed.query_losses, whole.query_losses)
    assert contents(folder) == contents(recipe["out"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}, {"optimizer": "sgd", "momentum": 0.9}], ids=str)
def test_a_member_that_was_killed_goes_on_where_it_was_saved(recipe, tmp_path, more):
    settings = recipe | {"subsets": 1, "seeds": 1, "steps": 90, **more}
    whole = bank(**settings)
    folder = tmp_path / "killed"
    again = settings | {"out": folder, "checkpoint_every": 5}
    killed(again, lambda: any(folder.glob("members/*-unfinished/checkpoint-*/made-of.txt")))
    with steps_taken() as steps:
        resumed = bank(**again)
    assert sum(steps.values()) <= 85
    np.testing.assert_array_equal(resumed.example_losses, whole.example_losses)
    assert contents(folder) == contents(recipe["out"])


def test_a_damaged_member_alone_is_trained_again(recipe):
    bank(**recipe)
    before = contents(recipe["out"])
    path = recipe["out"] / "members" / "00001-0.parquet"
    body = bytearray(path.read_bytes())
    body[40] ^= 1
    path.write_bytes(body)
    (recipe["out"] / "members.parquet").write_bytes(b"torn")
    with pytest.raises(CorruptFile, match="00001-0"):
        Bank.open(recipe["out"])
    with steps_taken() as steps:
        bank(**recipe)
    assert len(steps) == 1
    assert contents(recipe["out"]) == before


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"sha256": None}, {"sha256": "left out"}, {"bytes": []}])
def test_a_marker_that_is_none_does_not_count(changes, recipe):
    bank(**recipe)
    before = contents(recipe["out"])
    path = recipe["out"] / "members" / "00001-0.json"
    marker = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: value for name, value in marker.items() if value != "left out"}))
    (recipe["out"] / "members.parquet").write_bytes(b"torn")
    with pytest.raises(CorruptFile, match="00001-0"):
        Bank.open(recipe["out"])
    bank(**recipe)
    assert contents(recipe["out"]) == before


def test_weights_are_kept_only_when_asked_and_belong_to_the_numbers(recipe):
    bank(**recipe | {"subsets": 1, "seeds": 1})
    assert not list(recipe["out"].glob("members/*-model"))
    made = bank(**recipe | {"subsets": 1, "seeds": 1, "keep_weights": True})
    loaded = load_model(recipe["out"] / "members" / "00000-0-model", device="cpu")
    query = tokenize(load_queries(recipe["queries"]), loaded.tokenizer, max_length=None)
    with torch.no_grad():
        losses = token_losses(loaded.model, query.input_ids[1], query.targets[1])
    assert losses.sum().item() == pytest.approx(made.query_losses[0, 1], rel=1e-5)


def test_from_scratch_begins_anew_for_each_seed_and_forgets_the_checkpoint(recipe):
    made = bank(**recipe | {"from_scratch": True, "subsets": 1, "learning_rate": 1e-9, "steps": 1})
    base = load_model(recipe["model"], device="cpu")
    query = tokenize(load_queries(recipe["queries"]), base.tokenizer, max_length=None)
    with torch.no_grad():
        start = token_losses(base.model, query.input_ids[0], query.targets[0]).sum().item()
    losses = [*made.query_losses[:, 0], start]
    assert len({round(loss, 4) for loss in losses}) == 3


def test_members_that_diverge_are_reported_by_name(recipe):
    with pytest.raises(PieceFailed, match=r"Model 0 \(subset 'random 0', run 0\).*not finite") as failed:
        bank(**recipe | {"learning_rate": 1e30, "clip": 0.0, "retries": 1, "optimizer": "sgd", "steps": 6})
    assert "Lower the learning rate" in str(failed.value)
    assert "4 of 4 pieces failed every time (0-3)" in str(failed.value)


def test_bad_input_is_refused_before_any_training(recipe, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError):
        bank(**recipe | {"data": str(empty)})
    with pytest.raises(DataError, match="trained on nothing, or all on the same"):
        bank(**recipe | {"limit": 1})
    with pytest.raises(DataError, match="Query '0' has no token"):
        bank(**recipe | {"queries": ["why is the sky blue?"]})
    for change, message in (
        ({"epochs": 2}, "`epochs` and `steps` both"),
        ({"momentum": 0.5}, "`momentum` is for"),
        ({"from_scratch": True, "lora_rank": 2}, "there are none"),
        ({"leave_source_out": True}, "`subsets` and `fraction` are for random subsets"),
        ({"leave_source_out": True, "leave_one_out": 2}, "a bank of their own"),
        ({"fraction": 1.5}, "fraction"),
    ):
        with pytest.raises(SpecError, match=message):
            bank(**recipe | change)
    (recipe["out"]).mkdir()
    (recipe["out"] / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes.txt\)"):
        bank(**recipe)
    with pytest.raises(DataError, match="is no bank"):
        Bank.open(recipe["out"])


@pytest.mark.slow
def test_overwriting_replaces_a_bank_of_other_settings(recipe):
    first = bank(**recipe)
    second = bank(**recipe | {"learning_rate": 1e-3, "overwrite": True})
    assert first.id != second.id
    assert Bank.open(recipe["out"]).id == second.id


def test_a_bank_without_queries_holds_its_examples_alone(recipe):
    made = bank(**recipe | {"queries": None})
    assert made.query_ids == []
    assert made.example_losses.shape == (4, 12)
    with pytest.raises(DataError, match="holds no query_loss"):
        made.query_losses  # noqa: B018
