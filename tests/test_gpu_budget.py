"""What a card will meet, on a pretended one: nothing mixes devices, nothing adds up in a varying order, few waits."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import vestige
from tests.architectures import VOCABULARY, build
from tests.pretend_gpu import MixedDevices, PretendedCard
from tests.workshop import furnish, write_rows
from vestige.compress import COMPRESSORS, CompressingSink, MaskPart, Wrap, parse_spec, write_masks
from vestige.curvature import CurvatureData, ekfac_of, kfac_of, sample_labels
from vestige.data import NO_TARGET, Batch, Example, TokenizedData, make_batch
from vestige.errors import IndexMismatch
from vestige.gradients import CausalLoss, FunctionObjective, GradientPass, NormSink
from vestige.indexes import Index
from vestige.methods import METHODS
from vestige.models import select_components

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.aten.bmm, "dtype"), reason="The pretended card knows the operations of torch 2.8 and later."
)

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def card():
    with PretendedCard() as card:
        yield card


def tokenized(lengths=(9, 7, 7, 4)) -> TokenizedData:
    """Uneven lengths, masked targets, one example without any."""
    generator = np.random.default_rng(0)
    ids = [generator.integers(1, VOCABULARY, length).astype(np.int32) for length in lengths]
    targets = [np.arange(len(row)) > number for number, row in enumerate(ids)]
    targets[-1][:] = False
    examples = [Example(str(row), row, text="a") for row in range(len(ids))]
    return TokenizedData(examples, ids, targets, np.zeros(len(ids), dtype=bool), "f")


def small(kind, folder: Path) -> str:
    """Return a spec of a registered compressor that is smaller than the layers of the toy."""
    if kind.options.get("file"):
        sides = {"left": 4, "right": 4}
        parts = {
            part.name: {
                side: MaskPart(torch.arange(min(size, length)), length, 1.0)
                for (side, size), length in zip(sides.items(), part.shape, strict=True)
            }
            for part in select_components(build("llama", torch.float32), ("all",)).components
        }
        write_masks(folder / "masks.safetensors", parts)
        return f"{kind.name}:4x4,file={folder / 'masks.safetensors'}"
    return f"{kind.name}:{'4x4' if kind.forms == ('AxB',) else '24'}"


def compressed(spec: str, device: str, card: PretendedCard | None = None, *, layers=None, dtype=torch.float32):
    """Return gradients and losses of a batch, the second that a pass computes; count that one alone."""
    model = build("llama", dtype).eval()
    model = model.to(device)
    components = select_components(model, ("all",)).components[:layers]
    maps = [parse_spec(spec).build(part.name, part.shape, 0, torch.device(device)) for part in components]
    starts = np.cumsum([0, *(one.size for one in maps)]).tolist()
    sink = CompressingSink(maps, starts[:-1], starts[-1])
    with GradientPass(model, components, CausalLoss("mean")) as gradient_pass:
        for _ in range(2):
            batch = make_batch(tokenized(), range(4))
            if card is not None:
                card.reset()
            sink.begin(4, device)
            losses = gradient_pass.run(batch.to(device), sink)
    return sink.gradients.cpu(), losses.cpu()


@pytest.mark.parametrize("name", ["none", *COMPRESSORS.names()])
def test_every_compressor_gives_the_numbers_of_the_cpu_and_waits_as_often_as_it_must(name, card, tmp_path):
    spec = "none" if name == "none" else small(COMPRESSORS.find(name), tmp_path)
    gradients, losses = compressed(spec, "cuda", card)
    assert card.total("atomic") == 0, card.table("atomic")
    # Transformers' check for packed sequences; both results are copied afterwards.
    assert card.total("wait") == 3, card.table("wait")
    assert card.total("wait", "compress") == 0
    assert all("pageable" not in place for place in card.counts["copy"]), card.table("copy")
    expected = compressed(spec, "cpu")
    assert torch.allclose(gradients, expected[0], rtol=1e-4, atol=1e-5)
    # A card takes the logarithm of the softmax in one kernel.
    assert torch.allclose(losses, expected[1], rtol=1e-6, atol=0)


class Bigram(nn.Module):
    """An embedding and a head, as a causal model of transformers."""

    config = None

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(16, 50, bias=False, dtype=dtype)
        nn.init.normal_(self.head.weight)
        self.base_model = nn.Embedding(50, 16, dtype=dtype)
        self.base_model.weight.data = self.head.weight.detach() * 0.8
        self.base_model.register_forward_hook(lambda _module, _inputs, found: SimpleNamespace(last_hidden_state=found))
        forward = self.base_model.forward
        self.base_model.forward = lambda input_ids, use_cache: forward(input_ids)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids, use_cache):
        states = self.base_model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self.head(states))


@pytest.mark.parametrize(("dtype", "rounding", "digits"), [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 0.01, 0.05)])
def test_a_head_on_a_card_starts_few_kernels_and_keeps_the_digits_of_sure_tokens(dtype, rounding, digits, card):
    """Of some tokens the probability is so near 1 that less 1 it would be 0 in bfloat16."""
    model = Bigram(dtype)
    ids = torch.arange(50).view(5, 10)
    labels = torch.cat([torch.full((5, 1), NO_TARGET), ids[:, :-1]], 1)
    exact, head = (side.weight.detach().double().requires_grad_() for side in (model.base_model, model.head))
    losses = torch.nn.functional.cross_entropy(
        exact[ids[:, :-1]].flatten(0, 1) @ head.T, labels[:, 1:].flatten(), reduction="none"
    )
    assert (losses < 1e-3).sum() > 10
    losses.sum().backward()
    losses = losses.detach()
    model.to("cuda")
    model.base_model.weight.requires_grad_()
    loss, batch = CausalLoss(), Batch(torch.arange(5), ids.to("cuda"), labels.to("cuda"))
    assert loss.head_module(model) == "head"
    card.reset()
    found = loss.losses(model, batch)
    assert card.total("launch", "_head") <= 16, card.table("launch")
    assert float(found.detach().sum().cpu()) == pytest.approx(losses.sum().item(), rel=rounding)
    (found,) = torch.autograd.grad(found.sum(), model.base_model.weight)
    sure = ids[:, :-1].flatten()[(losses > 1e-4) & (losses < 1e-3)]
    off = (found.cpu().double() - exact.grad)[sure].norm(dim=1) / exact.grad[sure].norm(dim=1)
    assert len(sure) > 2
    assert float(off.max()) < digits


def test_the_waits_of_a_pass_do_not_grow_with_its_layers(card):
    counts = []
    for layers in (3, None):
        compressed("logra:4x4", "cuda", card, layers=layers)
        counts.append((card.total("wait"), card.total("copy")))
    # The output head is among all layers: the places of its rows are one more copy.
    assert counts[1] == (counts[0][0], counts[0][1] + 1)


@pytest.mark.parametrize(
    ("spec", "tokens", "most"),
    [
        ("tensorsketch:256", 64, 15),
        ("tensorsketch:256", 8, 15),
        ("tensorsketch:1024", 64, 15),
        ("mask:32x32 | sjlt:256", 64, 11),
        ("logra:16x16", 64, 9),
    ],
)
def test_compression_starts_few_kernels_a_layer(spec, tokens, most, card):
    shape, generator = (4096, 1100), torch.Generator().manual_seed(0)
    factors = [torch.randn(2, tokens, size, generator=generator).bfloat16() for size in shape]
    sinks = []
    for device in ("cpu", "cuda"):
        one = parse_spec(spec).build("layer", shape, 0, torch.device(device))
        sinks.append(CompressingSink([one], [0], one.size))
        left, right = (factor.to(device) for factor in factors)
        for _ in range(2):  # signs are brought into the format of the factors once
            sinks[-1].begin(2, device)
            card.reset()
            sinks[-1].accumulate(0, slice(0, 2), sinks[-1].reduce(0, "left", left), sinks[-1].reduce(0, "right", right))
    assert card.total("launch") <= most, card.table("launch")
    assert card.total("atomic") == card.total("wait") == card.total("copy") == 0
    expected, found = (sink.gradients.cpu() for sink in sinks)
    # Sides of halves are rounded to halves on both devices, from sums in another order.
    assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_a_circular_product_is_the_same_by_matrices(card):
    """K of 24 numbers and 9 tokens: a matrix product on a card, transforms on a CPU; so are sums of antidiagonals."""
    shape, generator = (50, 31), torch.Generator().manual_seed(0)
    factors = [torch.randn(3, 9, size, generator=generator, dtype=torch.float64) for size in shape]
    found = []
    for device in ("cpu", "cuda"):
        one = parse_spec("tensorsketch:24").build("layer", shape, 0, torch.device(device))
        left, right = (factor.to(device) for factor in factors)
        found.append(vestige.compress.compress_factors(one, left, right).cpu())
    assert torch.allclose(*found, rtol=1e-12, atol=1e-12)
    square = torch.randn(2, 3, 25, generator=generator)
    assert torch.allclose(Wrap(5).apply(square.to(CARD)).cpu(), Wrap(5).apply(square))
    assert card.total("atomic") == 0


def test_mixing_devices_is_noticed(card, monkeypatch):
    """The control: a map that stays on the CPU."""
    monkeypatch.setattr(vestige.compress.Fold, "to", lambda self, _: self)
    with pytest.raises(MixedDevices):
        compressed("tensorsketch:24", "cuda", card)
    with pytest.raises(TypeError, match="numpy"):
        torch.zeros(2, device="cuda").numpy()


def test_heads_run_in_whole_tiles_on_a_card_and_losses_do_not_change(card, monkeypatch):
    sizes = []
    monkeypatch.setattr(CausalLoss, "logit_bytes", 1)
    model = build("llama", torch.float32).to("cuda")
    batch = make_batch(tokenized((32,) * 12), range(12))
    model.lm_head.register_forward_hook(lambda _, __, output: sizes.append(len(output)))
    chunks = [part for part, _ in CausalLoss().target_logits(model, batch.to("cuda"))]
    assert sizes[-len(chunks) :][0] == 128
    losses = CausalLoss().losses(model, batch.to("cuda")).cpu()
    assert torch.allclose(losses, CausalLoss().losses(build("llama", torch.float32), batch))


def test_the_deterministic_mode_holds_in_a_pass_on_a_card_and_no_longer(card):
    seen = []
    model = build("llama", torch.float32)
    for device in ("cpu", "cuda"):
        model = model.to(device)
        components = select_components(model, ("default",)).components
        hook = model.lm_head.register_forward_pre_hook(lambda *_: None)
        layer = model.model.layers[0].register_forward_hook(
            lambda *_: seen.append((torch.get_deterministic_debug_mode(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        )
        sink = NormSink(components)
        with GradientPass(model, components, CausalLoss()) as gradient_pass:
            sink.begin(4)
            gradient_pass.run(make_batch(tokenized(), range(4)).to(device), sink)
            seen.append((torch.get_deterministic_debug_mode(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        hook.remove()
        layer.remove()
        assert torch.get_deterministic_debug_mode() == 0
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert seen[0] == (0, None)
    assert seen[-1] == seen[-2] == (2, ":4096:8")


class Cumulative(nn.Module):
    """A model with an operation that no card computes in a fixed order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2, bias=False)

    def forward(self, inputs):
        return self.layer(inputs).cumsum(1)


def test_a_model_without_deterministic_kernels_runs_and_the_promise_is_withdrawn(card, capsys):
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model = Cumulative().to(device)
        components = select_components(model, ("all",)).components
        sink = NormSink(components)
        with GradientPass(model, components, FunctionObjective(lambda model, batch: model(batch).sum(1))) as run:
            sink.begin(4)
            run.run(inputs.to(device), sink)
        found.append(sink.finish().cpu())
    assert torch.allclose(*found)
    assert "may differ in their last bits" in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture
def measured():
    def make(device: str, dtype=torch.float32) -> CurvatureData:
        model = build("llama", dtype).to(device)
        return CurvatureData(model, select_components(model, ("default",)).components, tokenized((9, 8, 8, 7, 5)), 16)

    return make


def test_factors_and_eigenvalues_wait_once_a_batch_for_all_layers(measured, card):
    factors = [kfac_of(measured(device)).tensors() for device in ("cpu", "cuda")]
    for name, expected in factors[0].items():
        assert torch.allclose(factors[1][name].cpu(), expected, rtol=1e-4, atol=1e-6), name
    assert card.total("wait", "curvature/_kfac.py") <= len(measured("cpu").groups[0]), card.table("wait")
    found = [ekfac_of(measured(device)).tensors() for device in ("cpu", "cuda")]
    assert all(torch.allclose(found[1][f"{n}.values"].cpu(), found[0][f"{n}.values"], rtol=1e-3) for n in range(3))
    assert card.total("atomic") == 0, card.table("atomic")


def test_products_of_halves_are_added_up_in_float32(measured, card):
    exact = kfac_of(measured("cpu", torch.bfloat16)).tensors()
    found = kfac_of(measured("cuda", torch.bfloat16)).tensors()
    for name, expected in exact.items():
        assert torch.allclose(found[name].cpu(), expected, rtol=1e-5, atol=1e-7), name


def test_labels_are_drawn_by_the_batch_and_as_on_the_cpu(card):
    data = tokenized((20, 19, 12, 12, 8, 3))
    expected = sample_labels(build("llama", torch.float32), data, 64, 0)
    model = build("llama", torch.float32).to("cuda")
    sample_labels(model, data, 64, 0)  # the head is looked for once a loss
    card.reset()
    found = sample_labels(model, data, 64, 0)
    assert all(map(np.array_equal, found, expected))
    # A batch of 60 tokens, one of 24 and the rest: for each its result, and the check for packed sequences.
    assert card.total("wait", "curvature") <= 3, card.table("wait")
    assert card.total("atomic") == 0, card.table("atomic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = furnish(tmp_path_factory.mktemp("card"))
    rows = [
        {"id": "sky", "prompt": "Why is the sky blue?", "completion": "Air scatters blue light."},
        {"id": "paris", "prompt": "Capital of France?", "completion": "It is Paris."},
    ]
    write_rows(folder / "queries.jsonl", rows)
    return folder


def build_index(folder: Path, out: str, **given) -> Index:
    given = {"compress": "tensorsketch:24", "dtype": "float32", "token_budget": 128} | given
    return vestige.index(model=str(folder / "tiny-model"), data=str(folder / "train.jsonl"), out=folder / out, **given)


@pytest.mark.slow
def test_an_index_names_its_card_and_no_shard_of_another_device_joins(folder, card):
    made = build_index(folder, "card", device="cuda")
    assert made.manifest.device == "Pretended Card"
    markers = sorted((folder / "card" / "shards").glob("*.json"))
    assert {json.loads(path.read_text())["device"] for path in markers} == {"Pretended Card"}
    markers[0].unlink()
    with pytest.raises(IndexMismatch, match=r"device\s+Pretended Card\s+cpu.*\nGive another"):
        build_index(folder, "card", device="cpu")
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(IndexMismatch, match=r"device\s+Pretended Card\s+Pretended Card with TF32"):
            build_index(folder, "card", device="cuda")
    finally:
        torch.set_float32_matmul_precision("highest")
    build_index(folder, "card", device="cuda")
    assert markers[0].exists()


@pytest.mark.slow
def test_an_index_of_the_cpu_names_no_device_and_is_scored_on_a_card(folder, card):
    made = build_index(folder, "cpu", device="cpu")
    assert "device" not in json.loads((folder / "cpu" / "manifest.json").read_text())
    assert all("device" not in json.loads(path.read_text()) for path in (folder / "cpu" / "shards").glob("*.json"))
    with pytest.raises(IndexMismatch, match=r"device\s+cpu, or not recorded\s+Pretended Card"):
        build_index(folder, "cpu", device="cuda")
    given = {"index": str(folder / "cpu"), "queries": str(folder / "queries.jsonl")}
    runs = [vestige.attribute(**given, device=one, dense=True, out=folder / f"on-{one}") for one in ("cpu", "cuda")]
    assert made.manifest.device == "cpu"
    assert np.allclose(runs[0].dense_of(0), runs[1].dense_of(0), rtol=1e-3)


@pytest.mark.slow
def test_an_index_waits_twice_a_batch_and_adds_up_in_order(folder, card):
    waits = []
    for limit in (6, 12):
        card.reset()
        # Each example is a batch.
        build_index(folder, f"waits-{limit}", device="cuda", limit=limit, token_budget=1, components=("all",))
        waits.append(card.total("wait"))
        assert card.total("atomic") == 0, card.table("atomic")
    assert waits[1] - waits[0] <= 2 * 6, card.table("wait")


@pytest.fixture(scope="module")
def trained(folder):
    with PretendedCard():
        given = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "device": "cuda"}
        return vestige.train(**given, out=folder / "trained", epochs=2, batch_size=3, checkpoints="0.5,1,2")


FEW_STEPS = {"lissa": {"depth": 2, "sample": 2}, "arnoldi": {"steps": 3, "rank": 2}, "cg": {"steps": 2}}
"""As many as show what a step does: on a pretended card each takes its time."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS.names() if METHODS.find(name).command == "attribute"])
def test_no_method_mixes_devices(name, folder, trained, card, tmp_path):
    method = METHODS.find(name)
    given = {"queries": str(folder / "queries.jsonl"), "method": name, "device": "cuda", "trust": False}
    given["options"] = FEW_STEPS.get(name, {})
    if method.needs_training:
        given["training"] = str(folder / "trained")
    else:
        given["data"] = str(folder / "train.jsonl")
        model = "model" if method.weighting is None else "checkpoints"
        given[model] = str(folder / ("tiny-model" if model == "model" else "trained"))
    run = vestige.attribute(**given, out=tmp_path / "run")
    assert all(np.isfinite(row.score) for query in range(2) for row in run.top(query))
    in_order = (
        "compress",
        *(f"gradients/_{name}" for name in ("pass", "objective", "head", "rule")),
        "curvature/_kfac",
    )
    assert sum(card.total("atomic", files) for files in in_order) == 0, card.table("atomic")


@pytest.mark.slow
def test_a_comparison_of_sketches_and_the_doctor_mix_no_devices(folder, card, tmp_path):
    given = {"model": str(folder / "tiny-model"), "data": str(folder / "train.jsonl"), "device": "cuda"}
    sketches = {"sizes": (16,), "seeds": 1, "compress": ("tensorsketch:K", "mask:2Rx2R | sjlt:K")}
    vestige.evaluate.sketch(**given, **sketches, out=tmp_path / "sketch", num_ref=4)
    assert vestige.doctor(**given)
