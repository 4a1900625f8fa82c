"""Published products by parameter, as what the component search works on."""

import json

import numpy as np
import pytest
from tests.workshop import PAIRS, furnish, write_rows

from vestige.cli import main
from vestige.errors import DataError, IndexMismatch
from vestige.evaluate import components, greedy_path
from vestige.reports import report
from vestige_recipes.interop import import_published, published_products
from vestige_recipes.interop.products import products as judge_products

DOTS = {
    "lima_0": {"lima_0": {"a": 3.0, "b": 1.0}, "lima_1": {"a": -1.0, "b": 2.0}},
    "lima_1": {"lima_0": {"a": 0.0, "b": 2.0}, "lima_1": {"a": 2.0, "b": 0.5}},
}
OWN = {"lima_0": {"a": 4.0, "b": 9.0}, "lima_1": {"a": 4.0, "b": 4.0}}


def test_the_published_layout_of_products_is_read(tmp_path):
    (tmp_path / "paraphrased_dot_products.json").write_text(json.dumps(OWN))
    (tmp_path / "original_dot_products.json").write_text(json.dumps(OWN))
    for number, (query, found) in enumerate(DOTS.items()):
        path = tmp_path / f"dot_products_part_{number}_{number + 1}.json"
        path.write_text(json.dumps({query: found}, indent=4))
    found = published_products(tmp_path, {"a": 10, "b": 40})
    assert (found.queries, found.products.names) == (("lima_0", "lima_1"), ("a", "b"))
    expected = [[4 / 13, 1 / np.sqrt(13 * 8)], [2 / np.sqrt(8 * 13), 2.5 / 8]]
    np.testing.assert_allclose(found.products.cosine(), expected)
    assert found.right.tolist() == [[True, False], [False, True]]
    path = greedy_path(found.products, found.right, "accuracy")
    assert (path.order[0], path.values[0]) == (0, 1.0)


@pytest.mark.slow
def test_a_component_search_is_written_in_the_published_layouts_and_judged_again_from_them(tmp_path, capsys):
    place = furnish(tmp_path / "place")
    rows = [
        {"id": f"p-{n}", "original_id": f"pair-{n}", "prompt": f"Tell me: {q}", "completion": a}
        for n, (q, a, _) in enumerate(PAIRS)
    ]
    write_rows(place / "queries.jsonl", rows)
    given = {
        "model": str(place / "tiny-model"),
        "data": str(place / "train.jsonl"),
        "queries": str(place / "queries.jsonl"),
    }
    options = {"folds": 3, "draws": 20, "figures": False}
    own = components(**given, **options, project="16", candidates="4", out=tmp_path / "own")
    for name in ("similarities", "dot_products"):
        main(["export", str(tmp_path / "own"), "--to", name, "--out", str(tmp_path / name)])
    cosines = json.loads((tmp_path / "similarities" / "similarities.json").read_text())
    assert list(cosines) == [f"pair-{n}" for n in range(12)], "queries are called as their originals"
    ((dimension, projected),) = json.loads((tmp_path / "similarities" / "random_projection.json").read_text()).items()
    assert int(dimension) > 16
    assert list(projected["pair-0"]) == list(cosines["pair-0"])
    products = tmp_path / "dot_products"
    judged = [str(products), "--parameters", str(products / "parameters.json"), "--folds", "3", "--draws", "20"]
    main(["evaluate", "products", *judged, "--out", str(tmp_path / "again")])
    assert "full gradient" in capsys.readouterr().out
    again, before = (json.loads((tmp_path / name / "components.json").read_text()) for name in ("again", "own"))
    (found,), (expected,) = again["candidates"].values(), before["candidates"].values()
    assert found["searches"]["accuracy"]["path"] == expected["searches"]["accuracy"]["path"]
    rows, wanted = ({one["name"]: one for one in each["representations"]} for each in (found, expected))
    for name in ("full gradient", "full gradient, inner product", "mean of the components' cosines", "random"):
        assert rows[name]["accuracy"]["value"] == wanted[name]["accuracy"]["value"]
        assert (rows[name]["seconds"], rows[name]["backward"]) == (None, None)
    assert rows["best component, held out"]["parameters"] < rows["full gradient"]["parameters"] == 1.0
    assert again["passes"] is None
    assert again["command"].startswith("vestige evaluate products")
    with pytest.raises(IndexMismatch, match="another command"):
        judge_products(products, out=tmp_path / "own")
    assert (tmp_path / "again" / "accuracy_per_component.png").is_file()
    assert report(tmp_path / "again").is_file()
    assert own["full gradient"].values["accuracy"].value > 0
    run = import_published(source=products, out=tmp_path / "run")
    assert run.top("pair-0", 1)[0].score == pytest.approx(max(cosines["pair-0"].values()), rel=1e-5)


def test_published_products_that_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / "dot_products.json").write_text(json.dumps(DOTS))
    with pytest.raises(DataError, match=r"holds no paraphrased_dot_products.json"):
        published_products(tmp_path)
    (tmp_path / "paraphrased_dot_products.json").write_text(json.dumps({"lima_0": OWN["lima_0"]}))
    (tmp_path / "original_dot_products.json").write_text(json.dumps(OWN))
    with pytest.raises(DataError, match="no products of 'lima_1' with itself"):
        published_products(tmp_path)
