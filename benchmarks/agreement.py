"""Vestige and its peers on one small trained model: do the scores agree, what do they cost, and who is right?

    python benchmarks/agreement.py --peer-python PEER/bin/python --bergson-python BERGSON/bin/python

Every engine gets the same weights and tokens on one thread. The judge is float64 autograd, one example at a time, which
shares no code with any of them. benchmarks/README.md says how the peers' environments are made.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from json import loads
from pathlib import Path

from measure import Measurement, measure, pin, pinned_core

pin()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from bergson_peer import Bergson  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402
from tables import aligned  # noqa: E402
from workload import COMPONENTS, Workload, make_model, save, text_tokens  # noqa: E402

import vestige  # noqa: E402
from vestige.compress import compress_gradient, parse_spec  # noqa: E402

TRAIN, QUERIES, TOKENS = 96, 8, 64
WIDTH, LAYERS, STEPS = 64, 2, 60
DAMPING = 0.1
"""Relative to the mean eigenvalue: the default of kronfluence and of LogIX."""
RANK = 16
FEATURES = 36
"""Numbers per linear map for TRAK; projected all together, to as many numbers."""


@dataclass(frozen=True)
class Line:
    """One engine's scores [query, example] and their cost, None where it was not measured alone."""

    engine: str
    scores: np.ndarray
    cost: Measurement | None


def main() -> None:
    """Make the model, ask everybody, print the tables."""
    options = _options()
    os.environ["VESTIGE_QUIET"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, train, queries = _prepare(folder)
        gradients = Gradients(model, train.tokens, queries.tokens)
        if options.peer_python:
            _ask_peers(options.peer_python, folder, len(gradients.names))
        lines = Asked(folder, train, queries)
        _identity(gradients, lines, options.bergson_python)
        _ekfac(lines)
        _projected_influence(gradients, lines)
        _trak(gradients, lines)


class Gradients:
    """Every example's gradient of its summed loss and of its log-odds, float64, by plain autograd one at a time."""

    def __init__(self, model: torch.nn.Module, train: list[list[int]], queries: list[list[int]]) -> None:
        wide = make_model(width=WIDTH, layers=LAYERS).double()
        wide.load_state_dict(model.state_dict())
        self.names = [name for name, _ in wide.named_parameters() if "_proj" in name]
        weights = [wide.get_parameter(name) for name in self.names]
        found: list[list[torch.Tensor]] = []
        losses = []
        for tokens in [*train, *queries]:
            ids = torch.tensor([tokens])
            loss = F.cross_entropy(wide(input_ids=ids).logits[0, :-1], ids[0, 1:])
            losses.append(float(loss.detach()))
            # The summed loss.
            found.append([part * (len(tokens) - 1) for part in torch.autograd.grad(loss, weights)])
        self.matrices = {name: torch.stack([one[place] for one in found]) for place, name in enumerate(self.names)}
        self.flat = torch.cat([part.flatten(1) for part in self.matrices.values()], dim=1)
        self.mean_losses = torch.tensor(losses, dtype=torch.float64)
        self.split = len(train)

    def products(self, rows: torch.Tensor) -> np.ndarray:
        """Inner products [query, example] of any rows, training examples first."""
        return (rows[self.split :] @ rows[: self.split].T).numpy()

    def influence(self, blocks: list[torch.Tensor]) -> np.ndarray:
        """`q^T (F + d I)^-1 g` summed over blocks, F the mean of g g^T over the training examples."""
        scores = 0
        for rows in blocks:
            train, queries = rows[: self.split], rows[self.split :]
            fisher = train.T @ train / self.split
            damped = fisher + DAMPING * fisher.diagonal().mean() * torch.eye(len(fisher), dtype=fisher.dtype)
            scores = scores + queries @ torch.linalg.solve(damped, train.T)
        return np.asarray(scores)

    def trak(self, features: int) -> np.ndarray:
        """TRAK without projection, damped as a projection to `features` numbers would be."""
        unsure = -torch.expm1(-self.mean_losses)
        rows = self.flat / (TOKENS - 1) / unsure[:, None]
        train, queries = rows[: self.split], rows[self.split :]
        gram = train @ train.T
        damped = gram + DAMPING * gram.trace() / features * torch.eye(self.split, dtype=gram.dtype)
        return (torch.linalg.solve(damped, train @ queries.T).T * unsure[: self.split]).numpy()


class Asked:
    """The answers of Vestige, and of the peers where they left some."""

    def __init__(self, folder: Path, train: Workload, queries: Workload) -> None:
        self.folder, self._train, self._queries = folder, train.rows(), queries.rows()

    def vestige(self, label: str, spec: str | None = None, scope: str = "component", **settings: object) -> Line:
        """Our scores through the public functions; with `spec` an index is made first and charged for."""
        found: list[np.ndarray] = []
        out = self.folder / f"run-{label}"
        shared = {"components": COMPONENTS, "loss": "sum", "precision": "float32"}

        def work() -> None:
            source: dict = {"model": str(self.folder / "model"), "data": self._train, **shared}
            if spec:
                index = vestige.index(
                    **source, compress=spec, compress_scope=scope, dtype="float32", out=out.with_suffix(".idx")
                )
                source = {"index": index.folder}
            scores = vestige.attribute(
                **source, queries=self._queries, out=out, dense=True, k=1, trust=False, answer="given", **settings
            )
            found.append(np.asarray(scores.dense()))

        cost = measure(work)
        return Line(f"Vestige, {label}", found[0], cost)

    def peer(self, name: str, label: str) -> list[Line]:
        """A peer's scores, if it was asked."""
        path = self.folder / f"{name}.npy"
        if not path.exists():
            return []
        cost = Measurement(**loads(path.with_suffix(".json").read_text()))
        return [Line(label, np.load(path), cost)]


def _identity(gradients: Gradients, asked: Asked, bergson: str | None) -> None:
    exact = gradients.products(gradients.flat)
    lines = [asked.vestige("grad-dot", method="grad-dot")]
    lines += asked.peer("kronfluence-identity", "kronfluence, identity")
    lines += asked.peer("logix-identity", "LogIX, whole gradients")
    projected = [asked.vestige(f"grad-dot on logra:{RANK}x{RANK}", f"logra:{RANK}x{RANK}", method="grad-dot")]
    projected.append(asked.vestige("grad-dot on tensorsketch:256", "tensorsketch:256", method="grad-dot"))
    if bergson:
        with Bergson(bergson, asked.folder, pinned_core()) as server:
            cost = server.score("train", "queries", asked.folder / "bergson-exact")
            lines.append(Line("bergson, no projection", np.load(asked.folder / "bergson-exact.npy"), cost))
            projected.append(_bergson_projected(server, asked.folder))
    _print("Inner products of whole gradients, against float64 autograd", lines, exact)
    _print(f"Inner products after projection to {RANK * RANK} numbers per map, against whole ones", projected, exact)


def _bergson_projected(server: Bergson, folder: Path) -> Line:
    rows = []
    for name in ("train", "queries"):
        answer = server.ask(do="gradients", workload=name, out=str(folder / f"bergson-{name}"), seed=0)
        stored = np.memmap(answer["file"], dtype=np.float32, mode="r", shape=tuple(answer["shape"]))
        rows.append(np.asarray(stored, dtype=np.float64))
        if name == "train":
            cost = {key: answer[key] for key in ("cpu_seconds", "wall_seconds", "peak_bytes", "disk_bytes")}
    return Line(f"bergson, projection {RANK}", rows[1] @ rows[0].T, Measurement(**cost))


def _ekfac(asked: Asked) -> None:
    ours = asked.vestige("ekfac", method="ekfac", damping=DAMPING, options={"labels": "data"})
    peers = asked.peer("kronfluence-ekfac", "kronfluence, EK-FAC")
    _print("EK-FAC influence with the empirical Fisher matrix, against Vestige", [ours, *peers], ours.scores)


def _projected_influence(gradients: Gradients, asked: Asked) -> None:
    spec = parse_spec(f"logra:{RANK}x{RANK}")
    ours = [
        compress_gradient(spec.build(name, tuple(part.shape[1:]), 0), part.float()).double()
        for name, part in gradients.matrices.items()
    ]
    line = asked.vestige(
        f"influence on logra:{RANK}x{RANK}", f"logra:{RANK}x{RANK}", method="influence", damping=DAMPING
    )
    _print("Influence in projected space, against float64 with Vestige's own maps", [line], gradients.influence(ours))
    peers = asked.peer("logix-lora", f"LogIX, random LoRA of rank {RANK}")
    if peers:
        maps = torch.load(asked.folder / "maps.pt", weights_only=True)
        _print(
            "Influence in projected space, against float64 with LogIX's own maps",
            peers,
            gradients.influence([_through(maps, name, part) for name, part in gradients.matrices.items()]),
        )


def _through(maps: dict[str, torch.Tensor], name: str, matrices: torch.Tensor) -> torch.Tensor:
    """A peer's encoder and decoder around a gradient, flattened."""
    module = name.removesuffix(".weight")
    encoder = maps[f"{module}.logix_lora_A.weight"].double()
    decoder = maps[f"{module}.logix_lora_C.weight"].double()
    return (decoder.T @ matrices @ encoder.T).flatten(1)


def _trak(gradients: Gradients, asked: Asked) -> None:
    features = FEATURES * len(gradients.names)
    whole, each = f"gauss:{features}", f"gauss:{FEATURES}"
    lines = [
        asked.vestige(f"trak on {whole} of the model", whole, "model", method="trak", damping=DAMPING),
        asked.vestige(f"trak on {each} per map", each, method="trak", damping=DAMPING),
    ]
    lines += asked.peer("traker-trak", f"traker, Rademacher projection to {features}")
    _print("TRAK with one model, against float64 without projection", lines, gradients.trak(features))


def _print(title: str, lines: list[Line], truth: np.ndarray) -> None:
    rows = [["", "Pearson", "Spearman per query", "seconds", "CPU s", "peak MB"]]
    rows.append([":--", *["--:"] * 5])
    for line in lines:
        pearson = np.corrcoef(line.scores.ravel(), truth.ravel())[0, 1]
        ranks = np.mean([spearmanr(a, b)[0] for a, b in zip(line.scores, truth, strict=True)])
        cost = line.cost
        figures = (
            [f"{cost.wall_seconds:.2f}", f"{cost.cpu_seconds:.2f}", f"{cost.peak_bytes / 1e6:.0f}"]
            if cost
            else [""] * 3
        )
        rows.append([line.engine, f"{pearson:.6f}", f"{ranks:.4f}", *figures])
    print(f"\n### {title}\n\n{aligned(rows)}", flush=True)


def _prepare(folder: Path) -> tuple[torch.nn.Module, Workload, Workload]:
    tokens = text_tokens(TRAIN + QUERIES, TOKENS, np.random.default_rng(3))
    train = Workload("train", tokens[:TRAIN], [0] * TRAIN)
    queries = Workload("queries", tokens[TRAIN:], [0] * QUERIES)
    model = make_model(width=WIDTH, layers=LAYERS).train()
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.tensor(train.tokens)
    torch.manual_seed(0)
    for _ in range(STEPS):
        batch = ids[torch.randperm(TRAIN)[:16]]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    save(folder, model.eval(), {"train": train, "queries": queries})
    return model, train, queries


def _ask_peers(python: str, folder: Path, maps: int) -> None:
    asked: dict[str, list[str]] = {
        "kronfluence": [],
        "logix": [str(RANK)],
        "traker": [str(FEATURES * maps), str(DAMPING)],
    }
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    for peer, options in asked.items():
        script = Path(__file__).parent / "peers" / f"{peer}_peer.py"
        command = [python, str(script), str(folder), str(folder), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{peer} did not run:\n{done.stderr[-1500:]}", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Agreement and cost of Vestige and its peers.")
    parser.add_argument("--peer-python", help="Interpreter with kronfluence, LogIX and traker.")
    parser.add_argument("--bergson-python", help="Interpreter with bergson.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
