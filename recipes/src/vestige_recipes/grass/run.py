"""Linear datamodeling scores of compressed gradients on models that are no language models of text.

Two of the evaluations of GraSS (Hu et al. 2025, arXiv:2505.18976) in small: a ResNet-9 and a music transformer. The
third, an MLP, is the study `digits`. Unlike there, no model that scores are computed on is one of the bank's, and masks
are trained on gradients of the trained model, not of a random one.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vestige.banks import Bank
from vestige.compress import CompressingSink, MaskTraining, Stream, parse_spec, train_selective_mask, write_masks
from vestige.curvature import DAMPING, accumulate_fisher
from vestige.evaluate import Estimate, ceiling
from vestige.gradients import FunctionObjective, GradientPass
from vestige.indexes import lay_out
from vestige.methods import doubt
from vestige.models import select_components
from vestige.progress import announce, progress
from vestige_recipes.common.halves import (
    AT_ONCE,
    Scored,
    cosines,
    judge_scores,
    make_bank,
    score_solved,
    solve_rows,
    time_scores,
    train_halves,
)
from vestige_recipes.grass.tasks import Batch, Task, digits_task, melodies_task
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study, show_interval

LIKE = 0.03
"""Within this of LoGra's score that of FactGraSS was expected, and of SJLT's that of GraSS."""
_MASKS = MaskTraining(penalty=1e-4, learning_rate=0.02, epochs=60, stop_below=0.0)
"""Of a few hundred steps with 60 examples a step."""


@dataclass(frozen=True)
class GrassPlan:
    """One size of a study."""

    examples: int
    queries: int
    epochs: int
    width: int
    subsets: int
    side: int
    """Of LoGra and of masks: its square is what a layer keeps."""
    whole: int
    """Numbers that TRAK keeps of the gradient of the whole model."""
    models: int
    """That TRAK averages over, each trained on a half of its own."""
    masked: int
    """Examples that masks are trained on."""
    draws: int = 1000


RESNET = {
    "tiny": GrassPlan(30, 6, 1, 4, 3, 2, 16, 1, 12, draws=20),
    "pocket": GrassPlan(1000, 200, 12, 8, 50, 16, 1024, 10, 200),
}
MUSIC = {
    "tiny": GrassPlan(20, 4, 1, 8, 3, 2, 16, 1, 12, draws=20),
    "pocket": GrassPlan(600, 100, 12, 32, 50, 16, 1024, 5, 200),
}
LENGTH, VOCABULARY = 48, 128
"""Notes of a tune, and different notes."""


@register_study(RESNET)
def grass_resnet9(settings: StudySettings) -> Outcome:
    """How well compressed gradients of a ResNet-9 predict retraining, with intervals."""
    plan = RESNET[settings.size]
    return _study(settings, plan, digits_task(plan.examples, plan.queries, plan.epochs, plan.width, settings.seed))


@register_study(MUSIC)
def grass_music(settings: StudySettings) -> Outcome:
    """How well compressed gradients of a music transformer predict retraining, with intervals."""
    plan = MUSIC[settings.size]
    sizes = (plan.examples, plan.queries, plan.epochs, plan.width)
    return _study(settings, plan, melodies_task(*sizes, LENGTH, VOCABULARY, settings.seed))


def _study(settings: StudySettings, plan: GrassPlan, task: Task) -> Outcome:
    truth = _bank(settings, plan, task)
    asked = task.fit(np.arange(plan.examples), settings.own_seed)
    mean = float(task.query_losses(asked).mean())
    announce(f"The model that is asked, {task.name}, has a mean loss of {mean:.3f} on the queries.")
    judged: dict[str, tuple[Scored, Estimate]] = {}
    for scored in all_scores(settings, plan, task, asked):
        judged[scored.name] = scored, judge_scores(scored.scores, truth, plan.draws).estimate
    top = ceiling(truth.query_losses, truth.subsets, truth.seeds)
    intervals = {name: estimate for name, (_, estimate) in judged.items()}
    label = "linear datamodeling score (95 % interval)"
    draw_intervals(settings.out, "lds", intervals, label, lines={"ceiling from retraining": top.whole})
    rows: list[tuple[Any, ...]] = [
        (name, estimate.value, show_interval(estimate), scored.numbers, round(scored.seconds, 1))
        for name, (scored, estimate) in judged.items()
    ]
    rows.sort(key=lambda row: -row[1])
    rows.insert(0, ("noise ceiling", top.whole, "", "", ""))
    parameters = sum(part.numel() for part in asked.parameters())
    details = {"plan": asdict(plan), "parameters": parameters, "loss": mean, "ceiling": top._asdict()}
    details["lds"] = {name: estimate._asdict() for name, estimate in intervals.items()}
    return Outcome(("method", "LDS", "95 % interval", "numbers", "seconds"), rows, _gates(intervals), details)


def _bank(settings: StudySettings, plan: GrassPlan, task: Task) -> Bank:
    def train(rows: np.ndarray, seed: int) -> np.ndarray:
        return task.query_losses(task.fit(rows, seed))

    identity = {"data": task.digest, "model": task.name, **task.recipe}
    return make_bank(settings, train, plan.examples, plan.queries, plan.subsets, identity)


def all_scores(settings: StudySettings, plan: GrassPlan, task: Task, asked: nn.Module) -> Iterator[Scored]:
    """Yield the scores of every method; masks are trained on the way, and left in the folder."""
    seed, started = settings.seed, time.perf_counter()
    train, queries = (compress(asked, task, side, "none", seed) for side in (task.train, task.queries))
    seconds, width = time.perf_counter() - started, train.shape[1]
    yield score_solved("grad-dot", lambda: queries, train, seconds)
    yield time_scores("grad-cos", lambda: cosines(queries, train), width, seconds)
    masks = settings.out / "masks.safetensors"
    train_masks(masks, asked, train[: plan.masked], plan.side, seed)
    for name, spec in layer_specs(plan.side, masks).items():
        yield influence(f"influence, {name}", asked, task, spec, seed)
    halves = train_halves(task.fit, plan.examples, plan.models, settings.own_seed)
    kept = plan.whole
    for name, spec in {f"SJLT {kept}": f"sjlt:{kept}", f"GraSS {kept}": f"mask:{4 * kept} | sjlt:{kept}"}.items():
        yield trak(f"TRAK, {name}", halves, task, spec, seed)
    shape = plan.queries, plan.examples
    yield Scored("random", np.random.default_rng(seed).standard_normal(shape), 0.0, 0)


def layer_specs(side: int, masks: Path) -> dict[str, str]:
    """Return compressors of each layer's gradient to the square of `side` numbers."""
    kept, twice = side**2, 2 * side
    return {
        f"LoGra {side}x{side}": f"logra:{side}x{side}",
        f"FactGraSS {kept}": f"mask:{twice}x{twice} | sjlt:{kept}",
        f"GraSS {kept}": f"mask:{4 * kept} | sjlt:{kept}",
        f"SJLT {kept}": f"sjlt:{kept}",
        f"random mask {side}x{side}": f"mask:{side}x{side}",
        f"selective mask {side}x{side}": f"selective:{side}x{side},file={masks}",
    }


def compress(
    model: nn.Module, task: Task, batch: Batch, spec: str, seed: int, *, shared: bool = False
) -> Float[Tensor, "example column"]:
    """Return compressed gradients of the losses; `shared`: one sketch of the whole model, the sum of its layers'."""
    parsed, components = parse_spec(spec), select_components(model, ("all",)).components
    columns = lay_out(components, parsed, "model" if shared else "component")
    compressors = [parsed.build(part.name, part.shape, seed, shared=shared) for part in components]
    sink = CompressingSink(compressors, [part.start for part in columns], max(part.stop for part in columns))
    found = []
    with GradientPass(model, components, FunctionObjective(task.losses)) as gradient_pass:
        for rows in torch.arange(len(batch[0])).split(AT_ONCE):
            sink.begin(len(rows), "cpu")
            gradient_pass.run((batch[0][rows], batch[1][rows]), sink)
            found.append(sink.gradients)
    return torch.cat(found)


def train_masks(path: Path, model: nn.Module, rows: Float[Tensor, "example column"], side: int, seed: int) -> None:
    """Train a mask for each layer from whole gradients of some examples, and write them."""
    components = select_components(model, ("all",)).components
    parts, masks = rows.split([part.size for part in components], dim=1), {}
    with progress(len(components), "Masks", unit="layers") as counter:
        for part, gradients in zip(components, parts, strict=True):
            matrices = gradients.view(-1, *part.shape)
            masks[part.name] = train_selective_mask(matrices, (side, side), Stream(seed, part.name), _MASKS).parts
            counter.advance()
    write_masks(path, masks)


def influence(name: str, model: nn.Module, task: Task, spec: str, seed: int) -> Scored:
    """Return influence with an empirical Fisher matrix for each layer, at the default damping."""
    started = time.perf_counter()
    train, queries = (compress(model, task, side, spec, seed) for side in (task.train, task.queries))
    columns = lay_out(select_components(model, ("all",)).components, parse_spec(spec))
    places = [slice(part.start, part.stop) for part in columns]
    fisher = accumulate_fisher([part.name for part in columns], places, train.split(AT_ONCE))
    return score_solved(name, partial(fisher.precondition, queries, DAMPING), train, time.perf_counter() - started)


def trak(name: str, models: list[nn.Module], task: Task, spec: str, seed: int) -> Scored:
    """Return TRAK's scores: `mean[phi(q)^T (Phi^T Phi / n + d I)^-1 phi(i)] mean[1 - p(i)]` over models.

    phi is the sketched gradient of the margin `log(p / (1 - p))`: that of the loss over `p - 1`, whose sign cancels.
    """
    started = time.perf_counter()
    kernels, doubts, numbers = [], [], 0
    for number, model in enumerate(models):
        sides = []
        for batch in (task.train, task.queries):
            with torch.no_grad():
                unsure = doubt(task.losses(model, batch)).float()
            sides.append(compress(model, task, batch, spec, seed + number, shared=True) / unsure[:, None])
            doubts += [unsure] if batch is task.train else []
        train, queries = sides
        numbers += train.shape[1]
        kernels.append(solve_rows(queries, train) @ train.T)
    scores = torch.stack(kernels).mean(0) * torch.stack(doubts).mean(0)
    return Scored(name, scores.double().numpy(), time.perf_counter() - started, numbers)


def _gates(found: dict[str, Estimate]) -> list[Gate]:
    def of(start: str) -> Estimate:
        return next(estimate for name, estimate in found.items() if name.startswith(start))

    fact, logra = of("influence, FactGraSS"), of("influence, LoGra")
    grass, sjlt = of("TRAK, GraSS"), of("TRAK, SJLT")
    return [
        Gate("influence with FactGraSS: lower end of its interval above zero by", fact.low, ">="),
        Gate("influence with FactGraSS: LDS below LoGra's by", logra.value - fact.value, "<=", LIKE),
        Gate("TRAK with GraSS: LDS below that with SJLT by", sjlt.value - grass.value, "<=", LIKE),
        Gate("TRAK with GraSS: LDS above grad-dot's by", grass.value - found["grad-dot"].value, ">="),
    ]
