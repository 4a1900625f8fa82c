"""How well scores from an index agree with exact ones, for the bytes that a row takes.

    python benchmarks/sketch_fidelity.py [--bergson-python PEER/bin/python] [--specs "logra:16x16 int8" ...] [--quick]

256 training examples and 16 queries of 128 tokens on the randomly initialised model of the throughput benchmark: a hard
case, because nothing was learned that would give gradients a common structure. Exact scores come from one plain
backward pass per example, without any of the code that is measured.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import measure

measure.pin()
os.environ["VESTIGE_QUIET"] = "1"

import numpy as np  # noqa: E402 - torch reads the number of threads when it is imported
import torch  # noqa: E402
import vestige_engine  # noqa: E402
from bergson_peer import Bergson  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from tables import aligned  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from workload import EQUAL, VOCABULARY, Workload, draw_tokens, make_model, make_tokenizer, save, text_tokens  # noqa: E402

from vestige import Index  # noqa: E402

SPECS = (
    "tensorsketch:256 int8",
    "mask:128x128 | sjlt:256 int8",
    "logra:64x64 | sjlt:256 int8",
    "logra:32x32 | sjlt:256 int8",
    "mask:32x32 | sjlt:256 int8",
    "logra:16x16 int8",
    "logra:16x16 float32",
    "logra:8x16 float16",
    "tensorsketch:128 float16",
    "tensorsketch:1024 int8",
)
"""Specification and number format on disk."""


class Sketched(NamedTuple):
    """Scores from one index."""

    scores: np.ndarray
    """[query, example]"""
    row_bytes: int
    cpu_seconds: float
    """To build the index of the training examples."""


def main() -> None:
    """Print the table."""
    options = _options()
    torch.set_num_threads(1)
    train, queries = _draw(options)
    model = make_model()
    exact = _exact_scores(model, train, queries)
    headings = ["", "bytes a row", "Spearman", "relative error", "CPU-s to build"]
    lines = [headings, [":--", *["--:"] * 4]]
    with tempfile.TemporaryDirectory(prefix="vestige-fidelity-") as name:
        folder = Path(name)
        seeds = range(options.seeds)
        if options.bergson_python:
            save(folder, model, {"train": train, "queries": queries})
            with Bergson(options.bergson_python, folder, measure.pinned_core()) as peer:
                lines.append(_line("bergson 16x16 float32", [_bergson(peer, seed, folder) for seed in seeds], exact))
        for spec in options.specs:
            runs = [_vestige(spec, seed, model, (train, queries), folder) for seed in seeds]
            lines.append(_line(f"vestige {spec}", runs, exact))
            print(f"{spec} done", file=sys.stderr, flush=True)
    print(f"\n{options.examples} training examples, {len(queries.tokens)} queries, {options.seeds} seeds\n")
    print(aligned(lines))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bergson-python", help="interpreter of an environment that has bergson (see README.md)")
    parser.add_argument("--examples", type=int, default=256, help="training examples (256)")
    parser.add_argument("--seeds", type=int, default=3, help="random sketches to average over (3)")
    parser.add_argument("--specs", nargs="+", default=SPECS, help="what to measure, each 'SPEC DTYPE'")
    parser.add_argument("--tokens", choices=("text", "topics", "uniform"), default="text", help="how tokens are drawn")
    parser.add_argument("--quick", action="store_true", help="32 examples and two specifications: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.examples, options.seeds, options.specs = 32, 1, SPECS[:3:2]
    return options


def _draw(options: argparse.Namespace) -> tuple[Workload, Workload]:
    generator, count = np.random.default_rng(3), options.examples + 16
    if options.tokens == "text":
        tokens = text_tokens(count, EQUAL, generator)
    elif options.tokens == "uniform":
        tokens = generator.integers(VOCABULARY, size=(count, EQUAL)).tolist()
    else:
        tokens = draw_tokens([EQUAL] * count, generator)
    train, queries = tokens[:-16], tokens[-16:]
    return Workload("train", train, [0] * len(train)), Workload("queries", queries, [0] * 16)


def _exact_scores(model: LlamaForCausalLM, train: Workload, queries: Workload) -> np.ndarray:
    """Inner products of the gradients of summed losses, [query, example]."""
    model.requires_grad_(True)
    gradients = torch.stack([_gradient(model, tokens) for tokens in queries.tokens])
    scores = torch.stack([gradients @ _gradient(model, tokens) for tokens in train.tokens], dim=1)
    model.requires_grad_(False)
    return scores.double().numpy()


def _gradient(model: LlamaForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Gradient of one sequence's summed loss for the linear maps of all blocks, flattened."""
    ids = torch.tensor([tokens])
    model.zero_grad(set_to_none=True)
    (model(input_ids=ids, labels=ids, use_cache=False).loss * (len(tokens) - 1)).backward()
    named = model.model.layers.named_parameters()
    return torch.cat([weight.grad.flatten() for _, weight in named if weight.ndim == 2])


def _vestige(
    spec: str, seed: int, model: LlamaForCausalLM, workloads: tuple[Workload, Workload], folder: Path
) -> Sketched:
    """Scores from the inner products of two indexes, as `vestige attribute` forms them."""
    compress, dtype = spec.rsplit(maxsplit=1)
    vectors, costs, row_bytes = [], [], 0
    for workload in workloads:
        out = folder / "index"
        shutil.rmtree(out, ignore_errors=True)
        cost = vestige_engine.build(model, make_tokenizer(), workload, out, compress=compress, dtype=dtype, seed=seed)
        index = Index.open(out)
        vectors.append(index.gradients_of(range(len(workload.tokens))).double().numpy())
        costs.append(cost.cpu_seconds)
        row_bytes = index.manifest.row_bytes
    return Sketched(vectors[1] @ vectors[0].T, row_bytes, costs[0])


def _bergson(peer: Bergson, seed: int, folder: Path) -> Sketched:
    """bergson's layout: 16 x 16 numbers in float32 for each linear map."""
    vectors, costs = [], []
    for name in ("train", "queries"):
        answer = peer.ask(do="gradients", workload=name, out=str(folder / f"{name}-{seed}"), seed=seed)
        vectors.append(np.fromfile(answer["file"], dtype=np.float32).reshape(answer["shape"]).astype(float))
        costs.append(answer["cpu_seconds"])
    return Sketched(vectors[1] @ vectors[0].T, 4 * vectors[0].shape[1], costs[0])


def _line(name: str, runs: list[Sketched], exact: np.ndarray) -> list[str]:
    """One line of the table: means over seeds, with the spread of the correlation between them."""
    correlations = [
        np.mean([spearmanr(ours, theirs).statistic for ours, theirs in zip(run.scores, exact, strict=True)])
        for run in runs
    ]
    errors = [np.sqrt(np.mean((run.scores - exact) ** 2) / np.mean(exact**2)) for run in runs]
    spread = f" ± {np.std(correlations, ddof=1):.3f}" if len(runs) > 1 else ""
    seconds = np.median([run.cpu_seconds for run in runs])
    return [
        name,
        f"{runs[0].row_bytes:,}",
        f"{np.mean(correlations):.3f}{spread}",
        f"{np.mean(errors):.3f}",
        f"{seconds:.1f}",
    ]


if __name__ == "__main__":
    main()
