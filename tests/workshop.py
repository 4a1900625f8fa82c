"""A folder to type commands in: a tiny model with its tokenizer, training data and questions. Made in a second."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 96
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIRS = [
    ("Why is the sky blue?", "Air scatters blue light more than red light.", "physics"),
    ("Why is grass green?", "Leaves are full of chlorophyll, which is green.", "biology"),
    ("What is the capital of France?", "The capital of France is Paris.", "places"),
    ("What is the capital of Italy?", "The capital of Italy is Rome.", "places"),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "books"),
    ("Who wrote Emma?", "Jane Austen wrote Emma.", "books"),
    ("How many legs has a spider?", "A spider has eight legs.", "biology"),
    ("How many legs has an ant?", "An ant has six legs, as all insects have.", "biology"),
    ("Is the moon a star?", "No, the moon is a rock that reflects sunlight.", "physics"),
    ("What is the boiling point of water?", "Water boils at one hundred degrees Celsius.", "physics"),
    ("Where do penguins live?", "Penguins live in the south, mostly in Antarctica.", "places"),
    ("What do bees make?", "Bees make honey and wax.", "biology"),
]


def furnish(folder: Path) -> Path:
    """Put `tiny-model/`, `train.jsonl` and `questions.jsonl` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"id": f"pair-{number}", "prompt": prompt, "completion": completion, "source": source}
        for number, (prompt, completion, source) in enumerate(PAIRS)
    ]
    write_rows(folder / "train.jsonl", rows)
    questions = ["Tell me why the sky looks blue.", "Which city is the capital of France?"]
    write_rows(folder / "questions.jsonl", [{"prompt": question} for question in questions])
    tokenizer = _tokenizer([f"{prompt} {completion}" for prompt, completion, _ in PAIRS])
    _model(len(tokenizer)).save_pretrained(folder / "tiny-model")
    tokenizer.save_pretrained(folder / "tiny-model")
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_lists(folder: Path, ids: list[str]) -> list[Path]:
    """The same rows as a report, a run and a person list them."""
    shown = [
        {
            "query_id": "q",
            "end": "proponent",
            "rank": rank,
            "example_id": name,
            "row": rank,
            "score": 2.5,
            "source": None,
        }
        for rank, name in enumerate(ids, 1)
    ]
    write_rows(folder / "shown.jsonl", shown)
    cells = [[str("" if cell is None else cell) for cell in row.values()] for row in shown]
    (folder / "shown.csv").write_text("\n".join(",".join(row) for row in [list(shown[0]), *cells]) + "\n")
    (folder / "run-q-rows.txt").write_text("\n".join(ids) + "\n")
    (folder / "typed.txt").write_text("\r\n".join(ids))
    parquet.write_table(pa.Table.from_pylist(shown), folder / "scores.parquet")
    return [folder / name for name in ("shown.jsonl", "shown.csv", "run-q-rows.txt", "typed.txt", "scores.parquet")]


def _tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )


def _model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


TOGETHER = """
import os, sys, time
if "vestige.cli" in sys.orig_argv:
    from vestige.launch import _work
    attempt = _work.Worker._attempt

    def attempt_and_wait(self, piece):
        done, until = attempt(self, piece), time.monotonic() + 60
        journal = self._job.path / "journal"
        while "TOGETHER" in os.environ and len(list(journal.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.02)
        return done

    _work.Worker._attempt = attempt_and_wait
"""
"""Behind a `sitecustomize.py`: with TOGETHER in the environment a worker goes on after its first piece only when
another has begun, for the first may leave it nothing."""
