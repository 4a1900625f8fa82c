"""What scoring while training costs: each step with the online engine against the same step without it.

Two copies of one GPT-2-style model train on the same random tokens. A round is one plain step and one scored step, in
an order that alternates, so that a slow moment of the machine falls on both. Printed are the median step of each kind,
the median of the rounds' own ratios, and the middle half of those ratios. One thread; the published figure, 7.5 %, is
of GPT2-Small on one A100 with batches of 16 and one validation example (arXiv:2406.11011), other hardware and sizes.

    python benchmarks/online_overhead.py [--seconds 12] [--validation 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from vestige.data import Batch
from vestige.online import OnlineAttribution

WIDTHS = (128, 256, 512)
LAYERS, BATCH, VOCABULARY = 4, 16, 2048


def model(width: int, tokens: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"n_embd": width, "n_layer": LAYERS, "n_head": width // 64, "n_positions": tokens}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **shape)).train()


def batch(examples: int, tokens: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (examples, tokens), generator=generator)
    return Batch(torch.arange(examples), ids, ids)


def stepper(width: int, tokens: int, validation: int | None) -> Callable[[int], float]:
    """A function that takes one step and says how many seconds it took."""
    trained = model(width, tokens)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    engine = None
    if validation is not None:
        engine = OnlineAttribution(trained, batch(validation, tokens, seed=10**6), optimizer=optimizer)

    def backward(number: int) -> None:
        given = batch(BATCH, tokens, seed=number)
        trained(input_ids=given.input_ids, labels=given.labels).loss.backward()

    def step(number: int) -> float:
        started = time.perf_counter()
        if engine is None:
            backward(number)
        else:
            with engine.step(range(BATCH)):
                backward(number)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def rounds(width: int, tokens: int, validation: int, seconds: float) -> list[tuple[float, float]]:
    """Seconds of a plain and a scored step, for as many rounds as fit, at least three; the first is not counted."""
    plain, scored = stepper(width, tokens, None), stepper(width, tokens, validation)
    found: list[tuple[float, float]] = []
    started = time.perf_counter()
    while len(found) < 4 or time.perf_counter() - started < seconds:
        number = len(found)
        if number % 2:
            second = scored(number)
            found.append((plain(number), second))
        else:
            found.append((plain(number), scored(number)))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=12.0, help="for each row of the table")
    parser.add_argument("--validation", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"GPT-2 style, {LAYERS} layers, vocabulary {VOCABULARY}, batch {BATCH}, {arguments.validation} validation")
    print("| width | tokens | rounds | plain step | scored step | overhead | middle half |")
    print("|---|---|---|---|---|---|---|")
    for width in WIDTHS:
        for tokens in (32, 128):
            found = rounds(width, tokens, arguments.validation, arguments.seconds)
            plain, scored = (statistics.median(side) for side in zip(*found, strict=True))
            ratios = sorted(second / first - 1 for first, second in found)
            low, _, high = statistics.quantiles(ratios, n=4)
            print(
                f"| {width} | {tokens} | {len(found)} | {1000 * plain:.0f} ms | {1000 * scored:.0f} ms "
                f"| {statistics.median(ratios):.1%} | {low:.1%} to {high:.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
