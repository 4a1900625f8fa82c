"""What the tests of trainings share: rows, Trainers over them, and a plain reference for losses."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.architectures import CAUSAL, move_off_start, sequences
from vestige.data import NO_TARGET

DATA = sequences(12)


def rows(data=DATA) -> list[dict[str, Any]]:
    return [
        {
            "id": f"doc-{row}",
            "input_ids": ids.tolist(),
            "labels": torch.where(mask, ids, NO_TARGET).tolist(),
            "source": "books",
        }
        for row, (ids, mask) in enumerate(zip(data.ids, data.targets, strict=True))
    ]


def padded(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in features)
    assert all(set(row) <= {"input_ids", "labels"} for row in features)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [3] * (width - len(row["input_ids"])) for row in features]),
        "labels": torch.tensor([row["labels"] + [NO_TARGET] * (width - len(row["labels"])) for row in features]),
    }


def dropping_model(name: str) -> nn.Module:
    """A model of the table with dropout: its training draws random numbers at every step."""
    torch.manual_seed(0)
    model = move_off_start(CAUSAL[name.removesuffix("-lora")]())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    if not name.endswith("-lora"):
        return model
    settings = LoraConfig(r=3, lora_dropout=0.5, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, settings)


def trainer(
    folder: Path, name: str = "gpt2", steps: int = 6, data: Any = None, held_out: Any = None, **settings: Any
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        seed=5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{
            "per_device_train_batch_size": 4,
            "save_strategy": "no",
            "logging_strategy": "no",
            "dataloader_pin_memory": False,
        }
        | settings,
    )
    return Trainer(
        model=dropping_model(name),
        args=arguments,
        train_dataset=data if data is not None else rows(),
        eval_dataset=held_out,
        data_collator=padded,
    )


class Seen(TrainerCallback):
    """The rows that the model was really given, by their tokens, and the rates that were really applied."""

    def __init__(self, trainer):
        self.tokens, self.rates = [], []
        self.trainer = trainer
        trainer.model.register_forward_pre_hook(self._look, with_kwargs=True)
        trainer.add_callback(self)

    def _look(self, module, inputs, named):
        if torch.is_grad_enabled() and module.training:
            self.tokens += [row.tolist() for row in named["input_ids"]]

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.rates.append(self.trainer.optimizer.param_groups[0]["lr"])


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(value, copy) for (name, value), (twin, copy) in pairs)


def slow_loss(model: nn.Module, row: dict[str, Any]) -> float:
    """Mean cross-entropy of one row's targets, one row and one token at a time, in float64."""
    model = model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    terms = [
        -(logits[place - 1][label] - logits[place - 1].logsumexp(0)).item()
        for place, label in enumerate(row["labels"])
        if place and label != NO_TARGET
    ]
    return sum(terms) / len(terms)


def files_of(folder: Path) -> dict[str, bytes]:
    """The bytes of everything but the record of times."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
