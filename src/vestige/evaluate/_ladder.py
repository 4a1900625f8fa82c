"""What each rung of a ladder buys: how well its scores predict the models of a bank."""

from functools import partial
from pathlib import Path

import numpy as np

from vestige.errors import SpecError
from vestige.evaluate._lds import datamodeling_score
from vestige.evaluate._scored import Scored
from vestige.evaluate._truth import check_disjoint, open_truth
from vestige.progress import announce
from vestige.runs import FIRST_RUNG, LadderRecord, Scores, add_part


def judge_ladder(run: str | Path, bank: str | Path, *, draws: int = 1000, seed: int = 0) -> LadderRecord:
    """Measure the linear datamodeling score of the first and the last rung, and add it to the run's record.

    Both are judged by the candidates alone, what is not scored counting nothing: so the difference is what exact scores
    buy. The first rung is judged by all rows as well.

    Args:
        run: Folder of a run with `rerank`, made with all scores (`dense`).
        bank: Folder of a bank of the same data and queries.
        draws: Of the bootstrap, for intervals.
        seed: Of the draws.

    Raises:
        SpecError: The run has one ranking alone.
        IndexMismatch: The bank is of other data or queries.
        UserError: The run lacks the scores of all its rows.
    """
    folder, truth = Path(run), open_truth(Path(bank))
    last = Scores.open(folder)
    ladder = last.run.ladder
    if ladder is None:
        raise SpecError(f"{folder} has one ranking alone. Make it with vestige attribute --rerank 50.")
    rungs = [Scored(one.run.method, one) for one in (Scores.open(folder / FIRST_RUNG), last)]
    for rung in rungs:
        if warning := check_disjoint(Path(bank), truth, rung, allowed=False):
            announce(warning)
    tables = [truth.scores_of(rung) for rung in rungs]
    below, exact = (np.stack([table.of_query(query) for query in range(table.shape[0])]) for table in tables)
    scored = np.isfinite(exact)
    measure = partial(
        datamodeling_score,
        membership=truth.bank.membership,
        outputs=truth.losses,
        subset=truth.bank.subsets,
        seeds=truth.bank.seeds,
        draws=draws,
        seed=seed,
    )
    of_all, of_some = measure(below).estimate, measure(np.where(scored, below, 0.0)).estimate
    found = list(ladder.rungs)
    found[0] = found[0].model_copy(update={"lds": tuple(of_some), "lds_of_all": tuple(of_all)})
    found[-1] = found[-1].model_copy(update={"lds": tuple(measure(np.where(scored, exact, 0.0)).estimate)})
    ladder = ladder.model_copy(update={"rungs": found})
    add_part(folder, last.run, "", ladder=ladder)
    return ladder
