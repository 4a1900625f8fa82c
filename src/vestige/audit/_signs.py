"""Which way each measure points."""

SIGNS: dict[str, int] = {
    "loss": -1,
    "answer_loss": -1,
    "logit_gap": 1,
    "margin": 1,
    "perplexity_ratio": -1,
    "zlib_ratio": -1,
    "min_k": 1,
    "min_k_plus_plus": 1,
    "accuracy": 1,
    "brier": -1,
    "counterfactual": 1,
    "lira": 1,
    "lira_offline": 1,
    "lira_global": 1,
    "exposure": 1,
    "extraction": 1,
}
"""1 where high values show that a model has memorized an example, -1 where low ones do: `SIGNS[name] * values` is the
argument of `attack`."""

EARLY_SIGNS: dict[str, int] = {"psmi": -1, "mahalanobis": 1, "loss": 1, "answer_loss": 1, "logit_gap": -1, "margin": -1}
"""The same for predicting, from an early checkpoint, what *will* be memorized: the examples that are hard or
atypical then. A loss points the other way than at the end."""
