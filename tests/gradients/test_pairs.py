"""Exact products over the table of architectures equal autograd, one example at a time, on every route."""

import functools

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.architectures import EXACT, VOCABULARY, Sequences, build, move_off_start, sequences
from tests.gradients import test_encoders as encoders, test_layers as layers
from tests.reference.gradients import example_gradients, loop_gradients
from tests.reference.products import gram_by_parameter
from vestige.errors import DataError
from vestige.gradients import (
    CausalLoss,
    DotSink,
    FunctionObjective,
    GradientPass,
    KeepingSink,
    NormSink,
    Objective,
    _cross as cross,
    pairwise_products,
)
from vestige.models import Component, select_components

BATCHES = [[0, 1, 2], [3, 4, 5], [6]]
ROUTES = ["ghost", "second", "first", None]


@functools.cache
def reference(name: str) -> list[dict[str, Tensor]]:
    """Gradients of the seven sequences by `torch.func`, alone and unpadded."""
    model, data = build(name), sequences()
    return [example_gradients(model, ids, targets) for ids, targets in zip(data.ids, data.targets, strict=True)]


def by_parameter(components: tuple[Component, ...], products: Tensor) -> dict[str, Tensor]:
    """Experts of one parameter summed."""
    found: dict[str, Tensor] = {}
    for component, product in zip(components, products, strict=True):
        name = component.name.partition("[")[0]
        found[name] = found[name] + product if name in found else product
    return found


def check(components: tuple[Component, ...], products: Tensor, expected: dict[str, Tensor]) -> None:
    """Every parameter within 1e-9 of the largest product of all."""
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, product in by_parameter(components, products).items():
        assert float((product - expected[name]).abs().max()) <= 1e-9 * scale, name


def take(monkeypatch: pytest.MonkeyPatch, route: str | None) -> None:
    if route is not None:
        monkeypatch.setattr(cross, "cheapest_route", lambda *_, **__: route)
        monkeypatch.setattr(cross, "own_ghost_is_cheaper", lambda *_: route == "ghost")


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", EXACT)
def test_train_by_train_equals_torch_func(name: str, route: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    model, data = build(name), sequences()
    components = select_components(model, ("all",)).components
    batches = [data.batch(rows) for rows in BATCHES]
    products = pairwise_products(model, components, CausalLoss(), batches, by_component=True)
    check(components, products, gram_by_parameter(reference(name), reference(name)))
    whole = pairwise_products(model, components, CausalLoss(), batches)
    assert torch.allclose(whole, products.sum(0), rtol=1e-12)


def dots_and_norms(
    model: nn.Module,
    components: tuple[Component, ...],
    data: Sequences,
    train: list[list[int]],
    queries: list[int],
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    """`[component, row, query]` and `[component, row]`, queries held as factors."""
    keeping, norms = KeepingSink(components), NormSink(components)
    rows = []
    with GradientPass(model, components, CausalLoss(reduction)) as gradient_pass:
        keeping.begin(len(queries))
        gradient_pass.run(data.batch(queries), keeping)
        dots = DotSink(keeping.finish(), batches=len(train))
        for batch in train:
            dots.begin(len(batch))
            norms.begin(len(batch))
            gradient_pass.run(data.batch(batch), dots)
            gradient_pass.run(data.batch(batch), norms)
            rows.append((dots.scores.transpose(1, 2), norms.finish()))
    return torch.cat([row[0] for row in rows], 1), torch.cat([row[1] for row in rows], 1)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", EXACT)
def test_train_by_query_and_norms_equal_torch_func(
    name: str, route: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(monkeypatch, route)
    model, data = build(name), sequences()
    components = select_components(model, ("all",)).components
    products, squared = dots_and_norms(model, components, data, BATCHES[:2], [6, 1, 3, 4])
    gradients = reference(name)
    check(components, products, gram_by_parameter(gradients[:6], [gradients[row] for row in (6, 1, 3, 4)]))
    own = {name: gram.diagonal() for name, gram in gram_by_parameter(gradients[:6], gradients[:6]).items()}
    check(components, squared, own)


@pytest.mark.slow
@pytest.mark.parametrize("memory_bytes", [1, 60_000, 2**30])
def test_products_do_not_depend_on_the_memory_or_the_batches(memory_bytes: int) -> None:
    model, data = build("gpt2"), sequences()
    components = select_components(model, ("all",)).components
    expected = gram_by_parameter(reference("gpt2"), reference("gpt2"))
    for first, second in [(BATCHES, None), (BATCHES, [[0, 1, 2, 3, 4, 5, 6]]), ([[n] for n in range(7)], BATCHES)]:
        batches = [data.batch(rows) for rows in first]
        others = None if second is None else [data.batch(rows) for rows in second]
        products = pairwise_products(
            model, components, CausalLoss(), batches, others, by_component=True, memory_bytes=memory_bytes
        )
        check(components, products, expected)


@pytest.mark.slow
def test_a_head_in_chunks_and_tied_to_the_embedding_is_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two positions cut through examples: every piece meets every other, in every route."""
    monkeypatch.setattr(CausalLoss, "logit_bytes", 4 * VOCABULARY * 2)
    model, data = build("gpt2"), sequences()
    components = select_components(model, ("all",)).components
    expected = gram_by_parameter(reference("gpt2"), reference("gpt2"))
    for route in ROUTES:
        with monkeypatch.context() as patch:
            take(patch, route)
            batches = [data.batch(rows) for rows in BATCHES]
            products = pairwise_products(model, components, CausalLoss(), batches, by_component=True)
            check(components, products, expected)
            squared = dots_and_norms(model, components, data, BATCHES, [0])[1]
            check(components, squared, {name: gram.diagonal() for name, gram in expected.items()})


def test_no_batch_is_an_error() -> None:
    model = build("gpt2")
    with pytest.raises(DataError, match="one side has no batch"):
        pairwise_products(model, select_components(model, ("all",)).components, CausalLoss(), [])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", layers.MODELS)
def test_convolutions_and_classifiers(name: str, route: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    model, images, labels = layers.build(name, examples=5)
    alone = [(images[row : row + 1], labels[row : row + 1]) for row in range(5)]
    gradients = loop_gradients(model, layers.losses, alone)
    components = select_components(model, ("all",)).components
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    products = pairwise_products(model, components, FunctionObjective(layers.losses), batches, by_component=True)
    check(components, products, gram_by_parameter(gradients, gradients))


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", encoders.MODELS)
def test_encoders_and_encoder_decoders(name: str, route: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, route)
    model, objective = encoders.build(name)
    assert isinstance(objective, Objective)
    gradients = loop_gradients(model, objective.losses, [encoders.batch_of(name, [row]) for row in range(5)])
    components = select_components(model, ("all",)).components
    batches = [encoders.batch_of(name, rows, 3) for rows in ([0, 1, 2], [3, 4])]
    products = pairwise_products(model, components, objective, batches, by_component=True)
    check(components, products, gram_by_parameter(gradients, gradients))


def test_trap_conv1d_of_gpt2_with_four_query_examples_has_no_cross_terms() -> None:
    """B4.1: summing the queries' activations and output gradients separately mixes them; here they stay apart."""
    model, data = build("gpt2"), sequences()
    components = select_components(model, ("transformer.h.*.c_*.weight",)).components
    assert all(component.uses[0].kind == "conv1d" for component in components)
    queries = [1, 3, 4, 6]
    products, _ = dots_and_norms(model, components, data, [[0, 2, 5]], queries)
    gradients = reference("gpt2")
    expected = gram_by_parameter([gradients[row] for row in (0, 2, 5)], [gradients[row] for row in queries])
    check(components, products, expected)
    keeping = KeepingSink(components)
    with GradientPass(model, components, CausalLoss()) as gradient_pass:
        keeping.begin(4)
        gradient_pass.run(data.batch(queries), keeping)
    for component, gradient in zip(components, keeping.finish(), strict=True):
        (piece,) = gradient.pieces
        mixed = torch.einsum("to,ti->oi", piece.left.sum(0), piece.right.sum(0))
        true = torch.stack([gradients[row][component.name].T for row in queries]).sum(0)
        assert float((mixed - true).norm() / true.norm()) > 0.5, "the trap would not show on this model"


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "opt"])
def test_trap_tied_embeddings_keep_both_uses_and_their_cross_terms(name: str) -> None:
    """B4.2: the head's use and the embedding's are one gradient; without cross terms the products would be off."""
    model, data = build(name), sequences()
    tied = [part for part in select_components(model, ("all",)).components if len(part.uses) > 1]
    (component,) = tied
    products, _ = dots_and_norms(model, (component,), data, BATCHES, list(range(7)))
    expected = gram_by_parameter(reference(name), reference(name))[component.name]
    assert float((products[0] - expected).abs().max()) <= 1e-9 * float(expected.abs().max())
    keeping = KeepingSink((component,))
    with GradientPass(model, (component,), CausalLoss()) as gradient_pass:
        keeping.begin(7)
        gradient_pass.run(data.batch(list(range(7))), keeping)
    (gradients,) = keeping.finish()
    assert len(gradients.pieces) == 2
    apart = torch.stack([cross.cross_products(piece.pair, piece.pair) for piece in gradients.pieces]).sum(0)
    assert float((apart - expected).norm() / expected.norm()) > 0.01


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_trap_unequal_label_masks_and_padding_rescale_nothing(reduction: str) -> None:
    """B4.3: one target beside many, short beside long: each product is that of the two examples alone."""
    model, data = build("llama"), sequences()
    data.targets[2][:-1] = False
    gradients = [
        example_gradients(model, ids, targets, reduction == "mean")
        for ids, targets in zip(data.ids, data.targets, strict=True)
    ]
    components = select_components(model, ("all",)).components
    for train in (BATCHES, [list(range(7))]):
        products, _ = dots_and_norms(model, components, data, train, [2, 1, 6, 3], reduction)
        check(components, products, gram_by_parameter(gradients, [gradients[row] for row in (2, 1, 6, 3)]))


def test_trap_block_1_is_not_block_10_in_the_products() -> None:
    """B4.5: the products of block 1 are its own; twelve blocks keep their order."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=4, n_layer=12, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model, data = move_off_start(GPT2LMHeadModel(config)).eval().double(), sequences(3)
    components = select_components(model, ("transformer.h.1.*",)).components
    assert {part.name.split(".")[2] for part in components} == {"1"}
    gradients = [example_gradients(model, ids, mask) for ids, mask in zip(data.ids, data.targets, strict=True)]
    batches = [data.batch([0, 1, 2])]
    check(
        components,
        pairwise_products(model, components, CausalLoss(), batches, by_component=True),
        gram_by_parameter(gradients, gradients),
    )
    blocks = [int(part.name.split(".")[2]) for part in select_components(model, ("transformer.h.*",)).components]
    assert blocks == sorted(blocks)
    # A whole part of the name, so block 1 without 10 and 11.
    assert select_components(model, ("transformer.h.1",)).components == components


def test_trap_rms_norms_and_grouped_queries_of_a_llama_have_products() -> None:
    """B4.7: four query heads share two key heads; every norm has a scale of its own."""
    model, data = build("llama"), sequences()
    components = select_components(model, ("norm", "*.k_proj.weight", "*.v_proj.weight")).components
    assert len(components) == 5 + 4
    products, squared = dots_and_norms(model, components, data, BATCHES, [0, 3])
    gradients = reference("llama")
    check(components, products, gram_by_parameter(gradients, [gradients[0], gradients[3]]))
    assert bool((squared > 0).all())
