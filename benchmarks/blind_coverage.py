"""How often the blind baseline's 95 % interval holds 0.5 where membership is drawn at random, by number of texts.

Type: python benchmarks/blind_coverage.py [--draws 140]
"""

import argparse

import numpy as np

from vestige import measures

WORDS = 400
SIZES = ((60, 30), (200, 100))


def main() -> None:
    """Print the coverage with and without counting the fits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=140)
    draws = parser.parse_args().draws
    for size, count in SIZES:
        texts = _texts(size)
        held, alone = [], []
        for draw in range(draws):
            members = np.zeros(size, dtype=bool)
            members[np.random.default_rng(draw).permutation(size)[:count]] = True
            found = measures.blind_attack(texts, members, seed=draw).auc
            plain = measures.attack(measures.blind(texts, members, seed=draw), members).auc
            held.append(found.low <= 0.5 <= found.high)
            alone.append(plain.low <= 0.5 <= plain.high)
        print(
            f"{size} texts, {count} members, {draws} draws: {np.mean(held):.1%} hold 0.5; "
            f"{np.mean(alone):.1%} if the scores were independent",
            flush=True,
        )


def _texts(count: int) -> list[str]:
    """Texts of uneven lengths, whose words are as unequal as those of a language."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(WORDS)])
    chances = 1 / np.arange(1, WORDS + 1)
    return [" ".join(rng.choice(words, rng.integers(8, 60), p=chances / chances.sum())) for _ in range(count)]


if __name__ == "__main__":
    main()
