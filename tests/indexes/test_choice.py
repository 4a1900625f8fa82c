"""`--compress auto`: what is chosen for which layers, budgets and devices."""

import pytest

import vestige
from tests.workshop import furnish
from vestige.compress import (
    FEWEST,
    MOST_SHARE,
    RATES,
    Candidate,
    Work,
    choose_compressor,
    list_candidates,
    parse_spec,
)

NARROW = [(128, 128)] * 4
MIDDLE = [(576, 576)] * 4 + [(1536, 576)] * 2 + [(576, 1536)]
WIDE = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def _chosen(layers, width, device="cpu"):
    return choose_compressor(list(list_candidates(width)), layers, 128, device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_wide_layers_pay_for_the_most_precise_sketch(device):
    choice = _chosen(WIDE, 4096, device)
    assert str(choice.taken.spec) == "tensorsketch:4096"
    assert choice.passed_over is None
    assert "nothing more precise fits" in choice.reason


def test_a_narrower_tensor_sketch_is_more_precise_than_a_cheap_compressor_of_the_whole_width():
    choice = _chosen(MIDDLE, 4096)
    assert str(choice.taken.spec) == "tensorsketch:1024"
    assert str(choice.passed_over.spec) == "tensorsketch:4096"
    assert "tensorsketch:4096, more precise, would take" in choice.reason


def test_cpu_and_gpu_differ_where_transforms_cost_more_than_gathers():
    assert str(_chosen(MIDDLE, 256, "cpu").taken.spec) == "tensorsketch:256"
    assert str(_chosen(MIDDLE, 256, "cuda").taken.spec) == "mask:32x32 | sjlt:256"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("width", [16, 100, 731, 4096])
@pytest.mark.parametrize("layers", [NARROW, MIDDLE, WIDE], ids=["narrow", "middle", "wide"])
def test_the_choice_is_the_most_precise_affordable_one_or_else_the_cheapest_of_its_size(layers, width, device):
    choice = _chosen(layers, width, device)
    alone = [choose_compressor([one._replace(full=True)], layers, 128, device).taken for one in list_candidates(width)]
    affordable = [one.error for one in alone if one.share <= MOST_SHARE]
    if affordable:
        assert choice.taken.error == min(affordable)
    else:
        whole = [one.share for one, given in zip(alone, list_candidates(width), strict=True) if given.full]
        assert choice.taken.share == min(whole)
        assert "the cheapest of this size" in choice.reason


def test_without_linear_layers_nothing_costs_anything():
    choice = _chosen([], 300)
    assert (str(choice.taken.spec), choice.taken.share) == ("tensorsketch:300", 0.0)


def test_an_unaffordable_precise_compressor_gives_way_to_the_cheapest():
    given = [Candidate(parse_spec(f"tensorsketch:{size}"), size**-0.5, True) for size in (1024, 512)]
    choice = choose_compressor(given, [(64, 64)], 128, "cpu")
    assert str(choice.taken.spec) == "tensorsketch:512"
    assert choice.taken.share > MOST_SHARE


def test_transforms_have_lengths_that_are_fast():
    for width, size in {16: 16, 17: 16, 731: 729, 4093: 4050, 4096: 4096}.items():
        assert str(next(list_candidates(width)).spec) == f"tensorsketch:{size}"
    assert all(one.spec.size_for((4096, 4096)) >= FEWEST for one in list_candidates(16))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("workshop") / "w")


def _index(workshop, out, **given):
    settings = {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl"), "components": ("mlp",)}
    return vestige.index(**settings, out=out, compress="auto", **given)


def test_the_choice_is_announced_with_its_reason_and_stays_in_the_budget(workshop, tmp_path, capfd):
    index = _index(workshop, tmp_path / "idx", disk="20KB")
    said = capfd.readouterr()
    told = " ".join((said.out + said.err).split())
    assert f"--compress auto: {index.manifest.compression.spec} takes" in told
    assert "forward and backward passes of the same layers (cpu)" in told
    assert index.manifest.data.examples * index.manifest.width * 2 <= 20 * 1024


@pytest.mark.slow
def test_a_begun_index_goes_on_with_its_choice_where_another_device_would_choose_otherwise(
    workshop, tmp_path, monkeypatch, capfd
):
    first = _index(workshop, tmp_path / "idx", disk="40KB").manifest.compression.spec
    monkeypatch.setitem(RATES, "cpu", Work(products=1))
    elsewhere = _index(workshop, tmp_path / "new", disk="40KB").manifest.compression.spec
    assert elsewhere != first
    capfd.readouterr()
    assert _index(workshop, tmp_path / "idx", disk="40KB").manifest.compression.spec == first
    said = capfd.readouterr()
    assert "The index was begun with it." in said.out + said.err
