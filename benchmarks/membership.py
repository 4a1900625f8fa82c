"""How well loss, LiRA and RMIA tell members, on the bank of a study: every model is the target once.

Type: vestige study memorization-planted --seeds 1 --out study; python benchmarks/membership.py study/seed-0/bank
"""

import argparse

import numpy as np

from vestige import Bank, measures
from vestige.evaluate import estimate_mean

DRAWS = 2_000


def main() -> None:
    """Print a table of AUC and TPR at 1 %, means over the targets with bootstrap intervals over them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bank", nargs="+")
    for path in parser.parse_args().bank:
        bank = Bank.open(path)
        print(f"\n{path}: {len(bank)} models, {len(bank.example_ids)} examples\n")
        print("| measure | AUC | TPR at 1 % FPR |\n| --- | --- | --- |")
        for name, scores in score_members(bank).items():
            found = [measures.attack(row, own) for row, own in zip(scores, bank.membership, strict=True)]
            cells = [
                "{:.3f} [{:.3f}, {:.3f}]".format(*estimate_mean(np.array(values), DRAWS, 0))
                for values in ([each.auc.value for each in found], [each.tpr_at[0.01].rate.value for each in found])
            ]
            print(f"| {name} | {' | '.join(cells)} |")


def score_members(bank: Bank) -> dict[str, np.ndarray]:
    """Return scores of membership by name, [target example]; the reference models are all others, or one of them."""
    gaps, chances, inside = bank.values("example_gap"), -bank.example_losses, bank.membership
    count, found = len(bank), {"loss": chances}
    others = [np.arange(count) != target for target in range(count)]

    def each(score) -> np.ndarray:
        return np.stack([score(target) for target in range(count)])

    found["LiRA, of gaps"] = each(lambda t: measures.lira(gaps[t], gaps, inside, left_out=~others[t]).score)
    found["LiRA offline, of gaps"] = each(
        lambda t: measures.lira_offline(gaps[t], gaps, inside, left_out=~others[t]).score
    )
    found["RMIA"] = each(lambda t: measures.rmia(chances[t], chances, inside, left_out=~others[t]))
    found["RMIA offline"] = each(
        lambda t: measures.rmia_offline(
            chances[t],
            chances[others[t]],
            inside[others[t]],
            slope=measures.fit_slope(chances[others[t]], inside[others[t]]),
        )
    )
    # The one reference model knows half of the examples, as one that somebody else trained may.
    found["RMIA, one reference model"] = each(
        lambda t: measures.rmia_offline(chances[t], chances[[(t + 1) % count]], slope=0.3)
    )
    return found


if __name__ == "__main__":
    main()
