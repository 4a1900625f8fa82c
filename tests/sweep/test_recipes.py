"""The recipes at full size parse, cell by cell, with the settings of today."""

from pathlib import Path

import pytest

from vestige.sweep import read_grid
from vestige.sweep._cells import cells_of

RECIPES = sorted((Path(__file__).parents[2] / "studies").rglob("*.yaml"))
CELLS = {"data": 3, "banks": 5, "audits": 5}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_cell_of_a_recipe_parses(path, tmp_path):
    cells = cells_of(read_grid(path), tmp_path).cells
    assert len(cells) == CELLS.get(path.stem, 100)


def test_the_shadows_are_the_published_configurations(tmp_path):
    published = {"epochs": 10.0, "split_fraction": 0.5, "lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.5}
    published |= {"learning_rate": 2.5e-5, "batch_size": 2, "accumulation": 2, "warmup": 5, "loss": "answer"}
    shadows = [path for path in RECIPES if path.stem.startswith("shadows-")]
    assert len(shadows) == 5
    for path in shadows:
        settings = cells_of(read_grid(path), tmp_path).cells[7].settings
        assert {name: getattr(settings, name) for name in published} == published
        assert settings.split_seed == 7
        assert len(settings.checkpoint_epochs) == 15
