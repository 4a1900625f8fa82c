"""Vestige on the benchmark's model and data, through its public functions, from rows of text to files."""

import shutil
from pathlib import Path

import numpy as np
from measure import Measurement, measure
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from workload import COMPONENTS, Workload

import vestige
from vestige.data import load_examples, tokenize
from vestige.methods import get_method, open_job
from vestige.settings import AttributeSettings


def check_tokens(workload: Workload, tokenizer: PreTrainedTokenizerFast) -> None:
    """Stop unless Vestige reads the rows as exactly the tokens and labels that the other engines get."""
    data = tokenize(load_examples(workload.rows()), tokenizer, max_length=None)
    for row, (tokens, skip) in enumerate(zip(workload.tokens, workload.prompts, strict=True)):
        first = max(skip, 1)
        assert data.input_ids[row].tolist() == tokens, f"{workload.name}: other tokens in row {row}"
        assert not data.targets[row][:first].any(), f"{workload.name}: other targets in row {row}"
        assert data.targets[row][first:].all(), f"{workload.name}: other targets in row {row}"


def build(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    workload: Workload,
    out: Path,
    *,
    compress: str,
    token_budget: int | None = None,
    dtype: str = "float16",
    seed: int = 0,
) -> Measurement:
    """`vestige.index`: everything from reading rows to the last file synced."""
    shutil.rmtree(out, ignore_errors=True)
    rows = workload.rows()
    return measure(
        lambda: vestige.index(
            model=model,
            tokenizer=tokenizer,
            data=rows,
            out=out,
            components=COMPONENTS,
            compress=compress,
            dtype=dtype,
            token_budget=token_budget,
            seed=seed,
        ),
        leaves=out,
    )


def score_exactly(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    workload: Workload,
    queries: Workload,
    method: str = "grad-dot",
) -> tuple[Measurement, Measurement, np.ndarray]:
    """The scores [query, example] of `vestige attribute` without an index, and what they cost.

    First the queries' vectors, with the curvature that the method measures, then the pass over the training data;
    ranking and files come after.
    """
    settings = AttributeSettings(
        model=model,
        tokenizer=tokenizer,
        data=workload.rows(),
        queries=queries.rows(),
        out=Path("unused"),
        components=COMPONENTS,
        method=method,
        options={"labels": "data"} if method == "ekfac" else {},
        damping=0.1,
        answer="given",
    )
    found = get_method(method, **settings.options)
    scores = np.zeros((len(queries.tokens), len(workload.tokens)))
    with open_job(settings, found) as job:
        before = measure(lambda: found.prepare(job))

        def stream() -> None:
            for block in found.blocks(job):
                scores[:, block.rows.numpy()] = block.scores.numpy()

        return before, measure(stream), scores


def attribute(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    workload: Workload,
    queries: Workload,
    method: str,
    out: Path,
) -> Measurement:
    """`vestige.attribute` on the live model, from rows of text to the run on the disk; no checks of trust."""
    shutil.rmtree(out, ignore_errors=True)
    rows, asked = workload.rows(), queries.rows()
    return measure(
        lambda: vestige.attribute(
            model=model,
            tokenizer=tokenizer,
            data=rows,
            queries=asked,
            out=out,
            components=COMPONENTS,
            method=method,
            options={"labels": "data"} if method == "ekfac" else {},
            damping=0.1,
            answer="given",
            dense=True,
            trust=False,
            k=1,
        )
    )
