"""Ways of comparing examples that are no choice of components: projections, layer outputs and texts."""

import numpy as np

from vestige.evaluate._component_judge import Judge, Representation
from vestige.evaluate._component_products import credit
from vestige.evaluate._component_run import OnePassResult


def projection_rows(result: OnePassResult, judge: Judge, words: str) -> list[Representation]:
    rows = []
    parameters = int(judge.products.parameters.sum())
    for number, name in enumerate(result.projected[words].names):
        for form, label in ((result.projected, ""), (result.published, ", as published")):
            one = form[words]
            seconds = result.seconds.get("gradients", 0.0) + result.seconds.get(f"projection {name}", 0.0)
            rows.append(
                judge.row(
                    f"projection {name}{label}",
                    one.each([number])[0],
                    numbers=int(one.parameters[number]),
                    parameters=parameters,
                    backward=1.0,
                    seconds=seconds,
                )
            )
    return rows


def output_rows(result: OnePassResult, judge: Judge, words: str) -> list[Representation]:
    outputs = result.outputs[words]
    count = len(outputs.names) - 1
    seconds = result.seconds.get("gradients", 0.0) / 2
    rows = []
    if count:
        modules = list(range(count))
        numbers = int(outputs.parameters[:-1].sum())
        rows += [
            judge.row(
                "layer outputs, cosine", outputs.cosine(modules), numbers=numbers, seconds=seconds, opponent=True
            ),
            judge.row(
                "layer outputs, inner product",
                outputs.values[:-1].sum(0),
                numbers=numbers,
                seconds=seconds,
                opponent=True,
            ),
        ]
    if outputs.parameters[-1]:
        last = int(outputs.parameters[-1])
        rows.append(judge.row("rep-sim", outputs.cosine([count]), numbers=last, seconds=seconds, opponent=True))
    return rows


def text_rows(judge: Judge) -> list[Representation]:
    place = -np.broadcast_to(np.arange(judge.right.shape[1], dtype=np.float64), judge.right.shape)
    chance = judge.right.sum(1) / np.maximum(judge.listed.sum(1), 1)
    first = credit(place, judge.right, judge.listed)
    return [
        judge.row("bm25 of the prompts", None, credits=first, opponent=True),
        judge.row("random", None, credits=chance, opponent=True),
    ]
