"""Verbatim search: seconds to build, milliseconds a query, and every span held against a search without an index.

Tokens are drawn by Zipf's law, as words are, and every tenth row repeats a part of an earlier one, so that long runs
stand in several rows. Answers are pieces of rows with tokens exchanged, so that they have spans of all lengths. The
slow search goes through all tokens for every position of an answer.

    python benchmarks/verbatim.py [--tokens 1000000] [--vocabulary 49152] [--answers 200] [--compared 50] [--rounds 3]
"""

import argparse
import hashlib
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from measure import folder_bytes, measure, pin

pin()

import numpy as np  # noqa: E402 - libraries read the number of threads when they are imported

from vestige.data import Example, TokenizedData, TokenSearch  # noqa: E402
from vestige.indexes import open_search  # noqa: E402

ROW, ANSWER, LEAST = 256, 64, 4
"""Tokens of the longest row, of an answer, and of the shortest span."""


def main() -> None:
    """Print what building and asking take, and whether all spans are those of the slow search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--compared", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    data = draw(asked.tokens, asked.vocabulary)
    answers = draw_answers(data, asked.answers)
    with tempfile.TemporaryDirectory() as folder:
        build = partial(open_search, data=data, vocabulary=asked.vocabulary)
        built = [measure(partial(build, Path(folder) / str(number))) for number in range(asked.rounds)]
        size = folder_bytes(Path(folder) / "0")
        begun = time.process_time()
        search = build(Path(folder) / "0")
        opened = time.process_time() - begun
        seconds = []
        for answer in answers:
            begun = time.process_time()
            search.find(answer, LEAST)
            seconds.append(time.process_time() - begun)
        wrong, slow = compare(data, search, answers[: asked.compared])
    count = sum(map(len, data.input_ids))
    print(f"{count:,} tokens in {len(data):,} rows, vocabulary {asked.vocabulary:,}, answers of {ANSWER} tokens\n")
    print("| | |\n| :-- | --: |")
    print(f"| build, seconds (median of {asked.rounds}) | {median(one.wall_seconds for one in built):.2f} |")
    print(f"| build, CPU seconds | {median(one.cpu_seconds for one in built):.2f} |")
    print(f"| peak memory | {max(one.peak_bytes for one in built) / 1e6:.0f} MB |")
    print(f"| disk | {size / 1e6:.1f} MB |")
    print(f"| open again, with its sha256 compared, CPU seconds | {opened:.3f} |")
    median_ms, most_ms = 1e3 * median(seconds), 1e3 * max(seconds)
    print(f"| an answer, CPU ms (median, longest of {len(answers)}) | {median_ms:.1f}, {most_ms:.1f} |")
    print(f"| the slow search, CPU ms an answer | {1e3 * slow / asked.compared:.0f} |")
    print(f"| answers of which any span, count or row differs | {wrong} of {asked.compared} |")


def draw(tokens: int, vocabulary: int) -> TokenizedData:
    """Return rows of uneven lengths."""
    random = np.random.default_rng(0)
    chances = 1 / np.arange(1, vocabulary + 1)
    drawn = random.choice(vocabulary, size=tokens, p=chances / chances.sum()).astype(np.int32)
    rows, at = list[np.ndarray](), 0
    while at < tokens:
        row = drawn[at : at + random.integers(1, ROW + 1)]
        if len(rows) % 10 == 9:
            earlier = rows[random.integers(len(rows))]
            row = np.append(row[: len(row) // 2], earlier[: len(row) - len(row) // 2])
        rows.append(row)
        at += len(row)
    digest = hashlib.sha256(b"".join(row.tobytes() for row in rows)).hexdigest()
    examples = [Example(str(number), number, text="") for number in range(len(rows))]
    return TokenizedData(examples, rows, [np.ones(len(row), bool) for row in rows], np.zeros(len(rows), bool), digest)


def draw_answers(data: TokenizedData, count: int) -> list[np.ndarray]:
    """Return pieces of rows of which every token is exchanged with a chance of one in ten."""
    random, found = np.random.default_rng(1), list[np.ndarray]()
    whole = np.concatenate(data.input_ids)
    for _ in range(count):
        at = random.integers(len(whole) - ANSWER)
        answer = whole[at : at + ANSWER].copy()
        exchanged = random.random(ANSWER) < 0.1
        answer[exchanged] = random.choice(whole, int(exchanged.sum()))
        found.append(answer)
    return found


def compare(data: TokenizedData, search: TokenSearch, answers: list[np.ndarray]) -> tuple[int, float]:
    """Return how many answers have other spans in the slow search, and the seconds that it took."""
    whole = np.concatenate([np.append(row, -1) for row in data.input_ids])
    rows = np.repeat(np.arange(len(data)), [len(row) + 1 for row in data.input_ids])
    wrong, begun = 0, time.process_time()
    expected = [search_slowly(whole, rows, answer) for answer in answers]
    seconds = time.process_time() - begun
    for answer, one in zip(answers, expected, strict=True):
        found = {(span.start, span.stop): (span.occurrences, span.rows) for span in search.find(answer, LEAST)}
        wrong += found != one
    return wrong, seconds


def search_slowly(whole: np.ndarray, rows: np.ndarray, answer: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """Return occurrences and rows of every longest run, by going through all tokens from each position."""
    found, before = dict[tuple[int, int], tuple[int, int]](), 0
    padded = np.append(whole, np.full(len(answer), -1))
    for start in range(len(answer)):
        places, stop = np.flatnonzero(whole == answer[start]), start
        last = places
        while len(places):
            stop, last = stop + 1, places
            if stop == len(answer):
                break
            places = places[padded[places + stop - start] == answer[stop]]
        if stop - start >= LEAST and stop > before:
            found[start, stop] = (len(last), len(np.unique(rows[last])))
        before = max(before, stop)
    return found


if __name__ == "__main__":
    main()
