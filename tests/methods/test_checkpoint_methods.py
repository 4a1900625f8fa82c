"""tracin, less and trak: against slow float64 formulas, for any batches, with the right sign, resumed after a kill."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.architectures import build
from tests.methods.conftest import all_scores, model_job, settings, tokenized
from tests.reference import ensemble as slow
from tests.reference.gradients import example_loss
from tests.trainer import trained_run
from vestige.errors import IndexMismatch, ModelError, NonFinite, SpecError
from vestige.indexes import Index, Inputs, build_index
from vestige.methods import (
    Checkpoint,
    Job,
    Less,
    TracIn,
    Trak,
    find_checkpoints,
    get_method,
    learning_rates,
    split_over_components,
)
from vestige.models import load_model, select_components
from vestige.settings import IndexSettings
from vestige.storage import partial_folder, remove_partial

LAYERS = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")
NAMES = list(LAYERS)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    trained_run(build("llama", torch.float32), folder)
    return folder


def folders(run: Path) -> list[Path]:
    return [run / f"checkpoint-{step}" for step in (2, 4, 6)]


def models(run: Path) -> list[torch.nn.Module]:
    """The checkpoints in float64."""
    found = []
    for folder in folders(run):
        model = build("llama")
        model.load_state_dict({name: value.double() for name, value in load_file(folder / "model.safetensors").items()})
        found.append(model)
    return found


def job_of(run: Path, out: Path, *, weights=(0.5, 0.0, 0.25), indexes=(None, None, None), **given) -> Job:
    base = model_job("llama", out=out / "run", **given)
    loaded = load_model(folders(run)[-1])
    sources = zip(folders(run), weights, indexes, strict=True)
    checkpoints = tuple(Checkpoint(str(each), weight, index) for each, weight, index in sources)
    selection = select_components(loaded.model, LAYERS)
    return dataclasses.replace(base, loaded=loaded, selection=selection, checkpoints=checkpoints)


def indexed(run: Path, out: Path, job: Job, loss="sum") -> list[Index]:
    """Uncompressed float32 indexes of the checkpoints."""
    made = []
    for folder in folders(run):
        given = IndexSettings(
            model="m", data="d", out=out / folder.name, compress="none", dtype="float32", loss=loss, token_budget=30
        )
        loaded = load_model(folder)
        selection = select_components(loaded.model, LAYERS)
        made.append(build_index(given, Inputs(loaded, job.train, selection)))
    return made


def trak_job(run: Path, out: Path, **given) -> Job:
    job = job_of(run, out, weights=(1.0, 1.0, 1.0), **given)
    return job_of(run, out, weights=(1.0, 1.0, 1.0), indexes=indexed(run, out, job, job.settings.loss), **given)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    # The models run in float32, the references in float64.
    return torch.allclose(found.double(), expected, rtol=1e-3, atol=tolerance * float(expected.abs().max()))


def less_reference(run: Path, job: Job, groups: list[list[int]]) -> torch.Tensor:
    total = torch.zeros(len(groups), len(job.train), dtype=torch.float64)
    for folder, model, weight in zip(folders(run), models(run), (2 / 3, 0.0, 1 / 3), strict=True):
        asked, train = (slow.gradients(model, NAMES, data, True) for data in (job.queries, job.train))
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        shapes = [model.get_parameter(name).shape for name in NAMES]
        decayed = [name for name, each in model.named_parameters() if each.ndim == 2]
        held = [state[decayed.index(name)] for name in NAMES]
        assert [one["exp_avg"].shape for one in held] == shapes
        first, second = (torch.cat([one[key].flatten() for one in held]).double() for key in ("exp_avg", "exp_avg_sq"))
        steps = [slow.adam_update(one, first, second, int(held[0]["step"]), (0.9, 0.999), 1e-8) for one in train]
        for line, group in enumerate(groups):
            direction = asked[group].mean(0)
            for row, step in enumerate(steps):
                total[line, row] += weight * torch.cosine_similarity(step, direction, dim=0)
    return total


@pytest.mark.slow
def test_tracin_is_the_weighted_sum_of_inner_products(run, tmp_path):
    job = job_of(run, tmp_path)
    expected = slow.tracin(models(run), [0.5, 0.0, 0.25], NAMES, job.train, job.queries)
    assert close(all_scores(TracIn(), job), expected)


@pytest.mark.slow
def test_tracin_reads_indexes_of_the_checkpoints(run, tmp_path):
    plain = job_of(run, tmp_path)
    job = job_of(run, tmp_path, indexes=indexed(run, tmp_path, plain))
    assert close(all_scores(TracIn(), job), all_scores(TracIn(), plain), 1e-5)


@pytest.mark.slow
def test_less_is_the_cosine_of_adams_step_with_the_query(run, tmp_path):
    job = job_of(run, tmp_path)
    scores = all_scores(Less(), job)
    assert close(scores, less_reference(run, job, [[0], [1], [2]]), 1e-3)
    assert scores.abs().max() <= 1


@pytest.mark.slow
def test_less_takes_the_best_subtask_of_averaged_queries(run, tmp_path):
    job = job_of(run, tmp_path)
    sources = ["one", "two", "one"]
    examples = [dataclasses.replace(each, source=s) for each, s in zip(job.queries.examples, sources, strict=True)]
    grouped = dataclasses.replace(job, queries=dataclasses.replace(job.queries, examples=examples))
    found = all_scores(Less(subtasks=True), grouped)
    expected = less_reference(run, job, [[0, 2], [1]]).amax(0)
    assert close(found, expected.expand(3, -1), 1e-3)
    check_parts(Less(subtasks=True), grouped, found)
    with pytest.raises(SpecError, match="has no `source`"):
        all_scores(Less(subtasks=True), job)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sum", "mean"])
def test_trak_is_the_mean_of_kernels_times_the_mean_doubt(run, tmp_path, loss):
    """Trap GraSS 6: the margin is of each example, on the mean loss of its own tokens, whatever the batch."""
    job = trak_job(run, tmp_path, damping=0.1, loss=loss)
    expected = slow.trak(models(run), NAMES, job.train, job.queries, 0.1)
    scores = all_scores(Trak(), job)
    assert close(scores, expected, 1e-3)
    check_parts(Trak(), job, scores)


def check_parts(method, job: Job, scores: torch.Tensor) -> None:
    pairs = [(0, 1), (2, 7), (1, 0), (2, 1)]
    found = split_over_components(job, method, pairs)
    assert found is not None
    for part in found:
        assert part.scores.sum() == pytest.approx(float(scores[part.query, part.row]), rel=1e-3, abs=1e-6)
        assert len(part.scores) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracin", "less"])
def test_components_add_up(run, tmp_path, name):
    job = job_of(run, tmp_path)
    check_parts(get_method(name), job, all_scores(get_method(name), job))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracin", "trak"])
def test_self_influence_is_the_score_of_an_example_asked_about_itself(run, tmp_path, name):
    job = trak_job(run, tmp_path) if name == "trak" else job_of(run, tmp_path)
    itself = dataclasses.replace(job, queries=job.train)
    diagonal = all_scores(get_method(name), itself).diagonal()
    for block in get_method(name).self_scores(job):  # type: ignore[attr-defined]
        assert close(block.scores[0], diagonal[block.rows], 1e-5)
    assert (diagonal > 0).all()


def test_less_refuses_self_influence(run, tmp_path):
    with pytest.raises(SpecError, match="--method tracin"):
        Less().self_scores(job_of(run, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracin", "less", "trak"])
def test_trap_scores_do_not_depend_on_batches(run, tmp_path, name):
    """Traps: a ragged last batch mis-scaled, inverses of batches summed, a margin on the batch's mean loss."""
    found = []
    for budget in (4096, 30, 1):
        out = tmp_path / str(budget)
        if name == "trak":  # its indexes are made on the way, in batches of this size
            job = job_of(run, out, weights=(1.0, 1.0, 1.0), token_budget=budget)
        else:
            job = job_of(run, out, token_budget=budget)
        found.append(all_scores(get_method(name), job))
        remove_partial(job.settings.out)
        assert not partial_folder(job.settings.out).exists()
    # Without an index TRAK stores its features in float16, whose rounding may differ by one step.
    tolerance = 2e-3 if name == "trak" else 1e-5
    assert close(found[1], found[0], tolerance)
    assert close(found[2], found[0], tolerance)


def loss_of_query(model: torch.nn.Module, job: Job, change: torch.Tensor | None) -> float:
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    if change is not None:
        for name, part in zip(NAMES, change.split([values[name].numel() for name in NAMES]), strict=True):
            values[name] = values[name] - part.view(values[name].shape)
    ids, targets = torch.as_tensor(job.queries.input_ids[0]).long(), torch.as_tensor(job.queries.targets[0])
    return float(example_loss(model, values, ids, targets, True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracin", "less", "trak"])
def test_sign_a_step_on_a_positive_example_lowers_the_query_loss(run, tmp_path, name):
    """The step that the method is about, at the one checkpoint that counts; look at the query's loss."""
    weights = (0.0, 0.0, 1.0)
    job = job_of(run, tmp_path, weights=weights)
    if name == "trak":
        job = job_of(run, tmp_path, weights=weights, indexes=indexed(run, tmp_path, job))
    scores, model = all_scores(get_method(name), job)[0], models(run)[-1]
    train = slow.gradients(model, NAMES, job.train, True)
    if name == "less":
        state = torch.load(folders(run)[-1] / "optimizer.pt", weights_only=True)["state"]
        decayed = [key for key, each in model.named_parameters() if each.ndim == 2]
        held = [state[decayed.index(each)] for each in NAMES]
        first, second = (torch.cat([one[key].flatten() for one in held]).double() for key in ("exp_avg", "exp_avg_sq"))
        train = slow.adam_update(train, first, second, 6, (0.9, 0.999), 1e-8)
    elif name == "trak":
        phi, _ = slow.margins(model, NAMES, job.train)
        gram = phi.T @ phi
        train = -torch.linalg.solve(gram + gram.trace() / len(gram) * torch.eye(len(gram)).double(), phi.T).T
    for row in {int(scores.argmax()), int(scores.argmin())}:
        change = loss_of_query(model, job, 1e-5 * train[row] / train[row].norm()) - loss_of_query(model, job, None)
        assert np.sign(change) == -np.sign(float(scores[row]))


@pytest.mark.slow
def test_an_interrupted_run_continues_with_the_next_checkpoint(run, tmp_path, monkeypatch):
    job, opened = job_of(run, tmp_path, weights=(0.5, 0.5, 0.25)), []
    expected = all_scores(TracIn(), job_of(run, tmp_path / "other", weights=(0.5, 0.5, 0.25)))
    term = TracIn.term

    def dying(self, sub, checkpoint):
        if len(opened) == 2:
            raise KeyboardInterrupt
        opened.append(checkpoint.name)
        return term(self, sub, checkpoint)

    monkeypatch.setattr(TracIn, "term", dying)
    with pytest.raises(KeyboardInterrupt):
        all_scores(TracIn(), job)
    assert len(opened) == 2
    opened.clear()
    assert torch.equal(all_scores(TracIn(), job), expected)
    assert opened == [str(folders(run)[-1])]


@pytest.mark.slow
def test_other_questions_and_other_weights_are_not_answered_from_what_was_kept(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    job = job_of(copy, tmp_path)
    first = all_scores(TracIn(), job)
    other = all_scores(TracIn(), dataclasses.replace(job, queries=tokenized(3, 5, "q")))
    assert not torch.allclose(first, other)
    shutil.copyfile(copy / "checkpoint-6" / "model.safetensors", copy / "checkpoint-2" / "model.safetensors")
    assert not torch.allclose(first, all_scores(TracIn(), job_of(copy, tmp_path)))


def test_a_run_is_taken_apart_in_the_order_of_its_steps(run, tmp_path):
    for step in (10, 9):
        shutil.copytree(run / "checkpoint-2", tmp_path / f"checkpoint-{step}")
    found = find_checkpoints(settings(model=None, checkpoints=str(tmp_path)), "equal")
    assert [Path(each.name).name for each in found] == ["checkpoint-9", "checkpoint-10"]
    globbed = find_checkpoints(settings(model=None, checkpoints=str(tmp_path / "checkpoint-*")), "equal")
    assert globbed == found
    listed = [str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-9")]
    assert [each.name for each in find_checkpoints(settings(model=None, checkpoints=listed), "equal")] == listed


def test_learning_rates_are_those_that_led_to_each_checkpoint(run, tmp_path):
    """Logged at every step: 0.01 falling by a sixth; without the log, the scheduler's two ends give the same."""
    rates = learning_rates(folders(run))
    state = json.loads((folders(run)[-1] / "trainer_state.json").read_text())
    logged = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    assert rates == pytest.approx([(logged[step - 1] + logged[step]) / 2 for step in (2, 4, 6)])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for folder in folders(copy):
        state = json.loads((folder / "trainer_state.json").read_text()) | {"log_history": []}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    # The scheduler is one step ahead of the log.
    assert learning_rates(folders(copy)) == pytest.approx([0.01 * share for share in (5 / 6, 1 / 2, 1 / 6)])
    assert all(rate > 0 for rate in learning_rates(folders(copy))), "the last rate of the scheduler is zero"
    (copy / "checkpoint-4" / "scheduler.pt").unlink()
    with pytest.raises(ModelError, match="--checkpoint-weights"):
        learning_rates(folders(copy))


def test_mistakes_say_what_to_type(run, tmp_path):
    folder = [str(each) for each in folders(run)]
    asked = {"model": None, "checkpoints": folder}
    with pytest.raises(SpecError, match="Drop --model"):
        find_checkpoints(settings(checkpoints=folder), "equal")
    with pytest.raises(SpecError, match="Give one number for each"):
        find_checkpoints(settings(**asked, checkpoint_weights=[1.0]), "equal")
    with pytest.raises(SpecError, match="one above it"):
        find_checkpoints(settings(**asked, checkpoint_weights=[0, 0, 0]), "equal")
    with pytest.raises(SpecError, match="expected a finite number"):
        find_checkpoints(settings(**asked, checkpoint_weights=[1, float("nan"), 1]), "equal")
    with pytest.raises(ModelError, match="No folder has a name like"):
        find_checkpoints(settings(model=None, checkpoints=str(tmp_path / "no-*")), "equal")
    with pytest.raises(SpecError, match="is empty"):
        find_checkpoints(settings(model=None, checkpoints=[]), "equal")


@pytest.mark.slow
def test_indexes_have_to_be_of_their_checkpoints_and_alike(run, tmp_path):
    job = job_of(run, tmp_path)
    made = indexed(run, tmp_path, job)
    with pytest.raises(IndexMismatch, match="made with other weights"):
        all_scores(TracIn(), job_of(run, tmp_path, indexes=made[::-1]))
    other = indexed(run, tmp_path / "mean", job, "mean")
    mixed = [str(each.folder) for each in (made[0], other[1], made[2])]
    given = {"model": None, "data": None, "checkpoints": [str(each) for each in folders(run)]}
    with pytest.raises(IndexMismatch, match="differ in their --loss"):
        find_checkpoints(settings(**given, index=mixed), "equal")
    with pytest.raises(SpecError, match="one --index for each checkpoint"):
        find_checkpoints(settings(**given, index=mixed[:2]), "equal")


def test_checkpoints_of_another_architecture_or_without_sense_are_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    build("gpt2", torch.float32).save_pretrained(copy / "checkpoint-2")  # type: ignore[operator]
    with pytest.raises(ModelError, match="different parameters"):
        all_scores(TracIn(), job_of(copy, tmp_path))
    model = build("llama", torch.float32)
    with torch.no_grad():
        model.get_parameter(NAMES[0]).fill_(float("nan"))
    model.save_pretrained(copy / "checkpoint-2")  # type: ignore[operator]
    with pytest.raises(NonFinite):
        all_scores(TracIn(), job_of(copy, tmp_path))


@pytest.mark.parametrize("name", ["tracin", "less", "trak"])
def test_a_method_says_what_it_means(name):
    found = get_method(name)
    assert found.name == name
    assert all(found.meaning.to_dict().values())
