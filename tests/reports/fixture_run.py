"""A run directory that looks like a real one: a small chat model, 1,824 pairs, four questions, every table.

The numbers are drawn, but they keep the promises of a run: component scores and token scores sum to the score.
"""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

LAYERS = 12
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
COMPONENTS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{module}.weight" for layer in range(LAYERS) for module in MODULES),
    "model.norm.weight",
)
SYSTEM = "You are a helpful AI assistant."
TEXTS = json.loads(Path(__file__).with_name("fixture_texts.json").read_text(encoding="utf-8"))
PAIRS, QUERIES = TEXTS["pairs"], TEXTS["queries"]
POPULATION = 1824


def write_fixture_run(
    folder: Path,
    *,
    tables: tuple[str, ...] = ("components", "tokens"),
    hostile: str = "",
    seed: int = 0,
    chat: bool = False,
    **info,
) -> Path:
    """Write a run into `folder`.

    `hostile` is added to every text, `tables` names the optional tables to write, `chat` makes conversations with one
    system prompt of all texts, `info` replaces parts of run.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    examples = [_example(number, hostile) for number in range(len(PAIRS))]
    queries = [_query(number, hostile) for number in range(len(QUERIES))]
    scores, components, tokens, distribution, groups = [], [], [], {}, {}
    for query in queries:
        values = _scores(query, examples, random)
        population = np.concatenate([values, random.standard_t(3, POPULATION - len(values)) * 0.03])
        distribution[query["query_id"]] = _distribution(population)
        groups[query["query_id"]] = _groups(examples, values, random)
        for end, order in (("proponent", np.argsort(-values)), ("opponent", np.argsort(values))):
            for rank, row in enumerate(order[:12], start=1):
                pair = {"query_id": query["query_id"], "example_id": examples[row]["example_id"]}
                percentile = 100 * float(np.mean(population < values[row]))
                score = float(values[row])
                scores.append(
                    {
                        **pair,
                        "end": end,
                        "rank": rank,
                        "row": examples[row]["row"],
                        "score": score,
                        "percentile": percentile,
                    }
                )
                if end == "proponent" or row not in np.argsort(-values)[:12]:
                    components += [{**pair, **part} for part in _split_components(score, random)]
                    tokens += [{**pair, **part} for part in _split_tokens(score, examples[row], query, random)]
    if chat:
        for row in (*examples, *queries):
            row["messages"] = json.dumps(_turns(row.pop("prompt"), row.pop("completion")))
            row |= {"prompt": None, "completion": None}
    _write(folder, "scores", scores)
    _write(folder, "examples", examples)
    _write(folder, "queries", queries)
    optional = {"components": components, "tokens": tokens}
    for name in tables:
        _write(folder, name, optional[name])
    run = _run_json(distribution, groups, hostile) | info
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    return folder


def _turns(prompt: str, answer: str) -> list[dict]:
    roles = ("system", "user", "assistant")
    return [{"role": role, "content": text} for role, text in zip(roles, (SYSTEM, prompt, answer), strict=True)]


def _write(folder: Path, name: str, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")


def _tokens(prompt: str, answer: str) -> tuple[list[str], list[bool]]:
    """Chat-template tokens; only the answer and the end marker enter the loss."""
    turn = ["<|im_start|>", "system", "\n", *_pieces(SYSTEM), "<|im_end|>", "\n", "<|im_start|>", "user", "\n"]
    turn += [*_pieces(prompt), "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    loss = [*_pieces(answer), "<|im_end|>"]
    return [*turn, *loss, "\n"], [False] * len(turn) + [True] * len(loss) + [False]


def _pieces(text: str) -> list[str]:
    """Words with their leading space, long ones in two, punctuation apart: roughly what a real vocabulary does."""
    pieces = []
    for word in re.findall(r"\s?\w+|\s?[^\w\s]|\s", text):
        pieces += [word] if len(word) < 9 else [word[:5], word[5:]]
    return pieces


def _example(number: int, hostile: str) -> dict:
    prompt, answer, source = PAIRS[number].values()
    tokens, targets = _tokens(prompt, answer + hostile)
    return {
        "example_id": f"{source}-{number:04d}",
        "row": number * 61,
        "text": None,
        "prompt": prompt,
        "completion": answer + hostile,
        "messages": None,
        "source": source + hostile,
        "label": None,
        "length": len(tokens),
        "duplicates": 3 if number == 12 else 1,
        "tokens": tokens,
        "targets": targets,
    }


def _query(number: int, hostile: str) -> dict:
    prompt, answer = QUERIES[number].values()
    tokens, targets = _tokens(prompt + hostile, answer)
    return {
        "query_id": f"q{number}",
        "row": number,
        "text": None,
        "prompt": prompt + hostile,
        "completion": answer,
        "messages": None,
        "generated": number != 3,
        "loss": 0.31 + 0.4 * number,
        "tokens": tokens,
        "targets": targets,
    }


def _words(text: str) -> set[str]:
    return {word.casefold() for word in re.findall(r"\w{3,}", text)}


def _scores(query: dict, examples: list[dict], random: np.random.Generator) -> np.ndarray:
    asked = _words(query["prompt"] + " " + query["completion"])
    shared = [len(asked & _words(row["prompt"] + " " + row["completion"])) for row in examples]
    return 0.02 * np.array(shared) ** 1.5 + random.normal(-0.03, 0.07, len(examples))


def _split_components(score: float, random: np.random.Generator) -> list[dict]:
    layer = np.concatenate([[3.0], np.repeat(np.arange(LAYERS), len(MODULES)), [LAYERS]])
    depth = np.exp(-((layer - 8) ** 2) / 12)
    shares = random.normal(0.5, 0.6, len(COMPONENTS)) * depth * random.gamma(1.0, 1.0, len(COMPONENTS))
    shares /= shares.sum()
    return [{"component": name, "score": float(score * share)} for name, share in zip(COMPONENTS, shares, strict=True)]


def _split_tokens(score: float, example: dict, query: dict, random: np.random.Generator) -> list[dict]:
    asked = _words(query["completion"])
    weights = np.zeros(len(example["tokens"]))
    for position, (token, target) in enumerate(zip(example["tokens"], example["targets"], strict=True)):
        if target:
            weights[position] = random.normal(0.4, 0.5) + 2.0 * bool(_words(token) & asked)
    weights *= score / max(abs(weights.sum()), 2.0)
    weights[np.flatnonzero(weights)[-1]] += score - weights.sum()
    return [
        {"position": position, "token": token, "score": float(weight)}
        for position, (token, weight) in enumerate(zip(example["tokens"], weights, strict=True))
    ]


def _distribution(population: np.ndarray) -> dict:
    counts, edges = np.histogram(population, bins=60)
    ordered = np.sort(np.maximum(population, 0))[::-1]
    total = ordered.sum()
    depths = (1, 3, 10, 30, 100, 300, 1000)
    return {
        "count": len(population),
        "mean": float(population.mean()),
        "std": float(population.std()),
        "min": float(population.min()),
        "max": float(population.max()),
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "sampled": len(population),
        "cumulative_share": [[depth, float(ordered[:depth].sum() / total)] for depth in depths],
    }


def _groups(examples: list[dict], values: np.ndarray, random: np.random.Generator) -> list[dict]:
    sizes = {"science": 640, "history": 310, "literature": 220, "personality": 380, "humour": 160, "geography": 70}
    sizes |= {"art": 6, "money": 30, "gossip": 8}
    names = dict.fromkeys(row["source"] for row in examples)
    rows = []
    for name in names:
        size = next(size for start, size in sizes.items() if name.startswith(start))
        chosen = [value for row, value in zip(examples, values, strict=True) if row["source"] == name]
        mean = float(np.mean(chosen)) * 0.2 + random.normal(0, 0.004)
        half = 0.2 / np.sqrt(size)
        rows.append(
            {
                "source": name,
                "examples": size,
                "sum": mean * size,
                "positive": (abs(mean) + 0.02) * size,
                "mean": mean,
                "low": mean - half,
                "high": mean + half,
            }
        )
    return rows


def _run_json(distribution: dict, groups: dict, hostile: str) -> dict:
    return {
        "format": 1,
        "vestige": "0.1.0",
        "created": "2026-01-12T10:24:31+00:00",
        "command": "vestige attribute --index demo/index --queries demo/questions.jsonl --method influence --tokens "
        f"--out demo/run{hostile}",
        "config": {"method": "influence"},
        "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.0.0"},
        "model": {"name": f"demo/smollm2-chat{hostile}", "fingerprint": "sha256:91fe03ab77c1", "parameters": 134515008},
        "data": {"name": "demo/pairs.jsonl", "fingerprint": "sha256:7c11e0d2a95b", "examples": POPULATION},
        "queries": {"name": "demo/questions.jsonl", "fingerprint": "sha256:aa01", "examples": len(QUERIES)},
        "method": "influence",
        "meaning": TEXTS["meaning"],
        "coverage": {
            "selected": 106204672,
            "total": 134515008,
            "fraction": 0.7895,
            "skipped": [{"name": "lm_head.weight", "parameters": 28311552, "reason": "tied"}],
        },
        "components": list(COMPONENTS),
        "seconds": 148.2,
        "peak_memory_bytes": 2254857830,
        "trust": {
            "validated": False,
            "checks": TEXTS["checks"],
        },
        "distribution": distribution,
        "groups": groups,
    }


if __name__ == "__main__":
    import sys

    print(write_fixture_run(Path(sys.argv[1])))
