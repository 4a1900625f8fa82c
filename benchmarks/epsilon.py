"""Lower bounds on epsilon beside the epsilon that a training really has.

    python benchmarks/epsilon.py [--draws 200]

A logistic regression is trained by DP-SGD on all examples in every step: each example's gradient is cut to length 1 and
the sum gets Gaussian noise. Such a training is Gaussian differentially private with mu = sqrt(steps) / noise, exactly,
so its epsilon at a delta is known without a bound in between (Dong et al. 2019, arXiv:1905.02383; Balle and Wang 2018,
arXiv:1805.06530). Half of the canaries, by coins, were among the examples; each has a feature of its own, and the
weight of that feature is the guess. Steinke et al. 2023, "Privacy auditing with one training run".
"""

import argparse
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binomtest, norm

from vestige.measures import epsilon_from_guesses

EXAMPLES, FEATURES, CANARIES, STEPS, RATE, DELTA = 200, 10, 200, 20, 0.02, 1e-5
GUESSES = 50
"""Canaries guessed about, half of them in: those with the largest weights; the others with the smallest."""


class Private(NamedTuple):
    """What a private training left."""

    weights: Float[np.ndarray, "feature"]
    members: Bool[np.ndarray, "canary"]


def train_privately(noise: float, seed: int) -> Private:
    """Train a logistic regression with canaries by DP-SGD; `noise` is that of a step in lengths of one gradient."""
    draw = np.random.default_rng(seed)
    inputs = np.zeros((EXAMPLES + CANARIES, FEATURES + CANARIES))
    inputs[:EXAMPLES, :FEATURES] = draw.standard_normal((EXAMPLES, FEATURES))
    # A canary has a feature that nothing else has, large enough that its gradient is cut in every step.
    inputs[EXAMPLES:, FEATURES:] = 100 * np.eye(CANARIES)
    labels = np.concatenate([inputs[:EXAMPLES] @ draw.standard_normal(inputs.shape[1]) > 0, np.ones(CANARIES)])
    members = draw.random(CANARIES) < 0.5
    taken = np.concatenate([np.ones(EXAMPLES, dtype=bool), members])
    inputs, labels, weights = inputs[taken], labels[taken], np.zeros(inputs.shape[1])
    for _ in range(STEPS):
        gradients = (expit(inputs @ weights) - labels)[:, None] * inputs
        gradients /= np.maximum(np.linalg.norm(gradients, axis=1), 1.0)[:, None]
        noisy = gradients.sum(0) + noise * draw.standard_normal(len(weights))
        weights = weights - RATE / EXAMPLES * noisy
    return Private(weights, members)


def true_epsilon(noise: float, delta: float = DELTA) -> float:
    """Return the epsilon of the training for an example added or left out."""
    mu = math.sqrt(STEPS) / noise

    def excess(epsilon: float) -> float:
        inside = norm.cdf(-epsilon / mu + mu / 2)
        return float(inside - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2) - delta)

    return float(brentq(excess, 0.0, mu**2 / 2 + 10 * mu))


def lower_bound(trained: Private, delta: float = DELTA) -> float:
    """Return the bound at 95 % confidence from the weights of the canaries' own features."""
    order = np.argsort(trained.weights[FEATURES:])
    half = GUESSES // 2
    right = int((~trained.members[order[:half]]).sum() + trained.members[order[-half:]].sum())
    return epsilon_from_guesses(right, 2 * half, CANARIES, delta=delta)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bounds on epsilon of trainings whose epsilon is known.")
    parser.add_argument("--draws", type=int, default=200, help="Trainings for each amount of noise.")
    draws = parser.parse_args().draws
    print("| noise | true epsilon | median bound | largest | above the true one | of | one-sided p against 5 % |")
    print("| --: | --: | --: | --: | --: | --: | --: |")
    for noise in (40.0, 20.0, 10.0, 5.0, 2.0):
        epsilon = true_epsilon(noise)
        bounds = [lower_bound(train_privately(noise, seed)) for seed in range(draws)]
        above = sum(bound > epsilon for bound in bounds)
        chance = binomtest(above, draws, 0.05, alternative="greater").pvalue
        shown = f"{noise:g} | {epsilon:.2f} | {np.median(bounds):.2f} | {max(bounds):.2f} | {above} | {draws}"
        print(f"| {shown} | {chance:.2f} |")


if __name__ == "__main__":
    main()
