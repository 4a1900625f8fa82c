"""A language model is trained on prompts by LoRA; when the alarm goes off it is measured once."""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vestige.files import write_durably
from vestige.measures import choose_layer, mahalanobis, psmi
from vestige.models import LoadedModel, Recipe, Step, shuffled_batches, train, trainable_copy
from vestige.progress import announce, progress
from vestige_recipes.memorization.prompts import Prompts, read
from vestige_recipes.memorization.targets import alarm, keep_measures, kept_measures

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


def followed(
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
    return {name: kept_measures(path)[1:] for name, path in files.items()}


def _follow(
    loaded: LoadedModel, prompts: Prompts, held: Prompts, plan: LoraPlan, seed: int, files: dict[str, Path]
) -> None:
    count, unfinished = len(prompts.data), files["end"].with_name("unfinished.pt")
    model = trainable_copy(loaded, lora_rank=plan.rank, seed=seed)
    device = next(model.parameters()).device.type
    steps = plan.epochs * -(-count // plan.batch_size)
    batches = shuffled_batches(prompts.data, np.arange(count), plan.batch_size, steps, seed)
    ids = [example.id for example in prompts.data.examples]

    def keep(moment: str, step: int) -> None:
        with torch.autocast(device, enabled=False):
            found = _at_the_alarm(model, prompts, plan) if moment == "trigger" else _read(model, prompts, plan)
        keep_measures(files[moment], ids, found, step)

    def keep_held(moment: str, step: int) -> None:
        keep_measures(files[moment], [example.id for example in held.data.examples], _read(model, held, plan), step)

    saved = _read_state(unfinished)
    if saved is None:
        keep("start", 0)
        keep_held("held start", 0)
    start = kept_measures(files["start"])[1]["answer_loss"]
    each = len(batches) // plan.epochs
    with progress(len(batches), "LoRA", unit="steps") as counter:
        counter.advance(0 if saved is None else saved["step"])

        def after(step: Step) -> None:
            counter.advance()
            if step.number % each or step.number == len(batches):
                return
            if not files["trigger"].exists():
                loss = _read(model, prompts, plan)["answer_loss"]
                announce(
                    f"Pass {step.number // each}: median loss {np.median(loss):.3f} of {np.median(start):.3f} nats"
                )
                if alarm(loss, start):
                    keep("trigger", step.number)
            _save_state(unfinished, step.state())

        # Rounded weights are not kept from step to step, for every step changes them.
        with torch.autocast(device, torch.bfloat16, enabled=plan.half, cache_enabled=False):
            train(model, prompts.data, batches, Recipe(plan.learning_rate), after, saved)
    if not files["trigger"].exists():
        announce("No alarm before the last step: the end of the training stands for the trigger.")
        keep("trigger", len(batches))
    keep_held("held end", len(batches))
    keep("end", len(batches))
    unfinished.unlink(missing_ok=True)


def _read(model: nn.Module, prompts: Prompts, plan: LoraPlan) -> dict[str, np.ndarray]:
    return read(model, prompts, token_budget=plan.token_budget).measures


def _at_the_alarm(model: nn.Module, prompts: Prompts, plan: LoraPlan) -> dict[str, np.ndarray]:
    layers = range(1, 1 + int(getattr(model.config, "num_hidden_layers", 1)))  # type: ignore[union-attr]
    found, states = read(model, prompts, token_budget=plan.token_budget, layers=list(layers))
    best = choose_layer(states, prompts.right, by="smi", directions=min(200, plan.directions))
    return found | {
        "psmi": psmi(states[max(states)], prompts.right, directions=plan.directions).mean,
        "psmi_best": psmi(states[best], prompts.right, directions=plan.directions).mean,
        "mahalanobis": mahalanobis(states[max(states)]),
        "layer_best": np.full(len(prompts.data), float(best)),
    }


def _save_state(path: Path, state: dict[str, Any]) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_durably(path, [content.getbuffer()])


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        return torch.load(path, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
        return None
