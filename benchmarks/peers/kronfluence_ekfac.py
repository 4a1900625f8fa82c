"""kronfluence's K-FAC and EK-FAC scores with true labels, for `ekfac_agreement.py`: `kronfluence_ekfac.py FOLDER`.

Twice: with its own count of tokens, all that are no padding, and with Vestige's, those up to the last that predicts.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from transformers import AutoModelForCausalLM


class Masked(Task):
    """Summed loss of the labelled tokens of padded rows."""

    def __init__(self, modules: list[str], counted: str) -> None:
        self._modules, self._counted = modules, counted

    def compute_train_loss(self, batch, model, sample=False):  # noqa: ARG002
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=-100
        )

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return self._modules

    def get_attention_mask(self, batch):
        return batch[self._counted]


def main() -> None:
    """Fit and score each strategy with each count."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rows = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("train", "queries")}
    for counted in ("attention_mask", "counted"):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
        modules = [
            name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and ".layers." in name
        ]
        task = Masked(modules, counted)
        analyzer = Analyzer(counted, prepare_model(model, task), task, cpu=True, output_dir=str(folder / "kronfluence"))
        for strategy in ("kfac", "ekfac"):
            analyzer.fit_all_factors(
                strategy, rows["train"], 8, factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True)
            )
            analyzer.compute_pairwise_scores(
                strategy,
                strategy,
                rows["queries"],
                rows["train"],
                len(rows["queries"]),
                8,
                score_args=ScoreArguments(damping_factor=None),
            )
            scores = analyzer.load_pairwise_scores(strategy)["all_modules"]
            np.save(folder / f"{strategy}-{counted}.npy", scores.float().numpy())


main()
