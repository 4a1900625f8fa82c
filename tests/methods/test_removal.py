"""Influence predicts what actually happens when an example is removed and a convex model is trained again."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from vestige.curvature import DAMPING, accumulate_fisher
from vestige.gradients import FunctionObjective, GradientPass, GradientSink
from vestige.models import select_components

EXAMPLES, QUERIES, WIDTH, CLASSES, REMOVED = 400, 30, 8, 3, 50


class Points(NamedTuple):
    rows: Tensor
    features: Tensor
    labels: Tensor


def drawn(widest: float) -> tuple[np.ndarray, np.ndarray]:
    """Points on axes whose scales fall from `widest` to its inverse, labels drawn from a logistic model of them."""
    generator = np.random.default_rng(0)
    features = generator.normal(size=(EXAMPLES + QUERIES, WIDTH)) * np.geomspace(widest, 1 / widest, WIDTH)
    odds = np.exp(features @ generator.normal(size=(WIDTH, CLASSES)))
    labels = np.array([generator.choice(CLASSES, p=row / row.sum()) for row in odds])
    return features, labels


def fitted(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-10, max_iter=10_000)
    return model.fit(features, labels).coef_


def losses(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    logits = features @ weights.T
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


def gradients(weights: np.ndarray, features: np.ndarray, labels: np.ndarray) -> Tensor:
    model = nn.Linear(WIDTH, CLASSES, bias=False)
    model.weight.data = torch.tensor(weights, dtype=torch.float32)
    components = select_components(model, ("all",)).components
    sink = GradientSink(components)
    sink.begin(len(labels), "cpu")
    objective = FunctionObjective(
        lambda model, batch: nn.functional.cross_entropy(model(batch.features), batch.labels, reduction="none")
    )
    batch = Points(torch.arange(len(labels)), torch.tensor(features, dtype=torch.float32), torch.tensor(labels))
    with GradientPass(model, components, objective) as gradient_pass:
        gradient_pass.run(batch, sink)
    return sink.gradients[0].flatten(1)


@pytest.mark.parametrize(("widest", "damping"), [(1.0, DAMPING), (2.0, None)])
def test_influence_predicts_removal_of_fifty_examples_one_by_one(widest, damping):
    """With the default damping on even axes, with the ridge of the model itself (None) on uneven ones."""
    features, labels = drawn(widest)
    train, queries = slice(0, EXAMPLES), slice(EXAMPLES, None)
    weights = fitted(features[train], labels[train])
    of_train = gradients(weights, features[train], labels[train])
    of_queries = gradients(weights, features[queries], labels[queries])
    fisher = accumulate_fisher(["weight"], [slice(0, WIDTH * CLASSES)], [of_train])
    ridge = 1 / EXAMPLES / fisher.blocks[0].mean_eigenvalue
    removed = np.random.default_rng(1).choice(EXAMPLES, REMOVED, replace=False)
    predicted = (fisher.precondition(of_queries, damping or ridge) @ of_train[removed].T).T.numpy()
    plain = (of_queries @ of_train[removed].T).T.numpy()
    truth = rises(features, labels, weights, removed)
    correlation = np.corrcoef(predicted.ravel(), truth.ravel())[0, 1]
    assert correlation > 0.95
    assert correlation > np.corrcoef(plain.ravel(), truth.ravel())[0, 1]


def rises(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Change of every query's loss, [removed, query], when one example is left out and the model trained again."""
    train, queries = slice(0, EXAMPLES), slice(EXAMPLES, None)
    before = losses(weights, features[queries], labels[queries])
    after = [
        losses(
            fitted(np.delete(features[train], row, 0), np.delete(labels[train], row)),
            features[queries],
            labels[queries],
        )
        for row in removed
    ]
    return np.stack(after) - before
