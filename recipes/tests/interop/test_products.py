"""Published products by parameter, as what the component search works on."""

import json

import numpy as np
import pytest

from vestige.errors import DataError
from vestige.evaluate import greedy_path
from vestige_recipes.interop import published_products

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


def test_published_products_that_do_not_belong_together_are_refused(tmp_path):
    (tmp_path / "dot_products.json").write_text(json.dumps(DOTS))
    with pytest.raises(DataError, match=r"holds no paraphrased_dot_products.json"):
        published_products(tmp_path)
    (tmp_path / "paraphrased_dot_products.json").write_text(json.dumps({"lima_0": OWN["lima_0"]}))
    (tmp_path / "original_dot_products.json").write_text(json.dumps(OWN))
    with pytest.raises(DataError, match="no products of 'lima_1' with itself"):
        published_products(tmp_path)
