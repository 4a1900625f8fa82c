"""UnTrac against leaving sources out, in miniature: eight made corpora, a model of one layer, everything retrained.

The experiment of Isonuma and Titov (2024, arXiv:2401.15241), section 5, with corpora whose mixing is known. Truth is
the rise of each test set's loss in a model trained without a source, for the same number of steps.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from vestige.bank import EVERYTHING, Bank, bank
from vestige.errors import NonFinite
from vestige.methods import attribute
from vestige.runs import Scores, is_run
from vestige.settings import StudySettings
from vestige.studies._markov import LENGTH, UNRELATED, VOCABULARY, MarkovCorpora, markov_corpora
from vestige.studies._registry import Gate, Outcome, registered
from vestige.unlearn import untrac

STEPS, BATCH = 320, 16
GRID = (5e-5, 1.6e-4, 5e-4, 1.6e-3, 5e-3)
LEAST, OF_CEILING, WITHIN = 0.85, 0.9, 0.03
"""What a pilot of this miniature led to expect: correlation, share of the ceiling, distance from the best rate."""
Table = Float[np.ndarray, "test corpus"]


@registered("untrac-miniature", ["pocket"])
def untrac_miniature(settings: StudySettings) -> Outcome:
    """UnTrac, UnTrac-Inv and GradDot beside leave-source-out retraining: Pearson over corpora, mean over test sets.

    Truth and estimate never share a model: scores of one seed's model are held against the retraining of the others.
    """
    corpora = markov_corpora(settings.seed)
    seeds = max(settings.seeds, 2)
    truth_bank = _bank(settings, corpora, seeds)
    truths = _truths(truth_bank, corpora)
    scores = [_all_scores(settings.out, corpora, seed) for seed in range(seeds)]
    methods = list(scores[0])
    found = {
        method: [
            agreement(scores[seed][method], np.mean([truths[other] for other in range(seeds) if other != seed], axis=0))
            for seed in range(seeds)
        ]
        for method in methods
    }
    ceiling = float(np.mean([agreement(truths[one], truths[other]) for one, other in combinations(range(seeds), 2)]))
    rows: list[tuple[Any, ...]] = [("truth of another seed (ceiling)", ceiling, "")]
    rows += [("known mixing", float(np.mean([agreement(corpora.mixing.T, truth) for truth in truths])), "")]
    rows += [
        (name, float(np.mean(values)), " ".join(f"{value:.3f}" for value in values)) for name, values in found.items()
    ]
    details = {
        "ceiling": ceiling,
        "agreement": found,
        "truth": [truth.tolist() for truth in truths],
        "scores": [{name: table.tolist() for name, table in each.items()} for each in scores],
        "mixing": corpora.mixing.tolist(),
    }
    gates = [*_gates(found, ceiling), _null_gate(truths, scores, corpora)]
    return Outcome(("method", "mean Pearson", "by seed"), rows, gates, details)


def agreement(scores: Table, truth: Table) -> float:
    """Pearson correlation over the corpora, mean over the test sets."""
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in zip(scores, truth, strict=True)]))


def tiny_gpt() -> nn.Module:
    """One layer of 48 units; the bank draws its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=LENGTH,
                n_embd=48,
                n_layer=1,
                n_head=4,
                bos_token_id=0,
                eos_token_id=1,
            )
        )


def _bank(settings: StudySettings, corpora: MarkovCorpora, seeds: int) -> Bank:
    return bank(
        model=tiny_gpt(),
        data=corpora.train,
        queries=corpora.tests,
        out=settings.out / "bank",
        leave_source_out=True,
        from_scratch=True,
        seeds=seeds,
        steps=STEPS,
        batch_size=BATCH,
        learning_rate=3e-3,
        keep_weights=True,
        seed=settings.seed,
    )


def _truths(truth: Bank, corpora: MarkovCorpora) -> list[Table]:
    """For each seed: loss of each test set without each corpus, minus that with everything."""
    losses = truth.by_subset(truth.query_token_losses)
    names = np.array(truth.query_sources)
    tests = sorted(set(names))
    means = np.stack([losses[..., names == test].mean(-1) for test in tests])
    whole = truth.subset_names.index(EVERYTHING)
    left_out = [_subset_without(truth, name) for name in corpora.names]
    return [means[:, left_out, seed] - means[:, [whole], seed] for seed in range(losses.shape[1])]


def _subset_without(truth: Bank, corpus: str) -> int:
    sources, membership = np.array(truth.sources), truth.subset_membership
    return next(
        number
        for number, members in enumerate(membership)
        if not members[sources == corpus].any() and members[sources != corpus].all()
    )


def _all_scores(out: Path, corpora: MarkovCorpora, seed: int) -> dict[str, Table]:
    model = next((out / "bank").rglob(f"00000-{seed}-model"))
    runs = out / f"runs-{seed}"
    found = {"GradDot": _grad_dot(runs / "grad-dot", model, corpora)}
    for direction, name in (("untrac", "UnTrac"), ("inverse", "UnTrac-Inv")):
        found[f"{name}, automatic"] = _unlearnt(runs / direction, model, corpora, direction, {})
        for rate in GRID:
            fixed = {"learning_rate": rate, "stop": "last"}
            found[f"{name}, {rate:g}"] = _unlearnt(runs / f"{direction}-{rate:g}", model, corpora, direction, fixed)
    sgd = {"learning_rate": 5e-3, "stop": "last", "optimizer": "sgd"}
    found["UnTrac, SGD 0.005"] = _unlearnt(runs / "sgd", model, corpora, "untrac", sgd)
    return found


def _unlearnt(out: Path, model: Path, corpora: MarkovCorpora, direction: str, given: dict[str, Any]) -> Table:
    common = {"model": str(model), "data": corpora.train, "queries": corpora.tests, "out": out, "points": 8}
    try:
        run = Scores.open(out) if is_run(out) else untrac(**common, direction=direction, **given)
    except NonFinite:
        # A rate of the grid that destroys the model has no scores, which is what the grid is to show.
        return np.full((len(corpora.mixing.T), len(corpora.names)), np.nan)
    # Columns are the sources by name; the unrelated one is last in both orders.
    return run.dense().astype(np.float64)


def _grad_dot(out: Path, model: Path, corpora: MarkovCorpora) -> Table:
    run = (
        Scores.open(out)
        if is_run(out)
        else attribute(
            model=str(model),
            data=corpora.train,
            queries=corpora.tests,
            out=out,
            method="grad-dot",
            components=("all",),
            dense=True,
            trust=False,
        )
    )
    dense = run.dense().astype(np.float64)
    sources, tests = (np.array([row["source"] for row in rows]) for rows in (corpora.train, corpora.tests))
    by_source = np.stack([dense[:, sources == name].sum(1) for name in corpora.names], axis=1)
    return np.stack([by_source[tests == test].sum(0) for test in sorted(set(tests))])


def _gates(found: dict[str, list[float]], ceiling: float) -> list[Gate]:
    gates = []
    for name in ("UnTrac", "UnTrac-Inv"):
        automatic = float(np.mean(found[f"{name}, automatic"]))
        best = float(np.nanmax([np.mean(found[f"{name}, {rate:g}"]) for rate in GRID]))
        gates += [
            Gate(f"{name}: correlation with retraining", automatic, ">=", LEAST),
            Gate(f"{name}: share of the ceiling", automatic / ceiling, ">=", OF_CEILING),
            Gate(f"{name}: automatic rate below the best of the grid by", best - automatic, "<=", WITHIN),
        ]
    return gates


def _null_gate(truths: list[Table], scores: list[dict[str, Table]], corpora: MarkovCorpora) -> Gate:
    """Scores, put on the scale of truth, of a corpus that has nothing of the tests: below the noise of retraining.

    Leaving it out makes room for the others, so its truth is that of training longer on them; what counts is how far
    its score lies from there, in units of the difference between two seeds.
    """
    place = corpora.names.index(UNRELATED)
    truth = np.mean(truths, axis=0)
    noise = float(np.std(np.stack(truths), axis=0, ddof=1).mean())
    distances = []
    for each in scores:
        table = each["UnTrac-Inv, automatic"]
        for one, right in zip(table, truth, strict=True):
            slope, shift = np.polyfit(one, right, 1)
            distances.append(abs(slope * one[place] + shift - right[place]))
    return Gate("unrelated corpus: error over retraining noise", float(np.mean(distances)) / noise, "<=", 1.0)
