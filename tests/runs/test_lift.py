import numpy as np
import pytest

from tests.runs.by_hand import chat, write_by_hand
from vestige.errors import UserError
from vestige.runs import find_source_lift


def rows_of(sizes: dict[str | None, int]):
    names = [source for source, size in sizes.items() for _ in range(size)]
    return [chat(f"{source}-{number}", "What?", "That.", source) for number, source in enumerate(names)]


@pytest.fixture
def rows():
    return rows_of({"wiki": 10, "shop": 30})


def test_lift_is_the_share_of_influence_over_the_share_of_rows(tmp_path, rows):
    scores = write_by_hand(tmp_path / "run", [[3.0] * 10 + [1.0] * 20 + [-5.0] * 10], rows, [chat("q", "What?")])
    wiki, shop = find_source_lift(scores, [0])
    assert (wiki.source, wiki.examples, wiki.row_share) == ("wiki", 10, 0.25)
    assert wiki.influence_share == pytest.approx(30 / 50)
    assert wiki.lift == pytest.approx(2.4)
    assert (shop.source, shop.lift) == ("shop", pytest.approx(0.4 / 0.75))
    assert wiki.low < wiki.lift < wiki.high
    assert not wiki.thin


def test_queries_count_the_same_whatever_their_scale(tmp_path, rows):
    values = [[1.0] * 10 + [0.0] * 30, [0.0] * 10 + [1000.0] * 30, [0.0] * 40]
    queries = [chat(name, "What?") for name in "abc"]
    scores = write_by_hand(tmp_path / "run", values, rows, queries)
    assert [one.influence_share for one in find_source_lift(scores, ["a", "b"])] == pytest.approx([0.5, 0.5])
    assert [one.source for one in find_source_lift(scores, ["b", 0, "b"])] == ["wiki", "shop"]
    # A query without a positive score has no shares.
    assert find_source_lift(scores, ["a", "c"]) == find_source_lift(scores, ["a"])
    assert find_source_lift(scores, ["c"]) == []
    with pytest.raises(UserError, match="No query has the id"):
        find_source_lift(scores, ["d"])


def test_a_source_that_is_one_row_is_thin(tmp_path, rows):
    one = [9.0] + [0.01] * 39
    scores = write_by_hand(tmp_path / "run", [one], rows, [chat("q", "What?")])
    found = {each.source: each for each in find_source_lift(scores, [0])}
    assert found["wiki"].thin
    assert list(found) == ["shop", "wiki"]
    single = write_by_hand(tmp_path / "one", [[9.0] + [1.0] * 39], rows_of({"a": 1, "b": 39}), [chat("q", "What?")])
    thin = {each.source: each for each in find_source_lift(single, [0])}["a"]
    assert (thin.low, thin.high, thin.thin) == (None, None, True)


@pytest.mark.parametrize(("size", "thin"), [(4, True), (5, False)])
def test_fewer_than_five_rows_are_thin(size, thin, tmp_path):
    rows = rows_of({"few": size, "rest": 30})
    scores = write_by_hand(tmp_path / "run", [[2.0] * size + [1.0] * 30], rows, [chat("q", "What?")])
    assert {one.source: one.thin for one in find_source_lift(scores, [0])}["few"] is thin


def test_other_rows_for_every_query_are_less_thin_than_one_for_all(tmp_path, rows):
    apart = [[9.0 if row == query else 0.0 for row in range(40)] for query in range(3)]
    alike = [[9.0] + [0.0] * 39] * 3
    queries = [chat(name, "What?") for name in "abc"]
    one, other = (
        find_source_lift(write_by_hand(tmp_path / name, values, rows, queries), "abc")[0]
        for name, values in (("apart", apart), ("alike", alike))
    )
    assert one.lift == other.lift == pytest.approx(4.0)
    assert one.high - one.low < other.high - other.low


@pytest.mark.slow
def test_the_interval_covers_the_true_share_at_its_rate(tmp_path):
    random = np.random.default_rng(0)
    rows, covered = rows_of({"wiki": 20, "shop": 60}), 0
    # Exponential scores with means 2 and 1: true share 40 / 100, of a quarter of the rows.
    for trial in range(200):
        values = [*random.exponential(2.0, 20), *random.exponential(1.0, 60)]
        found = find_source_lift(write_by_hand(tmp_path / str(trial), [values], rows, [chat("q", "What?")], k=80), [0])
        wiki = next(one for one in found if one.source == "wiki")
        covered += wiki.low <= 1.6 <= wiki.high
    assert 0.9 <= covered / 200 <= 1.0


def test_runs_without_sources_and_of_earlier_versions_have_no_lift(tmp_path, rows):
    plain = write_by_hand(tmp_path / "plain", [[1.0] * 3], rows_of({None: 3}), [chat("q", "What?")])
    assert find_source_lift(plain, [0]) == []
    scores = write_by_hand(tmp_path / "run", [[1.0] * 40], rows, [chat("q", "What?")])
    groups = {
        name: [one.model_copy(update={"positive": None}) for one in found] for name, found in scores.run.groups.items()
    }
    scores.run = scores.run.model_copy(update={"groups": groups})
    assert find_source_lift(scores, [0]) == []
