"""A Trainer of one's own, made the same again by every call, in the folder that the process works in."""

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from tests.training.workbench import padded
from vestige.data import load_examples, tokenize


def make_trainer() -> Trainer:
    """Return a Trainer that takes the steps that `vestige train` would with the settings of `TRAINED`."""
    tokenizer = AutoTokenizer.from_pretrained("tiny-model")
    data = tokenize(load_examples("train.jsonl"), tokenizer, max_length=96, name="train")
    rows = [
        {"id": example.id, "input_ids": list(map(int, ids)), "labels": np.where(mask, ids, -100).tolist()}
        for example, ids, mask in zip(data.examples, data.input_ids, data.targets, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir="own",
        max_steps=12,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        optim="adamw_torch",
        seed=0,
        data_seed=0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained("tiny-model"),
        args=arguments,
        train_dataset=rows,
        data_collator=padded,
        processing_class=tokenizer,
    )
