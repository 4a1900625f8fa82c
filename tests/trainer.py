"""A short run of the Trainer with its checkpoints, as the methods over checkpoints find them. Made in half a second."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.architectures import VOCABULARY


def trained_run(model: nn.Module, folder: Path, **given: Any) -> Any:
    """The Trainer after six steps, three epochs of two, with a checkpoint after each epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import Trainer, TrainingArguments

        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, VOCABULARY, (8,), generator=generator) for _ in range(8)]
        settings = {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "save_strategy": "epoch",
            "learning_rate": 1e-2,
            "weight_decay": 0.01,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(output_dir=str(folder), **(settings | given))
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    return trainer
