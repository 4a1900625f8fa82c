"""kronfluence's identity and EK-FAC scores: `PEER/bin/python kronfluence_peer.py FOLDER OUT`.

The empirical Fisher matrix is asked for (true labels), because draws from the model would differ between tools, and
its default damping, a tenth of the mean eigenvalue.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from scores import Sequences, load_model, report, run

BATCH = 16


class SummedLoss(Task):
    """Summed next-token loss, for training and for the measurement."""

    def compute_train_loss(self, batch, model, sample=False):  # noqa: ARG002
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        labels = batch["input_ids"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self.modules

    def get_attention_mask(self, batch):  # noqa: ARG002
        return None


def main() -> None:
    """Fit once, score twice."""
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    train, queries = Sequences(folder, "train"), Sequences(folder, "queries")
    model, task = load_model(folder), SummedLoss()
    task.modules = [name for name, part in model.named_modules() if "layers." in name and hasattr(part, "weight")]
    task.modules = [name for name in task.modules if isinstance(model.get_submodule(name), torch.nn.Linear)]
    analyzer = Analyzer("agreement", prepare_model(model, task), task, cpu=True, output_dir=str(out / "kronfluence"))

    def scores(name: str, strategy: str):
        analyzer.fit_all_factors(
            name, train, BATCH, factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True)
        )
        analyzer.compute_pairwise_scores(
            name, name, queries, train, len(queries), BATCH, score_args=ScoreArguments(damping_factor=None)
        )
        return analyzer.load_pairwise_scores(name)["all_modules"]

    report(out, "kronfluence", [run("identity", lambda: scores("identity", "identity"))])
    report(out, "kronfluence", [run("ekfac", lambda: scores("ekfac", "ekfac"))])


main()
