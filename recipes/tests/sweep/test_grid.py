"""What a grid may say, and that nothing runs unless every cell of it can."""

import pytest
import yaml
from tests.cli.test_faults import CONFIGS

from vestige.errors import SpecError
from vestige.settings import BankSettings
from vestige_recipes.commands import SweepSettings
from vestige_recipes.sweep import read_grid, sweep
from vestige_recipes.sweep.cells import NEVER_MATTER, cell_id, cells_of, name_of


def bank(axes=None, mode="product", **base):
    return {"verb": "bank", "mode": mode, "base": {"model": "m", "data": "d.jsonl"} | base, "axes": axes or {}}


def cells(content, folder):
    return cells_of(read_grid(content), folder)


def test_a_range_has_its_stop_and_no_rounding_in_it():
    axes = read_grid(bank({"learning_rate": {"start": 0.1, "stop": 0.7, "step": 0.1}})).axes
    assert axes["learning_rate"] == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert read_grid(bank({"seed": {"start": 0, "stop": 4, "step": 2}})).axes["seed"] == (0, 2, 4)
    assert read_grid(bank({"seed": {"start": 3, "stop": 1, "step": -1}})).axes["seed"] == (3, 2, 1)
    assert read_grid(bank({"seed": {"start": 0, "stop": 5, "step": 2}})).axes["seed"] == (0, 2, 4)
    assert all(isinstance(value, int) for value in read_grid(bank({"seed": {"start": 0, "stop": 9}})).axes["seed"])


def test_product_is_every_combination_and_zip_side_by_side(tmp_path):
    axes = {"seed": [0, 1], "epochs": [1, 2]}
    assert [tuple(cell.point.values()) for cell in cells(bank(axes), tmp_path)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [tuple(cell.point.values()) for cell in cells(bank(axes, "zip"), tmp_path)] == [(0, 1), (1, 2)]
    assert len(cells(bank(), tmp_path)) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bank({"seed": [0, 1], "epochs": [1]}, "zip"), "as many values, and these have: seed 2, epochs 1"),
        (bank({"seed": {"start": 0, "stop": 100}, "epochs": {"start": 1, "stop": 100}}), "10,100 cells"),
        (bank({"seed": {"start": 0, "stop": 1, "step": 1e-9}}), "at most 10,000"),
        (bank({"seed": {"start": 0, "stop": 1, "step": 0}}), "never comes from 0 to 1"),
        (bank({"seed": {"start": 1, "stop": 0, "step": 1}}), "never comes from 1 to 0"),
        (bank({"seed": {"start": 0, "end": 1}}), "start, stop and step"),
        (bank({"seed": {"start": 0, "stop": float("nan")}}), "start, stop and step"),
        (bank({"seed": []}), "`seed` has no values"),
        (bank({"seed": 3}), "belongs under `base`"),
        (bank({"data": ["x"]}), "under `base` and under `axes`"),
        (bank(mode="all"), "product .every combination. or zip"),
        (bank() | {"axis": {}}, "unknown key `axis`. Did you mean `axes`"),
        (bank() | {"verb": "bnak"}, "Did you mean 'bank'"),
        (bank() | {"verb": "report"}, "cannot be swept, for it leaves no folder"),
        (bank() | {"verb": None}, "Expected the command"),
        (bank() | {"base": [1]}, "Expected settings by name"),
        ("nowhere.yaml", "cannot be read"),
        (bank(model=object()), "live object"),
        (bank({"lerning_rate": [1e-4]}), "Did you mean `learning_rate`"),
        (bank(epocs=3), "Did you mean `epochs`"),
        (
            bank({"learning_rate": [1e-4, -1, 0]}),
            r"2 of 3 cells cannot run, so none was begun.\n  cell 1 .learning_rate=-1",
        ),
        (bank(out="here"), "`out` cannot be a setting of cells"),
        (bank({"shard": ["1/2", "2/2"]}), "`shard` cannot be"),
        (bank(overwrite=True), "Delete the cell's folder"),
        (bank(wait=False), "Give wait=False to the sweep"),
        (bank({"workers": [1, 2]}), "the same run: they differ in nothing that changes the result"),
        (bank({"learning_rate": [1e-4, "1e-4"]}), "the same run"),
    ],
)
def test_a_wrong_grid_says_what_and_runs_nothing(tmp_path, content, message):
    with pytest.raises(SpecError, match=message):
        sweep(content, out=tmp_path / "sw")
    assert not (tmp_path / "sw").exists()


def test_a_file_is_read_as_yaml_and_neither_as_a_list_nor_torn(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(bank({"seed": [0, 1]})))
    assert read_grid(path).to_dict() == read_grid(bank({"seed": [0, 1]})).to_dict()
    path.write_text("- 1\n")
    with pytest.raises(SpecError, match="holds a list"):
        read_grid(path)
    path.write_text("verb: [\n")
    with pytest.raises(SpecError, match="neither YAML nor JSON"):
        read_grid(path)


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_an_odd_file_is_refused_by_its_name(case, tmp_path):
    content = CONFIGS[case][0]
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpecError, match=r"c\.yaml"):
        sweep(path, out=tmp_path / "sw")


def test_runs_of_different_length_never_share_a_folder(tmp_path):
    """Fault A4.6 of the published software: epochs were not in its ids."""
    short, long = cells(bank({"epochs": [1, 10]}), tmp_path)
    assert short.id != long.id
    assert short.folder != long.folder


@pytest.mark.parametrize("name", [name for name in BankSettings.model_fields if name not in NEVER_MATTER])
def test_an_id_depends_on_every_setting_that_matters(name):
    plain = BankSettings(model="m", data="d", out="o")
    other = {bool: True, int: 7, float: 0.25}.get(type(getattr(plain, name)), "other")
    assert cell_id("bank", plain) != cell_id("bank", plain.model_copy(update={name: other}))


@pytest.mark.parametrize("name", sorted(NEVER_MATTER & set(BankSettings.model_fields)))
def test_an_id_does_not_depend_on_where_the_work_runs(name):
    plain = BankSettings(model="m", data="d", out="o")
    assert cell_id("bank", plain) == cell_id("bank", plain.model_copy(update={name: "other"}))


def test_ids_do_not_change_with_the_order_and_the_spelling_of_settings(tmp_path):
    one = cells(bank(learning_rate=1e-4, seed=1), tmp_path)[0]
    assert one.id == cells(bank(seed=1, learning_rate="1e-4", epochs=None), tmp_path)[0].id
    assert one.id == "f249128cb0e2470e"


def test_placeholders_and_entries_of_options(tmp_path):
    content = {
        "verb": "attribute",
        "base": {"data": "parts/{part}.jsonl", "queries": "{what} is {part}?", "method": "rep-sim", "model": "m"},
        "axes": {"part": ["a", "b"], "options.layer": [1, 2]},
    }
    first, *_, last = cells(content, tmp_path)
    assert first.settings.data == "parts/a.jsonl"
    assert last.settings.queries == "{what} is b?"
    assert last.settings.options == {"layer": 2}
    assert len({cell.id for cell in cells(content, tmp_path)}) == 4


def test_the_axis_cell_gives_names_and_is_no_setting(tmp_path):
    content = {
        "verb": "attribute",
        "base": {"data": "runs/{cell}", "queries": "q", "method": "bm25"},
        "mode": "zip",
        "axes": {"cell": ["one", "two"], "k": [1, 2]},
    }
    named = cells(content, tmp_path)
    assert [(cell.settings.data, cell.settings.k) for cell in named] == [("runs/one", 1), ("runs/two", 2)]
    assert [name_of(cell.point) for cell in named] == ["one", "two"]
    assert name_of({"model": "org/m", "learning_rate": 0.1}) == "model=org-m,learning_rate=0.1"


def test_cells_that_submit_jobs_need_a_sweep_in_one_process(tmp_path):
    with pytest.raises(SpecError, match="`engine: slurm`, and so the sweep must be one process"):
        sweep(bank({"seed": [0, 1]}, engine="slurm"), out=tmp_path / "sw", workers=2)


def test_the_settings_of_a_sweep_are_those_of_work_and_three_more():
    assert {"grid", "out", "dry_run", "workers", "engine", "shard"} <= set(SweepSettings.model_fields)
