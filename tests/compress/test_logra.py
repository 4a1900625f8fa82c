"""Kronecker projection with a total rank, and its three kinds of rows."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings, strategies as st

from tests.reference.compress_dense import matrix_of
from vestige.compress import Stream, allocate, logra, parse_spec


def published(inputs, outputs, total, minimum):
    """(k_in, k_out) of the published rule: a start from the ratio of the sides, and two steps around it."""
    first = min(max(round(math.sqrt(total) * math.sqrt(outputs / inputs)), minimum), inputs)
    second = min(max(total // first, minimum), outputs)
    best = (first, second)
    for one in range(first - 2, first + 3):
        for other in range(second - 2, second + 3):
            allowed = minimum <= one <= inputs and minimum <= other <= outputs
            if allowed and abs(one * other - total) < abs(best[0] * best[1] - total):
                best = (one, other)
    return best


def test_the_published_rule_is_what_ours_is_compared_with():
    cases = {
        (768, 2304, 256, 8): (28, 9),
        (768, 3072, 256, 8): (32, 8),
        (3072, 768, 256, 8): (8, 32),
        (2048, 8192, 4096, 8): (128, 32),
        (10, 20, 64, 4): (8, 8),
        (20, 5, 64, 4): (6, 5),
        (768, 3072, 16, 4): (6, 4),
    }
    assert {case: published(*case) for case in cases} == cases


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ((20, 5, 64, 4), (16, 4)),  # the published rule keeps 30 of 64; 13x5 = 65 fits, and 16x4 is 64
        ((20, 5, 64, 5), (13, 5)),
        ((20, 5, 64, 8), (13, 5)),
        ((768, 3072, 16, 4), (4, 4)),  # the published rule keeps 24 for 16
        ((768, 2304, 256, 8), (32, 8)),
        ((768, 3072, 256, 8), (32, 8)),
        ((3072, 768, 256, 8), (8, 32)),
        ((2048, 8192, 4096, 8), (128, 32)),
        ((10, 20, 64, 4), (8, 8)),
        ((20, 20, 20, 8), (8, 8)),  # the minimum wins over the total
        ((3, 20, 30, 8), (3, 10)),  # a side narrower than the minimum is kept whole
        ((1, 768, 256, 8), (1, 256)),  # a bias
    ],
)
def test_the_published_misses_are_found(case, expected):
    inputs, outputs, total, minimum = case
    output, input_ = allocate((outputs, inputs), total, minimum)
    assert (input_, output) == expected


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 2000), st.integers(1, 12))
@example(20, 5, 64, 4)
@example(70, 70, 257, 8)
def test_the_allocation_is_the_optimum_of_a_full_search(inputs, outputs, total, minimum):
    def rank(pair):
        output, input_ = pair
        imbalance = Fraction(input_ * inputs, output * outputs)
        return abs(output * input_ - total), max(imbalance, 1 / imbalance)

    pairs = [
        (output, input_)
        for output in range(min(minimum, outputs), outputs + 1)
        for input_ in range(min(minimum, inputs), inputs + 1)
    ]
    ours = allocate((outputs, inputs), total, minimum)
    assert ours in pairs
    assert rank(ours) == min(map(rank, pairs))
    if minimum <= min(inputs, outputs):
        theirs = published(inputs, outputs, total, minimum)
        assert abs(ours[0] * ours[1] - total) <= abs(theirs[0] * theirs[1] - total)


def test_a_vocabulary_is_divided_at_once():
    assert math.prod(allocate((151_936, 2048), 4096, 8)) == 4096


def test_the_rank_is_divided_for_each_component():
    spec = parse_spec("logra:64")
    made = [spec.build("a", shape, 0) for shape in ((5, 20), (64, 64))]
    assert [(one.left.out_size, one.right.out_size) for one in made] == [(5, 13), (8, 8)]


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_the_rank_in_numbers_is_the_same_map_as_the_sides(shape):
    by_rank = parse_spec("logra:64").build("a", shape, 3)
    sides = f"logra:{by_rank.left.out_size}x{by_rank.right.out_size}"
    by_sides = parse_spec(sides).build("a", shape, 3)
    for side in ("left", "right"):
        assert torch.equal(matrix_of(getattr(by_rank, side)), matrix_of(getattr(by_sides, side)))


def test_orthonormal_rows_have_the_length_that_keeps_inner_products():
    matrix = matrix_of(logra(40, 10, Stream(0, "rows"), init="orthonormal"))
    torch.testing.assert_close(matrix @ matrix.t(), 4.0 * torch.eye(10).double(), rtol=0, atol=1e-5)


def test_unscaled_orthonormal_rows_would_shrink_inner_products_by_k_over_n():
    """The trap of the published orthonormal initialisation: on average, norms were 0.025 of the truth."""
    vector = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
    ours, unscaled = [], []
    for seed in range(200):
        matrix = matrix_of(logra(40, 10, Stream(seed, "rows"), init="orthonormal"))
        ours.append(float((matrix @ vector) @ (matrix @ vector)))
        rows = matrix / matrix.norm(dim=1, keepdim=True)
        unscaled.append(float((rows @ vector) @ (rows @ vector)))
    exact = float(vector @ vector)
    spread = 3 * float(torch.tensor(ours).std()) / 200**0.5
    assert abs(sum(ours) / 200 - exact) < spread
    assert abs(sum(unscaled) / 200 - exact * 10 / 40) < spread * 10 / 40
    assert spread < 0.2 * exact


def test_orthonormal_rows_have_less_error_than_gaussian_ones():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 32, generator=generator).double()
    errors = {}
    for init in ("gaussian", "orthonormal"):
        matrices = [matrix_of(logra(32, 24, Stream(seed, "rows"), init=init)) for seed in range(60)]
        errors[init] = sum(float((m @ one) @ (m @ other) - one @ other) ** 2 for m in matrices)
    assert errors["orthonormal"] < 0.5 * errors["gaussian"]
