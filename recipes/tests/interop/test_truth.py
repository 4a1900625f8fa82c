"""Ground truth in the layouts that other software writes."""

import json

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import spearmanr
from tests.workshop import furnish, write_rows

import vestige.evaluate
from vestige import attribute
from vestige.banks import TRUTH_FORMATS, Bank
from vestige.errors import DataError

SUBSETS = [[0, 2, 5], [1, 2, 3], [0, 4, 6]]


def dattri(folder, runs=2):
    places = {}
    for number, rows in enumerate(SUBSETS):
        place = folder / str(number)
        place.mkdir(parents=True)
        (place / "indices.txt").write_text("\n".join(map(str, rows)))
        for run in range(runs):
            torch.save({"bias": torch.tensor([10.0 * number + run, 1.0])}, place / f"model_weights_{run}.pt")
        places[number] = f"/elsewhere/{number}"
    metadata = {
        "mode": "lds",
        "data_length": 8,
        "num_subsets": 3,
        "num_runs_per_subset": runs,
        "subset_dir_map": places,
    }
    (folder / "metadata.yml").write_text(yaml.safe_dump(metadata))
    return folder


def test_dattri_folders_become_a_bank_through_a_measurement(tmp_path):
    made = Bank.open(dattri(tmp_path), measure=lambda state: state["bias"].numpy())
    assert made.membership.shape == (6, 8)
    assert [np.flatnonzero(row).tolist() for row in made.subset_membership] == SUBSETS
    assert made.by_subset(made.query_losses)[:, :, 0].tolist() == [[0, 1], [10, 11], [20, 21]]
    with pytest.raises(DataError, match="measure=function"):
        Bank.open(tmp_path)
    (tmp_path / "1" / "model_weights_1.pt").unlink()
    with pytest.raises(DataError, match=r"1/model_weights_1.pt is missing"):
        Bank.open(tmp_path, measure=lambda state: state["bias"].numpy())
    (tmp_path / "metadata.yml").write_text("mode: lds\n")
    with pytest.raises(DataError, match="retrain_lds"):
        Bank.open(tmp_path, measure=lambda state: state["bias"].numpy())


@pytest.mark.parametrize("written", ["lines", "row", "header"])
def test_grass_indices_and_margins_become_a_bank(tmp_path, written):
    margins = torch.arange(12.0).reshape(3, 4)
    torch.save(margins, tmp_path / "gt.pt")
    for number, rows in enumerate(SUBSETS):
        (tmp_path / str(number)).mkdir()
        text = {"lines": "\n", "row": ",", "header": "\n"}[written].join(map(str, rows))
        head = "train_index\n" if written == "header" else ""
        (tmp_path / str(number) / "train_index.csv").write_text(head + text + "\n")
    made = Bank.open(tmp_path, examples=10)
    assert made.membership.shape == (3, 10)
    assert [np.flatnonzero(row).tolist() for row in made.membership] == SUBSETS
    np.testing.assert_array_equal(made.query_margins, margins.numpy())
    with pytest.raises(DataError, match="holds no query_loss; it holds query_margin"):
        made.query_losses  # noqa: B018
    with pytest.raises(DataError, match="names row 6, and there are 4"):
        Bank.open(tmp_path, examples=4)
    (tmp_path / "2" / "train_index.csv").unlink()
    with pytest.raises(DataError, match="no list of row numbers"):
        Bank.open(tmp_path)


def test_a_table_of_subsets_and_held_out_losses_becomes_a_bank(tmp_path):
    file = tmp_path / "lds.jsonl"
    lines = [{"_meta": {"pool": list(range(100, 109))}}]
    lines += [
        {"train_subset": rows, "train_subset_global": [100 + row for row in rows], "test_loss": [number, 0.5]}
        for number, rows in enumerate([*SUBSETS, *SUBSETS])
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = Bank.open(file)
    assert made.membership.shape == (6, 9)
    assert made.by_subset(made.query_losses)[:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5]]
    file.write_text('{"train_subset": [1, 2], "test_loss": "high"}\n')
    with pytest.raises(DataError, match="line 1"):
        Bank.open(file)
    file.write_text('{"train_subset": [1, 2], "test_loss": [1.0]}\n{"train_subset": [1], "test_loss": [1.0, 2.0]}\n')
    with pytest.raises(DataError, match="1 models have values"):
        Bank.open(file)
    file.write_text("\n")
    with pytest.raises(DataError, match="not one subset"):
        Bank.open(file)


@pytest.mark.slow
def test_lds_is_judged_by_the_margins_of_a_published_folder(tmp_path):
    """GraSS's published truth holds margins alone, and knows rows by number."""
    torch.set_num_threads(1)
    folder = furnish(tmp_path / "w")
    lines = (folder / "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"id": str(number)} for number, line in enumerate(lines)]
    files = {"data": write_rows(folder / "d.jsonl", rows), "queries": write_rows(folder / "q.jsonl", rows[:3])}
    given = {"model": str(folder / "tiny-model"), **{name: str(path) for name, path in files.items()}}
    run = attribute(**given, method="grad-dot", out=tmp_path / "run", dense=True, trust=False)
    generator = np.random.default_rng(0)
    inside = np.array([np.isin(np.arange(12), generator.permutation(12)[:6]) for _ in range(8)])
    for number, line in enumerate(inside):
        (tmp_path / "grass" / str(number)).mkdir(parents=True)
        text = "".join(f"{row}\n" for row in np.flatnonzero(line))
        (tmp_path / "grass" / str(number) / "train_index.csv").write_text(text)
    margins = generator.standard_normal((8, 3))
    torch.save(torch.from_numpy(margins), tmp_path / "grass" / "gt.pt")
    found = vestige.evaluate.lds(
        run=[str(tmp_path / "run")], bank=tmp_path / "grass", opponents=False, draws=2, out=tmp_path / "lds"
    )
    predicted = inside @ run.dense().astype(np.float64).T
    expected = np.mean([spearmanr(predicted[:, query], margins[:, query]).statistic for query in range(3)])
    assert found["grad-dot"].values["LDS"].value == pytest.approx(expected, abs=1e-6)


def test_what_is_no_bank_lists_the_layouts_and_without_any_what_to_install(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"made, dattri's \(metadata.yml\), GraSS's .*, or a .jsonl file"):
        Bank.open(tmp_path)
    monkeypatch.setattr(type(TRUTH_FORMATS), "names", lambda self: [])
    with pytest.raises(DataError, match=r"`vestige bank` made. Ground truth .* pip install 'vestige\[recipes\]'"):
        Bank.open(tmp_path)
