"""Targets: models trained on halves of some examples, or by LoRA on prompts, and what is measured of them, when."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vestige.banks import Bank, bank_of
from vestige.data import NO_TARGET, Example, TokenizedData, make_batch, plan_batches
from vestige.errors import CorruptFile, IndexMismatch
from vestige.measures import (
    accuracy,
    brier,
    choose_layer,
    evidence_table,
    exposure,
    logit_gap,
    loss,
    mahalanobis,
    margin,
    min_k,
    min_k_plus_plus,
    psmi,
    read_evidence,
    token_scores,
    write_evidence,
)
from vestige.models import LoadedModel, batch_sharing, trainable_copy
from vestige.progress import announce, progress
from vestige.storage import make_folder, write_durably
from vestige.training import Recipe, Rows, Step, Unfinished, fit

TRIGGER = 0.05
"""The alarm goes off when the median training loss is below this share of its start."""

Examples = TypeVar("Examples")
Measures = dict[str, Float[np.ndarray, "example"]]
Early = Callable[[Measures, int], None]
"""Takes measures of a target's own examples at the trigger, and when that was."""
Train = Callable[[np.ndarray, int, Early], tuple[Measures, int]]
"""From rows and a seed to measures of all examples at the end, and when that was."""


class Targets(NamedTuple, Generic[Examples]):
    """A bank of models; each is a target once."""

    examples: Examples
    bank: Bank
    early: list[Measures]
    """Of each member, of the examples that it is trained on in ascending order: measures at the trigger."""
    late: list[Measures]
    """Of each member, of all examples: measures at the end."""
    moments: Int[np.ndarray, "member"]
    """When the trigger went off, in steps or epochs."""


def make_targets(
    examples: Examples,
    train: Train,
    out: Path,
    *,
    ids: Sequence[str],
    kept: Mapping[str, str],
    settings: Mapping[str, Any],
    models: int,
    seed: int,
) -> Targets[Examples]:
    """Return the bank in `out/bank` and its members' measures in `out/early` and `out/late`, made now or found there.

    Args:
        examples: What the targets are trained on.
        train: Trains one target.
        out: Folder of the targets.
        ids: Of the examples.
        kept: Names in the bank of measures at the end.
        settings: What decides the members beside rows and seeds.
        models: How many targets.
        seed: Of halves and trainings.
    """

    def run(rows: np.ndarray, run_seed: int) -> dict[str, np.ndarray]:
        def early(measures: Measures, moment: int) -> None:
            keep_measures(target_file(out / "early", rows), [ids[int(row)] for row in rows], measures, moment)

        late, moment = train(rows, run_seed, early)
        keep_measures(target_file(out / "late", rows), ids, late, moment)
        return {"query_loss": np.zeros(1), **{name: late[measure] for name, measure in kept.items()}}

    bank = bank_of(
        run, examples=ids, queries=1, out=out / "bank", settings=settings, subsets=models, seeds=1, seed=seed
    )
    early, late = (
        [read_measures(target_file(out / moment, np.flatnonzero(own)))[1:] for own in bank.membership]
        for moment in ("early", "late")
    )
    moments = np.array([moment for _, moment in early])
    return Targets(examples, bank, [each for each, _ in early], [each for each, _ in late], moments)


def alarm(loss: Float[np.ndarray, "example"], start: Float[np.ndarray, "example"]) -> bool:
    """Return whether the median training loss has fallen below the share `TRIGGER` of what it was at the start."""
    return float(np.median(loss)) < TRIGGER * float(np.median(start))


def claim_folder(folder: Path, made_of: str) -> None:
    """Reserve the folder for trainings that are made of this and nothing else.

    Raises:
        IndexMismatch: It holds trainings of something else.
    """
    make_folder(folder)
    path, digest = folder / "made-of.txt", hashlib.sha256(made_of.encode()).hexdigest() + "\n"
    if path.exists() and path.read_text() != digest:
        raise IndexMismatch(f"{folder} holds a training of another model, plan or data. Choose another --out.")
    write_durably(path, [digest.encode()])


def target_file(folder: Path, rows: np.ndarray) -> Path:
    """Where the measures of the target that was trained on these rows are."""
    return folder / f"{hashlib.sha256(np.asarray(rows, dtype=np.int64).tobytes()).hexdigest()[:16]}.parquet"


def keep_measures(path: Path, ids: Sequence[str], measures: Mapping[str, np.ndarray], step: int) -> None:
    """One target's measures of some examples at one step are on disk."""
    make_folder(path.parent)
    write_evidence(path, [evidence_table(ids, measures, checkpoint=step)])


def read_measures(path: Path) -> tuple[list[str], dict[str, Float[np.ndarray, "example"]], int]:
    """Ids, measures by name and the step, as `keep_measures` left them.

    Raises:
        CorruptFile: The file is not there although the model's numbers are.
    """
    if not path.exists():
        raise CorruptFile(
            f"{path} is missing, though its model is finished. Delete the study's folder and run it again."
        )
    table: pa.Table = read_evidence(path)
    names = [name for name in table.column_names if name not in ("checkpoint", "layer", "example_id")]
    found = {name: table[name].to_numpy() for name in names}
    return table["example_id"].to_pylist(), found, int(table["checkpoint"][0].as_py())


MEASURES = ("loss", "answer_loss", "logit_gap", "margin", "brier", "accuracy", "exposure", "min_k", "min_k_plus_plus")


class Prompts(NamedTuple):
    """Prompts that end with one token of an answer."""

    data: TokenizedData
    """Its targets are what a training's loss is over."""
    choices: Int[np.ndarray, "choice"]
    """The tokens that are offered, the same for every prompt."""
    right: Int[np.ndarray, "example"]
    """Number of the choice that the training label names, which may be wrong."""

    def at(self, rows: Int[np.ndarray, "row"]) -> "Prompts":
        """Return some of them."""
        return Prompts(self.data.subset(rows), self.choices, self.right[rows])


class Reading(NamedTuple):
    """What a model makes of prompts."""

    measures: dict[str, Float[np.ndarray, "example"]]
    """By name, see `MEASURES`."""
    states: dict[int, Float[np.ndarray, "example hidden"]]
    """At the place that predicts the answer, by layer; 0 are the embeddings."""


def make_prompts(
    texts: Sequence[str],
    ids: Sequence[Int[np.ndarray, "token"]],
    choices: Sequence[int],
    right: Sequence[int] | np.ndarray,
    *,
    answers_only: bool,
    name: str,
) -> Prompts:
    """Prompts of token ids, without the token of the answer, which is put at the end of each.

    Args:
        texts: As people read them, with the answer.
        ids: Tokens before the answer.
        choices: Token of each choice.
        right: Choice that each is trained with.
        answers_only: The loss of a training is over the answer's token alone, instead of the whole text.
        name: Of the data.
    """
    whole = [np.append(each, choices[answer]).astype(np.int32) for each, answer in zip(ids, right, strict=True)]
    targets = [np.arange(len(each)) >= (len(each) - 1 if answers_only else 1) for each in whole]
    digest = hashlib.sha256(b"".join(part.tobytes() for pair in zip(whole, targets, strict=True) for part in pair))
    examples = [Example(str(row), row, text=text) for row, text in enumerate(texts)]
    data = TokenizedData(examples, whole, targets, np.zeros(len(whole), dtype=bool), digest.hexdigest(), name)
    return Prompts(data, np.asarray(choices), np.asarray(right))


@torch.no_grad()
def read(model: nn.Module, prompts: Prompts, *, token_budget: int, layers: Sequence[int] = ()) -> Reading:
    """Measures of every prompt, float64, and the states of some layers (negative numbers count from the last).

    `loss` and the Min-K measures are over the targets, the others over the token of the answer. `margin` is that of its
    loss; `exposure` is that of the answer among the choices.
    """
    count = len(prompts.data)
    measures = {name: np.full(count, np.nan) for name in MEASURES}
    states: dict[int, np.ndarray] = {}
    for rows in plan_batches(prompts.data.lengths, token_budget, sharing=batch_sharing(model)):
        batch = make_batch(prompts.data, rows).to(next(model.parameters()).device)
        output: Any = model(input_ids=batch.input_ids, output_hidden_states=bool(layers), use_cache=False)
        places = torch.as_tensor(prompts.data.lengths[rows] - 2)
        for name, values in _measure(output.logits, batch.labels, places, prompts, rows).items():
            measures[name][rows] = values.double().cpu().numpy()
        for layer in layers:
            held = output.hidden_states[layer]
            own = held[torch.arange(len(rows)), places].float().cpu().numpy()
            number = layer % len(output.hidden_states)
            states.setdefault(number, np.zeros((count, own.shape[1]), dtype=np.float32))[rows] = own
    measures["margin"] = margin(measures["answer_loss"])
    return Reading(measures, states)


def _measure(logits: Tensor, labels: Tensor, places: Tensor, prompts: Prompts, rows: np.ndarray) -> dict[str, Tensor]:
    row, right = torch.arange(len(rows)), torch.as_tensor(prompts.right[rows])
    at = logits[row, places]
    answer = torch.as_tensor(prompts.choices)[right]
    chosen = at[:, torch.as_tensor(prompts.choices)]
    answered = token_scores(at[:, None], answer[:, None])
    found = {
        "answer_loss": loss(answered),
        "logit_gap": logit_gap(chosen, right),
        "brier": brier(chosen, right),
        "accuracy": accuracy(chosen, right),
        "exposure": _exposure(chosen, right),
    }
    wanted = labels[:, 1:] != NO_TARGET
    # Where only the answer counts, the vocabulary at all other places is not looked at again.
    several = bool((wanted.sum(1) > 1).any())
    scores = token_scores(logits[:, :-1], labels[:, 1:]) if several else answered
    return found | {"loss": loss(scores), "min_k": min_k(scores), "min_k_plus_plus": min_k_plus_plus(scores)}


def _exposure(chosen: Float[Tensor, "row choice"], right: Int[Tensor, "row"]) -> Float[Tensor, "row"]:
    # Ranks are all that counts: logits that are turned round rank as losses do.
    losses = -chosen.double().cpu().numpy()
    bits = [exposure(row[[own]], np.delete(row, own))[0] for row, own in zip(losses, right.tolist(), strict=True)]
    return torch.tensor(bits, dtype=torch.float64)


MOMENTS = ("start", "trigger", "end")


@dataclass(frozen=True)
class LoraPlan:
    """How prompts are learnt."""

    rank: int
    epochs: int
    batch_size: int
    learning_rate: float
    directions: int
    """Of PSMI."""
    token_budget: int
    """Most tokens in a batch that is only measured."""
    half: bool = True
    """A training multiplies in bfloat16, its weights are float32; measures are taken in float32."""


def follow_training(
    loaded: LoadedModel, prompts: Prompts, held: Prompts, plan: LoraPlan, seed: int, folder: Path
) -> dict[str, tuple[dict[str, np.ndarray], int]]:
    """Measures of the prompts at the start, at the trigger and at the end, each with its step; held-out ones too.

    Under `held start` and `held end` are those of prompts that are never trained on; states are looked at at the
    trigger alone, and without an alarm that is the end. What an earlier call has finished is read; an interrupted
    training goes on after its last whole pass.
    """
    names = [*MOMENTS, "held start", "held end"]
    files = {name: folder / f"{name.replace(' ', '-')}.parquet" for name in names}
    if not all(path.exists() for path in files.values()):
        _follow(loaded, prompts, held, plan, seed, files)
    return {name: read_measures(path)[1:] for name, path in files.items()}


def _follow(
    loaded: LoadedModel, prompts: Prompts, held: Prompts, plan: LoraPlan, seed: int, files: dict[str, Path]
) -> None:
    each = -(-len(prompts.data) // plan.batch_size)
    steps, recipe = plan.epochs * each, Recipe(plan.learning_rate, plan.batch_size, bf16=plan.half)
    model = trainable_copy(loaded, lora_rank=plan.rank, seed=seed)
    unfinished = Unfinished(files["end"].with_name("unfinished"), recipe, steps, seed)

    def measure(some: Prompts) -> dict[str, np.ndarray]:
        return read(model, some, token_budget=plan.token_budget).measures

    def keep(moment: str, step: int) -> None:
        some = held if moment.startswith("held") else prompts
        found = _measure_alarm(model, prompts, plan) if moment == "trigger" else measure(some)
        keep_measures(files[moment], [example.id for example in some.data.examples], found, step)

    if not unfinished.last:
        keep("start", 0)
        keep("held start", 0)
    start = read_measures(files["start"])[1]["answer_loss"]
    with progress(steps, "LoRA", unit="steps") as counter:
        counter.advance(unfinished.last)

        def after(step: Step) -> None:
            counter.advance()
            if step.number % each or step.number == steps:
                return
            if not files["trigger"].exists():
                loss = measure(prompts)["answer_loss"]
                announce(
                    f"Pass {step.number // each}: median loss {np.median(loss):.3f} of {np.median(start):.3f} nats"
                )
                if alarm(loss, start):
                    keep("trigger", step.number)
            unfinished.keep(step.trainer)

        rows = Rows(prompts.data, range(len(prompts.data)))
        fit(model, rows, recipe, steps=steps, seed=seed, after_step=after, resume=unfinished.path)
    model.eval()
    if not files["trigger"].exists():
        announce("No alarm before the last step: the end of the training stands for the trigger.")
        keep("trigger", steps)
    keep("held end", steps)
    keep("end", steps)
    unfinished.remove()


def _measure_alarm(model: nn.Module, prompts: Prompts, plan: LoraPlan) -> dict[str, np.ndarray]:
    layers = range(1, 1 + int(getattr(model.config, "num_hidden_layers", 1)))  # type: ignore[union-attr]
    found, states = read(model, prompts, token_budget=plan.token_budget, layers=list(layers))
    best = choose_layer(states, prompts.right, by="smi", directions=min(200, plan.directions))
    return found | {
        "psmi": psmi(states[max(states)], prompts.right, directions=plan.directions).mean,
        "psmi_best": psmi(states[best], prompts.right, directions=plan.directions).mean,
        "mahalanobis": mahalanobis(states[max(states)]),
        "layer_best": np.full(len(prompts.data), float(best)),
    }
