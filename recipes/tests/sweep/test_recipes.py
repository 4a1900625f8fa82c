"""The recipes at full size: what they would run, cell by cell and job by job, with the settings of today."""

import re
import shlex
from pathlib import Path

import pytest

from sweep.published import IDS, write_deployment
from vestige.errors import WorkElsewhere
from vestige.registry import COMMANDS
from vestige.settings import list_epochs
from vestige_recipes.sweep import read_grid, read_published, sweep
from vestige_recipes.sweep.cells import cells_of, name_of

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "recipes" / "grids"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
SHADOWS = {f"{data}-{model}": (model, data) for model, data in IDS}
CELLS = {"data": 3, "parts": 3, "banks": 5, "audits": 5, "alarms": 8} | {f"shadows-{name}": 100 for name in SHADOWS}
POOLED = {"arc": 2250, "ethics": 17865, "mmlu": 33750}
ROWS = {"arc": 2000, "ethics": 15880, "mmlu": 30000}
STEPS = {"arc": 2500, "ethics": 19850, "mmlu": 37500}
FIRST_CELLS = {
    "arc-mistral": "4fd5d480f53ba274",
    "ethics-mistral": "f98f52903b28caf2",
    "mmlu-mistral": "aafdae1173fe6da9",
    "mmlu-llama": "3e7d6566558b41f2",
    "mmlu-gemma": "89dd28a2d3a5507e",
}
"""Ids of the models of split 0."""


def recipe(name):
    return next(FOLDER.rglob(f"{name}.yaml"))


def shadows(name):
    return recipe(f"shadows-{name}")


def typed(path):
    """The options that the head of a recipe says to type after `vestige sweep`."""
    head = " ".join(line.lstrip("# ").rstrip("\\ ") for line in path.read_text().splitlines() if line.startswith("#"))
    words = shlex.split(re.search(r"vestige sweep (\S+\.yaml .*)", head)[1])
    assert ROOT / words[0] == path
    options = dict(zip(words[1::2], words[2::2], strict=True))
    return {name.removeprefix("--"): value for name, value in options.items()}


def test_no_recipe_is_left_out():
    assert {path.stem for path in RECIPES} == set(CELLS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_cell_of_a_recipe_is_planned_under_an_id_of_its_own(path, tmp_path):
    report = sweep(path, out=tmp_path / "sw", dry_run=True)
    assert report.counts() == {"missing": CELLS[path.stem]}
    assert len({row.cell for row in report.rows}) == CELLS[path.stem]
    assert not (tmp_path / "sw").exists()


def test_five_deployments_train_five_hundred_models(tmp_path):
    cells = [cell for name in SHADOWS for cell in cells_of(read_grid(shadows(name)), tmp_path)]
    assert len({cell.id for cell in cells}) == 500
    assert {cell.settings.model for cell in cells} == {
        "mistralai/Mistral-7B-v0.1",
        "meta-llama/Llama-2-7b-hf",
        "google/gemma-7b",
    }


@pytest.mark.parametrize("name", SHADOWS)
def test_the_shadows_are_the_published_deployment(name, tmp_path):
    """Setting by setting the grid that the published configuration, known by its published ids, is turned into."""
    model, data = SHADOWS[name]
    published = read_published(write_deployment(tmp_path, model, data))
    assert (published.training.config_id, published.deployment_id) == IDS[model, data]
    theirs, ours = cells_of(read_grid(published.grid()), tmp_path), cells_of(read_grid(shadows(name)), tmp_path)
    for their, our in zip(theirs, ours, strict=True):
        assert our.matters() | {"data": ""} == their.matters() | {"data": ""}
    assert len(list_epochs(ours[0].settings.checkpoints, ours[0].settings.passes)) == 15
    assert [cell.settings.split_seed for cell in ours] == list(range(100))


def test_the_grid_of_the_alarm_trains_the_audited_model(tmp_path):
    """But for the alarm and the checkpoints that are kept it is split 0 of the shadows."""
    shadow = cells_of(read_grid(shadows("arc-mistral")), tmp_path)[0].matters()
    for cell in planned("alarms", tmp_path):
        own = cell.matters()
        different = {name for name in own if own[name] != shadow[name]}
        assert {"alarm", "checkpoints"} <= different <= {"alarm", "checkpoints", "alarm_below", "alarm_measure"}


def test_ids_of_the_recipes_stay_what_they_are(tmp_path):
    """Who has trained a hundred models finds them again with a later version."""
    first = {name: cells_of(read_grid(shadows(name)), tmp_path)[0].id for name in SHADOWS}
    assert first == FIRST_CELLS


@pytest.mark.slow
def test_rows_and_steps_are_the_published_ones(tmp_path):
    data = {cell.point["cell"]: cell.settings for cell in planned("data", tmp_path)}
    parts = {cell.point["cell"]: cell.settings for cell in planned("parts", tmp_path)}
    for task, rows in ROWS.items():
        # Rows of the tests are 1,172 and 3,964; of MMLU there is no test in the pool.
        pooled = int(re.search(r"\[:(\d+)\]", data[task].split)[1]) + {"arc": 1172, "ethics": 3964, "mmlu": 0}[task]
        assert pooled == POOLED[task]
        assert rows_of_parts(parts[task], pooled, tmp_path / task) == {"train": rows, "test": pooled - rows}
        assert parts[task].data == f"runs/data/named/{task}/data.jsonl"
    audits = {cell.point["cell"]: cell for cell in planned("audits", tmp_path)}
    for name, (_, task) in SHADOWS.items():
        train = cells_of(read_grid(shadows(name)), tmp_path)[0]
        assert train.settings.data == audits[name].settings.data == f"runs/parts/named/{task}/train.jsonl"
        batch = train.settings.batch_size * train.settings.accumulation
        assert ROWS[task] * train.settings.split_fraction * train.settings.epochs / batch == STEPS[task]
        # The audit looks at the last checkpoint of split 0, where the shadows' sweep puts it.
        home = f"{typed(shadows(name))['out']}/named/{name_of(train.point)}"
        assert audits[name].settings.model == f"{home}/checkpoint-{STEPS[task]}"


@pytest.mark.parametrize("name", [*(f"shadows-{name}" for name in SHADOWS), "audits", "alarms"])
def test_the_script_that_slurm_would_get(name, tmp_path, paper_slurm, monkeypatch):
    path = recipe(name)
    monkeypatch.chdir(tmp_path)
    settings = typed(path)
    with pytest.raises(WorkElsewhere, match="submitted as 1, 2"):
        sweep(path, wait=False, **settings)
    (*array, script), reduce = paper_slurm()
    jobs = int(settings["workers"])
    wanted = {"--gres=gpu:1", "--time=20:00:00", "--requeue", "--signal=B:USR1@120", f"--array=0-{jobs - 1}"}
    assert wanted <= set(array)
    assert f"--cpus-per-task={settings.get('threads', 1)}" in array
    assert "--dependency=afterany:1" in reduce
    words = shlex.split(Path(script).read_text().splitlines()[-1])
    assert words[0] == "exec"
    assert words[words.index("vestige.cli") + 1] == "sweep"
    frozen = read_grid(next(word for word in words if word.endswith(".json")))
    assert len(cells_of(frozen, tmp_path)) == CELLS[name]
    assert words[words.index("--out") + 1] == settings["out"]


def planned(name, out):
    return cells_of(read_grid(recipe(name)), out)


def rows_of_parts(settings, rows, folder):
    """How many rows each part gets when so many are split with these settings."""
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join(f'{{"text": "{row}"}}\n' for row in range(rows)))
    COMMANDS.find("data split").call(
        settings.model_copy(update={"data": str(folder / "data.jsonl"), "out": folder / "out"})
    )
    return {name: len((folder / "out" / f"{name}.jsonl").read_text().splitlines()) for name in settings.shares}
