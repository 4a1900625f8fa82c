"""Products of two batches from factors: exact on every route, and the cheapest route is taken."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vestige.gradients import (
    BlockSizes,
    Extent,
    FormingBudget,
    HeldGradients,
    OneHot,
    _cross as cross,
    cheapest_route,
    cross_products,
    materialise,
    products,
    square_norms,
)

Pair = tuple[Tensor | OneHot, Tensor]


def pair(examples: int, tokens: int, out: int, width: int, one_hot: bool, seed: int, dtype=torch.float64) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(examples, tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    if one_hot:
        return OneHot(torch.randint(out, (examples, tokens), generator=generator), out), right
    return torch.randn(examples, tokens, out, generator=generator, dtype=torch.float64).to(dtype), right


def dense(left: Tensor | OneHot) -> Tensor:
    return torch.nn.functional.one_hot(left.ids, left.size).double() if isinstance(left, OneHot) else left.double()


def reference(first: Pair, second: Pair) -> Tensor:
    """`[example, example2]`, every gradient written out."""
    one, other = (torch.einsum("eto,eti->eoi", dense(left), right.double()) for left, right in (first, second))
    return torch.einsum("eoi,foi->ef", one, other)


SIZES = {"few tokens": (3, 2, 2, 3), "many tokens": (3, 40, 4, 30), "one query": (5, 9, 1, 7), "one each": (1, 4, 1, 5)}


@pytest.mark.parametrize("route", ["ghost", "second", "first", None])
@pytest.mark.parametrize(("one", "other"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("size", SIZES)
def test_products_are_exact_on_every_route(size, one, other, route, monkeypatch) -> None:
    examples, tokens, others, other_tokens = SIZES[size]
    first, second = pair(examples, tokens, 11, 6, one, 0), pair(others, other_tokens, 11, 6, other, 1)
    if route is not None:
        monkeypatch.setattr(cross, "cheapest_route", lambda *_, **__: route)
    expected = reference(first, second)
    assert torch.allclose(cross_products(first, second), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("one_hot", [False, True])
def test_products_in_small_blocks_are_the_same(one_hot, monkeypatch) -> None:
    first, second = pair(5, 7, 11, 6, one_hot, 0), pair(4, 9, 11, 6, False, 1)
    expected = reference(first, second)
    for route, name, small in [
        ("ghost", "product_bytes", 8 * 7 * 9 * 3),
        ("second", "held_numbers", 66 * 3),
        ("ghost", "product_bytes", 1),
    ]:
        monkeypatch.setattr(cross, "cheapest_route", lambda *_, route=route, **__: route)
        monkeypatch.setattr(BlockSizes, name, small)
        assert torch.allclose(cross_products(first, second), expected, rtol=1e-10, atol=1e-10)


def operations(first: Pair, second: Pair, route: str, monkeypatch) -> int:
    with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
        patch.setattr(cross, "cheapest_route", lambda *_, **__: route)
        cross_products(first, second)
    return counter.get_total_flops() // 2


@pytest.mark.slow
def test_the_rule_picks_the_route_that_costs_least_when_counted(monkeypatch) -> None:
    """Operations as PyTorch counts them, over shapes on both sides of the boundary; ties go to any of the least."""
    picked, routes = set(), ("ghost", "second", "first")
    for examples, tokens, others, other_tokens, (out, width) in itertools.product(
        (1, 3, 8), (1, 4, 16), (1, 4), (1, 3, 24), ((16, 16), (64, 8), (4, 40), (8, 1))
    ):
        first = pair(examples, tokens, out, width, False, 0)
        second = pair(others, other_tokens, out, width, False, 1)
        counted = {route: operations(first, second, route, monkeypatch) for route in routes}
        extents = Extent(examples, tokens), Extent(others, other_tokens)
        route = cheapest_route((extents[0],), (extents[1],), (out, width))
        assert counted[route] == min(counted.values()), (extents, out, width, counted)
        picked.add(route)
    assert picked == set(routes)


def test_an_embedding_never_forms_its_vocabulary() -> None:
    """One-hot factors on both sides: the route costs the same for any vocabulary."""
    sides = (Extent(8, 64, True),), (Extent(4, 64, True),)
    assert cheapest_route(*sides, (100, 32)) == cheapest_route(*sides, (10**6, 32))


def test_half_precision_sums_in_float32() -> None:
    first, second = (pair(3, 50, 12, 7, False, seed, torch.bfloat16) for seed in (0, 1))
    expected = reference(first, second)
    got = cross_products(first, second)
    assert got.dtype == torch.float32
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_materialise_is_the_sum_of_outer_products() -> None:
    for one_hot in (False, True):
        left, right = pair(2, 5, 4, 3, one_hot, 0)
        assert torch.allclose(materialise(left, right), torch.einsum("eto,eti->eoi", dense(left), right))


def test_norms_take_the_cheaper_route_when_counted(monkeypatch) -> None:
    """The matrix's own square is element-wise, so PyTorch does not count it: `out*in` an example is added."""
    picked = set()
    for examples, tokens, (out, width) in itertools.product((1, 5), (1, 3, 8, 9, 24), ((16, 16), (64, 8), (4, 40))):
        batch = cross.gradients_of(pair(examples, tokens, out, width, False, 0))
        chosen = cross.own_ghost_is_cheaper(batch.extents, batch.shape)
        counted = {}
        for ghost in (True, False):
            with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
                patch.setattr(cross, "own_ghost_is_cheaper", lambda *_, ghost=ghost: ghost)
                square_norms(batch)
            counted[ghost] = counter.get_total_flops() // 2 + (0 if ghost else examples * out * width)
        assert counted[chosen] == min(counted.values()), (examples, tokens, out, width, counted)
        picked.add(chosen)
    assert picked == {True, False}


@pytest.mark.slow
def test_queries_held_for_many_batches_are_formed_once_and_only_where_that_is_cheapest(monkeypatch) -> None:
    """Over ten batches the sum of all operations is the least of the routes, forming included."""
    formed = set()
    for tokens, queries, query_tokens, (out, width) in itertools.product((2, 12), (1, 6), (2, 20), ((16, 16), (64, 8))):
        batches = [pair(4, tokens, out, width, False, seed) for seed in range(10)]
        query = cross.gradients_of(pair(queries, query_tokens, out, width, False, 99))
        counted, values = {}, {}
        for route in ("ghost", "second", "first", None):
            with monkeypatch.context() as patch, FlopCounterMode(display=False) as counter:
                if route is not None:
                    patch.setattr(cross, "cheapest_route", lambda *_, route=route, **__: route)
                held = HeldGradients(query, FormingBudget(), batches=10)
                values[route] = torch.cat([held.products(cross.gradients_of(batch)) for batch in batches])
            counted[route] = counter.get_total_flops() // 2
            assert torch.allclose(values[route], values["ghost"], rtol=1e-9, atol=1e-9)
        assert counted[None] == min(counted.values()), (tokens, queries, query_tokens, out, width, counted)
        formed.add(held.formed)
    assert formed == {True, False}


def test_without_room_nothing_is_kept_and_the_products_are_the_same() -> None:
    batch, query = (cross.gradients_of(pair(6, 40, 8, 8, False, seed)) for seed in (0, 1))
    held = HeldGradients(query, FormingBudget(0), batches=10)
    assert torch.allclose(held.products(batch), products(batch, query), rtol=1e-12)
    assert not held.formed
