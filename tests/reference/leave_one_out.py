"""Logistic regression refitted with SciPy, example by example: slow, and sharing no code with what it checks."""

import numpy as np
from scipy.optimize import minimize


def fitted(inputs: np.ndarray, labels: np.ndarray, kept: np.ndarray, penalty: float, classes: int) -> np.ndarray:
    """Weights `[class, pixel + 1]` that minimise the kept losses over the number of all, with the penalty."""
    wide = np.hstack([inputs, np.ones((len(inputs), 1))]).astype(np.float64)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(classes, -1)
        scores = wide @ weights.T
        scores -= scores.max(1, keepdims=True)
        probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        rows = np.arange(len(labels))
        value = -(np.log(probabilities[rows, labels]) * kept).mean() + penalty / 2 * (flat**2).sum()
        errors = probabilities.copy()
        errors[rows, labels] -= 1
        slope = (errors * kept[:, None]).T @ wide / len(labels)
        return value, slope.ravel() + penalty * flat

    start = np.zeros(classes * wide.shape[1])
    options = {"maxiter": 20_000, "maxfun": 100_000, "ftol": 0.0, "gtol": 1e-10}
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x.reshape(classes, -1)


def losses(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of each example."""
    scores = np.hstack([inputs, np.ones((len(inputs), 1))]) @ weights.T
    scores -= scores.max(1, keepdims=True)
    return np.log(np.exp(scores).sum(1)) - scores[np.arange(len(labels)), labels]
