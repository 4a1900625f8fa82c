"""Questions to audit, and audits of them in a second."""

import random
from contextlib import contextmanager

import vestige
from vestige.measures import _forward

QUESTIONS, HELD = 36, 12


def questions(count, name, seed):
    """Rows of two choices; every sixth has the wrong one and says so."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        one, two = draw.sample(range(1, 30), 2)
        right, wrong = ("A", "B") if one > two else ("B", "A")
        noisy = number % 6 == 0
        prompt = f"Which is more? A: {one} B: {two} Answer:"
        rows.append(
            {
                "id": f"{name}-{number}",
                "prompt": prompt,
                "completion": wrong if noisy else right,
                "choices": ["A", "B"],
                "noisy": noisy,
            }
        )
    return rows


def settings(place, out, **changes):
    given = {
        "model": str(place / "run/checkpoint-30"),
        "checkpoints": str(place / "run"),
        "data": str(place / "train.jsonl"),
        "holdout": str(place / "held.jsonl"),
        "out": out,
        "flag": "noisy",
        "layers": ("all",),
        "directions": 200,
    }
    return given | changes


def simple(place, out, **changes):
    return vestige.audit(
        **settings(place, out, **{"checkpoints": None, "holdout": None, "layers": ("last",)} | changes)
    )


def evidence(folder):
    return (folder / "evidence.parquet").read_bytes(), (folder / "examples.parquet").read_bytes()


@contextmanager
def small_pieces():
    """Let a few batches be a piece."""
    before, _forward.PIECE_TOKENS = _forward.PIECE_TOKENS, 300
    try:
        yield
    finally:
        _forward.PIECE_TOKENS = before
