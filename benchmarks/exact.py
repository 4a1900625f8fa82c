"""Exact scores of 16 queries without an index, and EK-FAC, beside kronfluence, in turns in one process.

    pip install --no-deps --target FOLDER kronfluence==1.0.1 einops einconv opt_einsum
    python benchmarks/exact.py --peer-path FOLDER [--examples 64] [--rounds 3]

The 6.84M Llama-style model, 128 tokens an example, one thread. Both tools start from tokens in memory and end with
scores in memory: the queries' gradients, what EK-FAC measures (true labels) and the pass over the training data count.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from measure import Measurement, measure, pin

pin()

import numpy as np  # noqa: E402 - torch reads the number of threads when it is imported
import torch  # noqa: E402
from tables import aligned  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402
from vestige_engine import attribute, score_exactly  # noqa: E402
from workload import EQUAL, Workload, draw_tokens, make_model, make_tokenizer  # noqa: E402

QUERIES, BATCH = 16, 16
METHODS = {"grad-dot": "identity", "ekfac": "ekfac"}
"""Our methods, and kronfluence's strategies."""


class Sequences(torch.utils.data.Dataset):
    """Token sequences, as kronfluence takes them."""

    def __init__(self, workload: Workload) -> None:
        self._tokens = torch.tensor(workload.tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self._tokens[row]


class Peer:
    """kronfluence on a model of its own."""

    def __init__(self, folder: Path, train: Workload, queries: Workload) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        class SummedLoss(Task):
            def compute_train_loss(self, batch, model, sample=False):  # noqa: ARG002
                logits = model(input_ids=batch).logits[:, :-1]
                return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")

            def compute_measurement(self, batch, model):
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self):
                return modules

            def get_attention_mask(self, batch):  # noqa: ARG002
                return None

        model = make_model()
        named = model.named_modules()
        modules = [name for name, part in named if isinstance(part, torch.nn.Linear) and "layers." in name]
        self._train, self._queries, task = Sequences(train), Sequences(queries), SummedLoss()
        self._analyzer = Analyzer("exact", prepare_model(model, task), task, cpu=True, output_dir=str(folder))

    def score(self, strategy: str) -> tuple[Measurement, Measurement, np.ndarray]:
        """Return the cost of the factors, that of the scores, and the scores [query, example]."""
        from kronfluence.arguments import FactorArguments, ScoreArguments

        factors = FactorArguments(strategy=strategy, use_empirical_fisher=True)
        fitting = measure(
            lambda: self._analyzer.fit_all_factors(
                strategy, self._train, BATCH, factor_args=factors, overwrite_output_dir=True
            )
        )
        scoring = measure(
            lambda: self._analyzer.compute_pairwise_scores(
                strategy,
                strategy,
                self._queries,
                self._train,
                QUERIES,
                BATCH,
                score_args=ScoreArguments(damping_factor=None),
                overwrite_output_dir=True,
            )
        )
        return fitting, scoring, self._analyzer.load_pairwise_scores(strategy)["all_modules"].numpy()


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-path", required=True, help="Folder with kronfluence and what it needs.")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=METHODS, help="Leave the other method out.")
    asked = parser.parse_args()
    sys.path.append(asked.peer_path)
    torch.set_num_threads(1)
    draw = np.random.default_rng(1)
    train = Workload("train", draw_tokens([EQUAL] * asked.examples, draw), [0] * asked.examples)
    queries = Workload("queries", draw_tokens([EQUAL] * QUERIES, draw), [0] * QUERIES)
    model, tokenizer = make_model(), make_tokenizer()
    rows = [["", "ours, before", "ours, pass", "attribute", "theirs, before", "theirs, scores", "ratio", "Pearson"]]
    rows.append([":--", *["--:"] * 7])
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(Path(folder), train, queries)
        for method, strategy in METHODS.items() if asked.only is None else [(asked.only, METHODS[asked.only])]:
            rounds = []
            # The first round warms both up.
            for _ in range(asked.rounds + 1):
                before, scoring, ours = score_exactly(model, tokenizer, train, queries, method)
                whole = attribute(model, tokenizer, train, queries, method, Path(folder) / "run")
                fitting, theirs, scores = peer.score(strategy)
                rounds.append([one.cpu_seconds for one in (before, scoring, whole, fitting, theirs)])
            costs = [f"{median(column):.2f}" for column in zip(*rounds[1:], strict=True)]
            ratio = median((fit + score) / (before + run) for before, run, _, fit, score in rounds[1:])
            pearson = np.corrcoef(ours.ravel(), scores.ravel())[0, 1]
            rows.append([f"{method}, {strategy}", *costs, f"{ratio:.2f}", f"{pearson:.6f}"])
    print(
        f"\n{asked.examples} examples and {QUERIES} queries of {EQUAL} tokens, CPU-s, median of {asked.rounds} rounds\n"
    )
    print(aligned(rows))


if __name__ == "__main__":
    main()
