"""The table of a component search as rows of a study, and what was expected of it."""

from collections.abc import Mapping
from typing import Any

from vestige.evaluate import Estimate, Evaluation
from vestige_recipes.common.registry import Gate

FULL = "full gradient"
COLUMNS = (
    "data",
    "candidates",
    "representation",
    "accuracy",
    "95 % interval",
    "minus full",
    "95 % interval",
    "agreement",
    "centred",
    "parameters",
    "backward",
    "bytes",
    "seconds",
)


def component_rows(part: str, found: Evaluation) -> list[tuple[Any, ...]]:
    """Every representation, and the best and the median component by itself."""
    rows = []
    for words, each in found.details["candidates"].items():
        rows += [(part, words, *_cells(one)) for one in each["representations"]]
        single = sorted(each["components"], key=lambda one: one["accuracy"].value)
        # Shares are of all parameters of the model, also of those that no component holds.
        total = sum(one["parameters"] for one in single) / _representation(found, words, FULL)["parameters"]
        for label, one in (("best", single[-1]), ("median", single[len(single) // 2]), ("worst", single[0])):
            name = f"{label} component, all queries: {one['name'].removesuffix('.weight')}"
            size = one["parameters"]
            known = {"name": name, "parameters": size / total, "bytes": 4 * size, "seconds": None, "against_full": None}
            rows.append((part, words, *_cells(one | known)))
    return rows


def _cells(one: Mapping[str, Any]) -> tuple[Any, ...]:
    against = one["against_full"]
    shares = [one["parameters"], one["backward"]]
    return (
        one["name"],
        one["accuracy"].value,
        _interval(one["accuracy"]),
        "" if against is None else against.value,
        "" if against is None else _interval(against),
        *("" if one[name] is None else _number(one[name]) for name in ("agreement", "centred")),
        *("" if share is None else f"{share:.2%}" for share in shares),
        "" if one["bytes"] is None else one["bytes"],
        "" if one["seconds"] is None else f"{one['seconds']:.1f}",
    )


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f} … {estimate.high:.3f}"


def _number(value: Estimate | float) -> float:
    return float(value.value if isinstance(value, Estimate) else value)


def gates_of_sets(part: str, found: Evaluation, words: str, tolerance: float) -> list[Gate]:
    """Published: a few components do as well as all; here where they were chosen on other queries."""
    names = ("best component, held out", "greedy for accuracy, held out")
    gains = [(name, ahead_of(found, words, name, FULL)) for name in names]
    agreeing = _representation(found, words, "greedy for agreement, held out")
    # Of those that take part: LoRA's are a few hundredths of all.
    share = agreeing["parameters"] / _representation(found, words, FULL)["parameters"]
    return [
        *(Gate(f"{part}, {words}: {name}, minus full", gain, ">=", -tolerance) for name, gain in gains),
        Gate(f"{part}, {words}: parameters of the set that agrees", share, "<=", 0.1),
        Gate(f"{part}, {words}: agreement of that set, held out", agreeing["agreement"].value, ">=", 0.99),
    ]


def ahead_of(found: Evaluation, words: str, name: str, other: str) -> float:
    """Accuracy of one representation minus that of another one."""
    one, opponent = (_representation(found, words, each)["accuracy"].value for each in (name, other))
    return one - opponent


def _representation(found: Evaluation, words: str, name: str) -> Mapping[str, Any]:
    each = found.details["candidates"][words]["representations"]
    return next(one for one in each if one["name"] == name)
