"""Ten minutes on a lent GPU: does Vestige give the same there, does it repeat, how fast is it, and what fits.

    python benchmarks/gpu.py --out gpu-run [--only repeat small] [--dry-run]

Eight parts, each a process of its own with a time limit: what one has measured is in OUT/PART.json at once, also when
it is stopped. A part that is done is not done again, so the same command continues; delete its file to repeat it. The
last part writes OUT/gpu.json and prints one table. Models are random weights drawn here, data random tokens: nothing is
fetched. `--dry-run` goes through everything in toy sizes, on the CPU where there is no GPU; its figures mean nothing.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VESTIGE_QUIET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import vestige
from vestige.compress import compress_gradient, list_compressors, parse_spec
from vestige.curvature import CurvatureData, ekfac_of, kfac_of, sample_labels
from vestige.data import Example, TokenizedData, make_batch
from vestige.gradients import CausalLoss, GradientPass, KeepingSink, card_memory, measure_batch_memory
from vestige.indexes import CompressedGradients, lay_out
from vestige.models import LoadedModel, load_model, select_components

PARTS = {"maps": 40, "agreement": 130, "repeat": 80, "small": 100, "large": 120, "kernels": 50, "curvature": 70}
"""Seconds that a part may take, its imports included; with the table, which takes none, they are eight."""
SPECS = ("tensorsketch:256", "mask:32x32 | sjlt:256", "logra:16x16", "fjlt:16x16")


class Sizes(NamedTuple):
    """What a part works on."""

    small: dict[str, int]
    large: dict[str, int]
    budgets: tuple[int, ...]
    large_tokens: int
    examples: int
    length: int
    rows: int
    widths: tuple[int, ...]
    sketches: tuple[int, ...]
    seconds: float
    """How long a measurement is repeated."""


def shape_of(width: int, inner: int, *, layers: int, vocabulary: int, heads: int) -> dict[str, int]:
    """Return the sizes of a Llama; a quarter as many heads have keys and values of their own."""
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    return sizes | {"num_attention_heads": heads, "num_key_value_heads": max(heads // 4, 1)}


REAL = Sizes(
    small=shape_of(768, 3072, layers=12, vocabulary=50_304, heads=12),
    large=shape_of(4096, 14_336, layers=4, vocabulary=128_256, heads=32),
    budgets=(4096, 16_384, 65_536),
    large_tokens=16_384,
    examples=512,
    length=512,
    rows=16_384,
    widths=(768, 4096, 14_336),
    sketches=(256, 4096),
    seconds=1.0,
)
TOY = Sizes(
    small=shape_of(64, 96, layers=2, vocabulary=128, heads=2),
    large=shape_of(64, 128, layers=2, vocabulary=256, heads=2),
    budgets=(64, 128),
    large_tokens=128,
    examples=8,
    length=16,
    rows=32,
    widths=(64, 128),
    sketches=(16, 64),
    seconds=0.0,
)


class Note:
    """The measurements of one part, on the disk as soon as they are made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.content: dict[str, Any] = {"done": False}

    def __setitem__(self, name: str, value: Any) -> None:
        self.content[name] = value
        unfinished = self._path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self._path)


class Bench(NamedTuple):
    """Where and on what a part runs."""

    device: torch.device
    sizes: Sizes
    folder: Path
    note: Note


def build(shape: dict[str, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of this shape with random weights, made on the device."""
    config = LlamaConfig(
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **shape,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval().requires_grad_(False)


def draw(examples: int, length: int, vocabulary: int, *, uneven: bool = False, seed: int = 0) -> TokenizedData:
    """Return random tokens; uneven ones are a quarter to all of the length, and the first third carries no label."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(max(length // 4, 4), length + 1, examples) if uneven else [length] * examples
    ids = [generator.integers(1, vocabulary, size, dtype=np.int32) for size in lengths]
    targets = [np.arange(len(one)) >= (len(one) // 3 if uneven else 1) for one in ids]
    rows = [Example(f"row-{number}", number, text="") for number in range(examples)]
    return TokenizedData(rows, ids, targets, np.zeros(examples, dtype=bool), f"drawn {seed}")


def rows_of(data: TokenizedData) -> list[dict[str, Any]]:
    """Return the same data as rows that every command takes."""
    return [
        {"id": one.id, "input_ids": ids.tolist(), "labels": np.where(mask, ids, -100).tolist()}
        for one, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True)
    ]


def wait(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Return the seconds of one call, without its first: the mean over at least this time."""
    work()
    wait(device)
    calls, started = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - started < seconds:
        work()
        wait(device)
        calls += 1
    return (time.perf_counter() - started) / calls


@contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Put into the list how many bytes the block held beyond what was held before; nothing where no GPU is."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield found
    if device.type == "cuda":
        wait(device)
        found.append(torch.cuda.max_memory_allocated(device) - before)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest value."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def maps(bench: Bench) -> None:
    """Is the randomness the same: every compressor's matrix, from one-hot gradients, by its bytes on CPU and GPU."""
    shape = (12, 8)
    one_hot = torch.eye(shape[0] * shape[1]).view(-1, *shape)
    specs = ("mask:24", "mask:4x3", "gauss:16", "rademacher:16", "sjlt:16", "fjlt:4x4", "logra:4x4", "tensorsketch:16")
    bench.note["compressors"] = sorted(list_compressors())
    found = {}
    for text in (*specs, "mask:4x3 | sjlt:8"):
        cpu, card = (
            compress_gradient(parse_spec(text).build("layer", shape, 7, place), one_hot.to(place)).cpu()
            for place in (torch.device("cpu"), bench.device)
        )
        digest = hashlib.sha256(cpu.contiguous().numpy().tobytes()).hexdigest()[:16]
        found[text] = {"sha256": digest, "same bytes": torch.equal(cpu, card), "relative": relative(card, cpu)}
        bench.note["maps"] = found


def agreement(bench: Bench) -> None:
    """Do toy models give on the GPU what they give on the CPU, in float32: every compressor and every method."""
    shape = TOY.small
    train, asked = draw(8, 16, shape["vocab_size"], uneven=True), draw(2, 8, shape["vocab_size"], seed=1)
    places = (torch.device("cpu"), bench.device)
    models = [build(shape, torch.float32, torch.device("cpu")).to(place) for place in places]
    found: dict[str, Any] = {}
    for spec in (*SPECS, "none", "gauss:32", "sjlt:64"):
        pair = [compress(load_model(model), spec, train, 256)[0] for model in models]
        found[spec] = relative(pair[1], pair[0])
        bench.note["compressors"] = found
    rows, questions, trained = rows_of(train), rows_of(asked), bench.folder / "trained"
    # A replay reads model and data again, from where the training found them.
    toy, data = bench.folder / "toy", bench.folder / "train.jsonl"
    build(shape, torch.float32, torch.device("cpu")).save_pretrained(toy)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    methods: dict[str, Any] = {}
    settings = {"model": str(toy), "data": data, "device": str(bench.device), "checkpoints": "0,1"}
    try:
        if not trained.exists():
            vestige.train(out=trained, epochs=1, batch_size=4, seed=0, **settings)
        methods["train"] = "ran"
    except Exception as error:
        methods["train"] = f"{type(error).__name__}: {error}"[:300]
    scored = {name: {} for name in ("influence", "grad-dot", "grad-cos", "ekfac", "kfac", "datainf", "cg", "lissa")}
    scored |= {name: {} for name in ("arnoldi", "trak", "rep-sim", "activation-dot")}
    scored |= {"grad-dot, tokens": {"tokens": True}}
    given: list[dict[str, Any]] = [{"model": model, "data": rows} for model in models]
    for name, more in scored.items():
        methods[name] = compare_method(bench, given, questions, name, more)
        bench.note["methods"] = methods
    # Replayed elsewhere, a training has other weights, which is refused: both times it is the GPU.
    given = [{"training": trained, "device": str(bench.device)}] * 2
    methods["replay, twice"] = compare_method(bench, given, questions, "replay", {})
    given = [{"checkpoints": trained, "data": rows, "device": str(place)} for place in places]
    for name in ("tracin", "less"):
        methods[name] = compare_method(bench, given, questions, name, {})
        bench.note["methods"] = methods


def compare_method(
    bench: Bench, given: list[dict[str, Any]], questions: list[Any], name: str, more: dict[str, Any]
) -> float | str:
    """Return how far the scores of a method on the GPU are from those on the CPU, or why there are none."""
    found = []
    # Without a GPU both sides are this CPU.
    for number, sources in enumerate(given if bench.device.type == "cuda" else given[:1]):
        out = bench.folder / f"run-{name.replace(', ', '-')}-{number}"
        settings = {"queries": questions, "method": name.split(",")[0], "out": out, "trust": False, "dense": True}
        try:
            if not out.exists():
                vestige.attribute(**sources, **settings, **more)
            found.append(torch.as_tensor(np.asarray(vestige.Scores.open(out).dense())))
        except Exception as error:
            return f"on {'the GPU' if number else 'the CPU'}: {type(error).__name__}: {error}"[:300]
    return relative(found[-1], found[0])


def compress(loaded: LoadedModel, spec: str, data: TokenizedData, tokens: int) -> tuple[Tensor, Tensor]:
    """Return compressed gradients and losses of all examples, in batches of this many tokens."""
    with open_gradients(loaded, spec) as compute:
        content = compute.rows(data, batches_of(data, tokens))
    return content.gradients, content.loss


def open_gradients(loaded: LoadedModel, spec: str) -> CompressedGradients:
    """Return what computes compressed gradients of the linear maps of the blocks."""
    components = select_components(loaded.model, ("attention", "mlp")).components
    parsed = parse_spec(spec)
    return CompressedGradients(loaded, components, lay_out(components, parsed), parsed, 0, "sum")


def batches_of(data: TokenizedData, tokens: int) -> list[np.ndarray]:
    """Return consecutive rows, this many tokens at once."""
    step = max(tokens // int(data.lengths.max()), 1)
    return [np.arange(start, min(start + step, len(data))) for start in range(0, len(data), step)]


def repeat(bench: Bench) -> None:
    """Does the same command leave the same bytes twice, in bfloat16 and float32, with and without determinism."""
    sizes = bench.sizes
    data = draw(max(sizes.examples // 8, 4), sizes.length, sizes.small["vocab_size"], uneven=True)
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = build(sizes.small, dtype, bench.device)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            name = f"{str(dtype).removeprefix('torch.')}{', deterministic' if deterministic else ''}"
            runs, seconds = [], []
            for number in range(2):
                out = bench.folder / f"index-{name.replace(', ', '-')}-{number}"
                started = time.perf_counter()
                vestige.index(model=model, data=rows_of(data), out=out, overwrite=True, components=("attention", "mlp"))
                seconds.append(time.perf_counter() - started)
                runs.append(vestige.Index.open(out))
            gradients = [run.gradients_of(np.arange(run.rows)) for run in runs]
            losses = [run.losses_and_norms()[0] for run in runs]
            found[name] = {
                "same bytes": runs[0].fingerprint == runs[1].fingerprint,
                "same gradients": torch.equal(*gradients),
                "same losses": torch.equal(*losses),
                "relative": relative(gradients[1], gradients[0]),
                "seconds": seconds,
            }
            bench.note["runs"] = found
    torch.use_deterministic_algorithms(False)


def throughput(bench: Bench, model: LlamaForCausalLM, data: TokenizedData, tokens: int, specs: Any) -> dict[str, Any]:
    """Return tokens a second, and the most memory, of frozen forward and backward passes and of each compressor."""
    loaded, batch = load_model(model), batches_of(data, tokens)[0]
    count, found = len(batch) * int(data.lengths.max()), {}
    components = select_components(model, ("attention", "mlp")).components[:1]
    inputs = make_batch(data, batch).to(bench.device)

    def frozen() -> None:
        # The lowest map alone gets a gradient: everything above it is differentiated, as for an index.
        sink = KeepingSink(components)
        sink.begin(len(batch))
        bare.run(inputs, sink)

    with GradientPass(model, components, CausalLoss()) as bare, peak_of(bench.device) as peak:
        seconds = clock(frozen, bench.device, bench.sizes.seconds)
    found["frozen"] = {"tokens a second": count / seconds, "bytes": peak}
    for spec in specs:
        with open_gradients(loaded, spec) as compute, peak_of(bench.device) as peak:
            seconds = clock(lambda: compute.rows(data, [batch]), bench.device, bench.sizes.seconds)
        found[spec] = {"tokens a second": count / seconds, "bytes": peak}
    return found


def attempt(work: Callable[[], Any]) -> Any:
    """Return what the work returns, or that the memory was too small for it."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        return f"out of memory: {str(error).splitlines()[0]}"[:200]


def small(bench: Bench) -> None:
    """How fast is a model of 160M: frozen passes and every compressor, then where three batches take their time."""
    sizes = bench.sizes
    model = build(sizes.small, torch.bfloat16, bench.device)
    data = draw(sizes.examples, sizes.length, sizes.small["vocab_size"])
    found: dict[str, Any] = {}
    for tokens in sizes.budgets:
        found[str(tokens)] = attempt(lambda: throughput(bench, model, data, tokens, SPECS))  # noqa: B023
        bench.note["throughput"] = found
    note_estimate(bench, model)
    budget, profiles = sizes.budgets[min(1, len(sizes.budgets) - 1)], {}
    for spec in SPECS[:2]:
        profiles[spec] = profile(bench, load_model(model), data, spec, budget)
        bench.note["profiles of three batches"] = profiles


def profile(bench: Bench, loaded: LoadedModel, data: TokenizedData, spec: str, tokens: int) -> dict[str, Any]:
    """Return launches, busy and idle time of three batches, and the kernels that take longest."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    batches = (batches_of(data, tokens) * 3)[:3]
    with open_gradients(loaded, spec) as compute:
        compute.rows(data, batches[:1])
        wait(bench.device)
        started = time.perf_counter()
        with torch.profiler.profile(activities=kinds) as taken:
            compute.rows(data, batches)
            wait(bench.device)
        seconds = time.perf_counter() - started
    events = taken.key_averages()
    times = sorted(((float(getattr(one, "self_device_time_total", 0.0)), one.key) for one in events), reverse=True)
    launches = sum(one.count for one in events if "LaunchKernel" in one.key)
    busy = sum(value for value, _ in times) / 1e6
    longest = [[key[:80], value / 1e6] for value, key in times[:12]]
    return {"seconds": seconds, "launches": launches, "busy seconds": busy, "longest": longest}


def note_estimate(bench: Bench, model: LlamaForCausalLM) -> None:
    """Write down what the probe estimates, and what the budget would be, beside what the part measures."""
    memory, card = measure_batch_memory(model), card_memory(model)
    record: dict[str, Any] = memory._asdict()
    if card is not None:
        record |= {"free": card.free, "total": card.total, "budget": memory.tokens_within(card.total)}
    bench.note["estimate"] = record


def large(bench: Bench) -> None:
    """How fast are four layers of 8B, how much memory does a layer take, and what do larger chunks of logits bring."""
    sizes, found = bench.sizes, {}
    model = build(sizes.large, torch.bfloat16, bench.device)
    data = draw(max(sizes.large_tokens // sizes.length, 1), sizes.length, sizes.large["vocab_size"])
    note_estimate(bench, model)
    found["as it is"] = attempt(lambda: throughput(bench, model, data, sizes.large_tokens, SPECS[:3]))
    bench.note["throughput"] = found
    chunk = CausalLoss.logit_bytes
    for size in (64 * 2**20, 2**30):
        CausalLoss.logit_bytes = size
        name = f"logits of {size // 2**20} MiB"
        found[name] = attempt(lambda: throughput(bench, model, data, sizes.large_tokens, SPECS[:1]))
        bench.note["throughput"] = found
    CausalLoss.logit_bytes = chunk
    peaks = {}
    for layers in (1, sizes.large["num_hidden_layers"]):
        del model
        model = build(sizes.large | {"num_hidden_layers": layers}, torch.bfloat16, bench.device)
        with open_gradients(load_model(model), SPECS[0]) as compute, peak_of(bench.device) as peak:
            attempt(lambda: compute.rows(data, batches_of(data, sizes.large_tokens)[:1]))
        peaks[str(layers)] = peak
        bench.note["bytes of a batch, by layers"] = peaks
    if all(peaks.values()):
        (one,), (several,) = peaks.values()
        layer = (several - one) / (sizes.large["num_hidden_layers"] - 1)
        bench.note["bytes of a layer for a token"] = layer / sizes.large_tokens
        bench.note["bytes of a batch of 32 layers"] = one + 31 * layer


def kernels(bench: Bench) -> None:
    """What single steps take: the rates that the cost model of `--compress auto` needs."""
    sizes, device, found = bench.sizes, bench.device, {}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)

    def note(name: str, numbers: int, work: Callable[[], Any]) -> None:
        seconds = attempt(lambda: clock(work, device, sizes.seconds / 4))
        rate = seconds if isinstance(seconds, str) else numbers / seconds
        found[name] = {"seconds": seconds, "numbers a second": rate}
        bench.note["kernels"] = found

    for width in sizes.widths:
        values = torch.randn(sizes.rows, width, generator=generator).to(device, dtype)
        signs = (torch.randint(0, 2, (width,), generator=generator) * 2 - 1).to(device, dtype)
        chosen = torch.randperm(width, generator=generator)[: max(width // 16, 1)].to(device)
        size = sizes.sketches[0]
        whole = width // size * size
        note(f"copy to float32, {width}", values.numel(), values.float)
        note(f"fold by addcmul, {width}", values.numel(), lambda: fold(values, signs, size))  # noqa: B023
        if whole:
            shaped, signed = values[:, :whole].unflatten(1, (-1, size)), signs[:whole].view(-1, size)
            note(f"fold by a sum, {width}", values.numel(), lambda: (shaped * signed).sum(1, dtype=torch.float32))  # noqa: B023
        note(f"index_select of a sixteenth, {width}", values.numel(), lambda: values.index_select(1, chosen))  # noqa: B023
        table = torch.randn(width, size, generator=generator).to(device)
        ids = torch.randint(0, width, (sizes.rows, 2), generator=generator).to(device)
        note(f"embedding_bag, {width}", ids.numel() * size, lambda: torch.nn.functional.embedding_bag(ids, table))  # noqa: B023
    for size in sizes.sketches:
        values = torch.randn(sizes.rows, size, generator=generator).to(device)
        note(f"rfft of {size}", values.numel(), lambda: torch.fft.rfft(values))  # noqa: B023
    size = sizes.sketches[0]
    left = torch.randn(max(sizes.rows // sizes.length, 1), sizes.length, size, generator=generator).to(device)
    note(f"bmm of both sketches, {size}", left.numel() * size, lambda: left.transpose(1, 2) @ left)
    note(f"bmm and skewed sum, {size}", left.numel() * size, lambda: skew(left.transpose(1, 2) @ left))
    logits = torch.randn(128, sizes.large["vocab_size"], generator=generator).to(device, dtype)
    for name, work in (("in steps", softmax_in_steps), ("by one kernel", softmax_at_once)):
        note(f"softmax {name}", logits.numel(), lambda: work(logits))  # noqa: B023


def softmax_in_steps(logits: Tensor) -> Tensor:
    """Return the softmax of logits in their format, each step on its own, as a loss on a CPU takes them."""
    wide = logits.float()
    chances = wide.sub_(wide.amax(1, keepdim=True)).exp_()
    return chances.mul_(1 / chances.sum(1, keepdim=True)).to(logits.dtype)


def softmax_at_once(logits: Tensor) -> Tensor:
    """Return the same by PyTorch's own kernel, as a loss on a card takes it."""
    chances = torch.log_softmax(logits, 1, dtype=torch.float32)
    return torch.mul(chances.exp_(), 1.0, out=torch.empty_like(logits))


def fold(values: Tensor, signs: Tensor, size: int) -> Tensor:
    """Add up signed numbers, `size` coordinates at a time."""
    values, signs = values.float(), signs.float()
    total = torch.zeros(len(values), size, device=values.device)
    for start in range(0, values.shape[1], size):
        part = slice(start, min(start + size, values.shape[1]))
        total[:, : part.stop - start].addcmul_(values[:, part], signs[part])
    return total


def skew(products: Tensor) -> Tensor:
    """Return the sums over wrapped antidiagonals of square matrices."""
    size = products.shape[1]
    twice = torch.cat([products, products], 2).contiguous()
    return twice.as_strided((len(products), size, size), (2 * size * size, 2 * size - 1, 1), size).sum(1)


def curvature(bench: Bench) -> None:
    """How long do two layers of EK-FAC take, in float32, with TF32 and in bfloat16, and the drawing of labels alone."""
    sizes, found = bench.sizes, {}
    shape = sizes.large | {"num_hidden_layers": 2}
    data = draw(max(sizes.large_tokens // sizes.length // 2, 1), sizes.length, shape["vocab_size"])
    tokens = int(data.lengths.sum())
    kinds = {"bfloat16": (torch.bfloat16, False), "float32": (torch.float32, False), "TF32": (torch.float32, True)}
    for name, (dtype, tf32) in kinds.items():
        model = build(shape, dtype, bench.device)
        torch.backends.cuda.matmul.allow_tf32 = tf32
        started = time.perf_counter()
        drawn = attempt(lambda: sample_labels(model, data, sizes.large_tokens, 0))  # noqa: B023
        wait(bench.device)
        found[name] = {"labels, seconds": drawn if isinstance(drawn, str) else time.perf_counter() - started}
        # Eigenvectors of the widest maps would take minutes, so EK-FAC is measured on the narrower ones.
        for what, fit, maps in (
            ("factors of the MLPs", kfac_of, "mlp"),
            ("EK-FAC of attention", ekfac_of, "attention"),
        ):
            components = select_components(model, (maps,)).components
            measured = CurvatureData(model, components, data, sizes.large_tokens)
            started = time.perf_counter()
            fitted = attempt(lambda: fit(measured))  # noqa: B023
            wait(bench.device)
            seconds = time.perf_counter() - started
            found[name][f"{what}, tokens a second"] = fitted if isinstance(fitted, str) else tokens / seconds
            bench.note["ekfac"] = found
        del model
    torch.backends.cuda.matmul.allow_tf32 = False


def machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures were measured on."""
    about: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        about["memory"] = torch.cuda.get_device_properties(device).total_memory
        query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        about["nvidia-smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return about


def report(folder: Path) -> int:
    """Write one JSON of all parts, print the table, and return how many parts are not whole."""
    parts = {name: json.loads(path.read_text()) for name in PARTS if (path := folder / f"{name}.json").exists()}
    (folder / "gpu.json").write_text(json.dumps(parts, indent=1) + "\n")
    print("| part | measurement | value |\n| :-- | :-- | --: |")
    for name, content in parts.items():
        for line in flatten(content):
            print(f"| {name} | {line[0]} | {line[1]} |")
    missing = [name for name in PARTS if not parts.get(name, {}).get("done")]
    print(f"\n{len(PARTS) - len(missing)} of {len(PARTS)} parts are done; all figures are in {folder / 'gpu.json'}.")
    if missing:
        print(f"Not done, or stopped: {', '.join(missing)}. The same command continues with them.")
    return len(missing)


def flatten(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the text of every single value."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from flatten(each, f"{name}, {key}" if name else str(key))
    elif isinstance(value, list):
        yield from ((name, f"{each:,.4g}" if isinstance(each, float) else str(each)) for each in value)
    else:
        text = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
        yield name, text.replace("|", "/")


def run_part(name: str, folder: Path, sizes: Sizes) -> None:
    """Measure one part in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    work = folder / "work" / name
    work.mkdir(parents=True, exist_ok=True)
    note = Note(folder / f"{name}.json")
    note["machine"] = machine(device)
    started = time.perf_counter()
    globals()[name](Bench(device, sizes, work, note))
    note["seconds"] = time.perf_counter() - started
    note["done"] = True


def run_all(names: list[str], folder: Path, *, dry: bool) -> None:
    """Measure each part that is not done in a process of its own, for as long as it may take."""
    for name in names:
        path = folder / f"{name}.json"
        if path.exists() and json.loads(path.read_text())["done"]:
            continue
        if dry:  # toy sizes need neither a limit nor a process of their own
            run_part(name, folder, TOY)
            continue
        words = [sys.executable, __file__, "--out", str(folder), "--part", name]
        # Some of CUDA's libraries read this when they are loaded, and determinism needs it.
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        print(f"{name}: at most {PARTS[name]} s", file=sys.stderr, flush=True)
        reason = ""
        try:
            done = subprocess.run(words, env=environment, timeout=PARTS[name], stderr=subprocess.PIPE, check=False)
            if done.returncode:
                reason = f"ended with status {done.returncode}: {done.stderr.decode(errors='replace')[-2000:]}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {PARTS[name]} s"
        if reason:
            content = json.loads(path.read_text()) if path.exists() else {"done": False}
            path.write_text(json.dumps(content | {"failed": reason}, indent=1) + "\n")


def main(words: list[str] | None = None) -> int:
    """Run the parts that are asked for, then the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    given.out.mkdir(parents=True, exist_ok=True)
    if given.part:
        run_part(given.part, given.out, TOY if given.dry_run else REAL)
        return 0
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here. Type --dry-run to try the script in toy sizes.")
    run_all(given.only, given.out, dry=given.dry_run)
    return min(report(given.out), 1)


if __name__ == "__main__":
    sys.exit(main())
