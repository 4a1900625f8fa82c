"""`vestige fix`: train again without some rows, ask the same questions again, and show what that changes."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from vestige.data import Example, load_examples, load_queries, prompt_of, record_of, write_rows
from vestige.errors import DataError, IndexMismatch, SpecError, differences, mismatch_message
from vestige.fixes._record import ARMS, RECORD, Arm, Asked, Fix, FixRecord, Outcome, Row, read_fix, write_fix
from vestige.fixes._rows import Choice, choose_rows, draw_control
from vestige.fixes._siblings import Siblings, find_siblings, flat_text
from vestige.fixes._trainings import MODELS, Questions, Recorded, Trainings, find_training
from vestige.jobs import JOB_FILES, is_worker, refuse_overwrite_by_ranks
from vestige.progress import announce
from vestige.reports import report
from vestige.runs import Scores, describe_process
from vestige.settings import FixSettings, with_settings
from vestige.storage import make_folder, remove_result, remove_strays, require_no_others

_RESULT = (RECORD, "report.html", "cleaned.*", "data/*", *(f"{MODELS}/{arm}-[0-9]*" for arm in ARMS), *JOB_FILES)
_FREE = ("out", "overwrite", "seed", "report_to")
"""Settings of a training that make no other fix."""


@with_settings(FixSettings)
def fix(settings: FixSettings) -> Fix | Siblings:
    """Train again without some rows of the data, ask the run's questions again, and compare.

    Writes the data without the rows, and trains models with the recorded settings and seeds: on all rows, without the
    removed ones, and without as many random ones. All take as many steps, so that they differ in rows alone.
    Interrupted at any moment, the same call continues; more seeds extend it; other settings are refused. The trainings
    can be shared by several workers.

    Returns:
        The comparison; with `dry_run` the plan of it, and with `more_like` the rows that are like the one named.

    Raises:
        SpecError: No training was recorded, no row or every row is to be removed.
        DataError: A row is not in the data.
        UserError: Something about the model, the data or the disk needs the caller.
        PieceFailed: Trainings failed every time they were tried; all others are done.
    """
    started = time.perf_counter()
    scores = Scores.open(settings.run)
    if settings.more_like is not None:
        return find_siblings(scores, settings.more_like, settings.k, settings.run)
    recorded = find_training(settings, scores.run)
    asked = _read_queries(settings, scores)
    expected = _read_expected(settings, asked)
    examples = _read_data(recorded)
    choice = choose_rows(settings, scores, [query.id for query in asked], examples)
    kept = _keep(recorded, choice, settings)
    questions = Questions.of(scores.run, asked, expected, recorded.settings)
    folder = settings.out
    assert folder is not None
    trainings = Trainings(recorded, questions, folder, tuple(kept), settings.seeds)
    record = _make_record(settings, scores, trainings, choice, kept)
    if settings.dry_run:
        return Fix(None, record)
    seeds = range(recorded.settings.seed, recorded.settings.seed + settings.seeds)
    record, old = _prepare_folder(settings, record, {(arm, seed) for arm in kept for seed in seeds})
    if old is not None:
        return old
    data, cleaned = _write_data(recorded, choice, kept, folder)
    record = record.model_copy(update={"cleaned": cleaned, "price": trainings.price()})
    if not is_worker():
        write_fix(folder, record)
        announce(f"{folder}: {record.price}.")

    def finish(outcomes: list[Outcome]) -> Fix:
        took = record.seconds + time.perf_counter() - started
        whole = record.model_copy(update={"outcomes": outcomes, "seconds": took, **describe_process()})
        write_fix(folder, whole)
        report(folder)
        return Fix(folder, whole)

    return trainings.run(kept, data, settings, finish)


def _read_data(recorded: Recorded) -> list[Example]:
    settings = recorded.settings
    try:
        return load_examples(settings.data, **settings.reading)
    except DataError as error:
        raise DataError(f"{error} The model was trained on it; type --train data=FILE if it lies elsewhere.") from error


def _read_queries(settings: FixSettings, scores: Scores) -> list[Example]:
    """Return the chosen queries of the run, with the answers that it explains."""
    wanted = [scores.query_id(name) for name in settings.queries] or scores.queries
    return [query for query in load_queries(str(settings.run), focus="read") if query.id in wanted]


def _read_expected(settings: FixSettings, asked: Sequence[Example]) -> dict[str, str]:
    """Return the right answers by the id of their query."""
    if settings.expect is None:
        return {}
    known = {query.id for query in asked}
    found = {one.id: one.extra.get("expected") or one.answer for one in load_queries(settings.expect, focus="read")}
    right = {name: str(text) for name, text in found.items() if name in known and text}
    if not right:
        raise DataError(
            f"--expect {settings.expect} has no right answer to {', '.join(map(repr, sorted(known)))}. Expected rows "
            "with the `id` of a query and `expected`, or a `completion`."
        )
    return right


def _keep(recorded: Recorded, choice: Choice, settings: FixSettings) -> dict[Arm, list[np.ndarray]]:
    """Return the rows that each training reads, ascending, by arm and seed."""
    members = recorded.members()
    allowed = np.array([row for row, one in enumerate(choice.examples) if members is None or one.id in members])
    removed = [row for row in choice.reasons if row in set(allowed.tolist())]
    if not removed:
        raise SpecError("None of the rows to remove was trained on, so a training without them is the same.")
    if len(removed) == len(allowed):
        raise SpecError("All rows that were trained on are to be removed, which leaves nothing. Remove fewer.")
    count, seed = settings.seeds, recorded.settings.seed
    kept: dict[Arm, list[np.ndarray]] = {"before": [allowed] * count}
    kept["after"] = [np.setdiff1d(allowed, removed)] * count
    if settings.control:
        drawn = [draw_control(choice, allowed, len(removed), seed + number) for number in range(count)]
        kept["control"] = [np.setdiff1d(allowed, rows) for rows in drawn]
    return kept


def _make_record(
    settings: FixSettings,
    scores: Scores,
    trainings: Trainings,
    choice: Choice,
    kept: Mapping[Arm, Sequence[np.ndarray]],
) -> FixRecord:
    recorded, questions = trainings.recorded, trainings.questions
    examples, whole = choice.examples, kept["before"][0]
    drawn = [np.setdiff1d(whole, rows) for rows in kept.get("control", ())]
    return FixRecord(
        **describe_process(),
        command=settings.command_line("fix"),
        config=settings.record(),
        identity=_identify(scores, recorded, choice, questions),
        run=str(settings.run),
        training=None if recorded.run is None else str(recorded.run.folder),
        data=str(recorded.settings.data),
        cleaned=None,
        removed=[
            Row(id=examples[row].id, row=row, reasons=why, source=examples[row].source, text=flat_text(examples[row]))
            for row, why in choice.reasons.items()
        ],
        control={number: [examples[row].id for row in rows] for number, rows in enumerate(drawn)},
        asked=[
            Asked(
                id=one.id,
                question=prompt_of(one),
                answer=one.answer,
                expected=questions.expected.get(one.id),
                explained=scores.query(one.id).explained,
            )
            for one in questions.queries
        ],
        price=trainings.price(),
        models=len(trainings.plan),
        notes=_note(settings, choice, len(np.setdiff1d(whole, kept["after"][0])), drawn, recorded),
    )


def _identify(scores: Scores, recorded: Recorded, choice: Choice, questions: Questions) -> dict[str, Any]:
    """Return everything that the answers follow from, but for the seeds, in JSON terms."""
    digest = hashlib.sha256()
    for example in choice.examples:
        digest.update(json.dumps(record_of(example, 0), sort_keys=True, default=str).encode())
    training = {name: value for name, value in recorded.settings.record().items() if name not in _FREE}
    training |= {"epochs": recorded.settings.passes}
    return {
        "run": f"{scores.run.method}, {scores.run.created}",
        "rows": digest.hexdigest(),
        "removed": [choice.examples[row].id for row in choice.reasons],
        "queries": [query.id for query in questions.queries],
        "expected": [f"{name}: {text}" for name, text in questions.expected.items()],
        **{f"training {name}": value for name, value in training.items()},
        "first seed": recorded.settings.seed,
    }


def _note(
    settings: FixSettings, choice: Choice, removed: int, drawn: Sequence[np.ndarray], recorded: Recorded
) -> list[str]:
    """Return what a reader should know of the comparison."""
    notes = []
    if copies := choice.copies:
        names = [choice.examples[row].id for row in copies]
        words = " ".join(f"--drop {name}" for name in names[:5])
        notes.append(
            f"{len(copies)} rows stay whose text is that of a removed one: {', '.join(names[:10])}. The model still "
            f"learns it from them. To remove them too: {words}"
        )
    if removed < len(choice.reasons):
        notes.append(f"{removed} of the {len(choice.reasons)} removed rows were trained on; the others change nothing.")
    if any(len(rows) < removed for rows in drawn):
        notes.append("The control leaves out fewer rows than were removed: there are too few others.")
    if recorded.settings.limit is not None:
        notes.append(
            f"Only the first {recorded.settings.limit:,} rows were trained on; the cleaned data hold no others."
        )
    seeds = f"{settings.seeds} seeds from {recorded.settings.seed} on" if settings.seeds > 1 else "one seed"
    notes.append(f"All models take the same number of steps; {seeds}. Losses are of the answers, in nats.")
    return notes


def _prepare_folder(
    settings: FixSettings, record: FixRecord, models: Set[tuple[Arm, int]]
) -> tuple[FixRecord, Fix | None]:
    """Return the record as an interrupted fix has left it, and the result where all of these models have answered."""
    folder = settings.out
    assert folder is not None
    if settings.overwrite:
        refuse_overwrite_by_ranks()
        remove_result(folder, _RESULT, RECORD)
    old = read_fix(folder)
    if old is None:
        require_no_others(folder, ())
    elif found := differences(old.identity, record.identity, {}, {}):
        raise IndexMismatch(mismatch_message(f"The fix in {folder}", found))
    elif models <= {(one.arm, one.seed) for one in old.outcomes} and not is_worker():
        announce(f"{folder}: this fix is finished; nothing was done.")
        return old, Fix(folder, old)
    make_folder(folder / MODELS)
    if not is_worker():
        remove_strays(folder)
    return record if old is None else record.model_copy(update={"seconds": old.seconds}), None


def _write_data(
    recorded: Recorded, choice: Choice, kept: Mapping[Arm, Sequence[np.ndarray]], folder: Path
) -> tuple[dict[Arm, list[Any]], str]:
    """Write the data without the removed rows and those of the other trainings, and return what each training reads."""
    source, parts = recorded.settings.data, folder / "data"
    make_folder(parts)

    def write(rows: Sequence[int] | np.ndarray, place: Path, stem: str) -> Path:
        wanted = {choice.examples[int(row)].row for row in rows}
        reading = {name: recorded.settings.reading[name] for name in ("where", "on_bad_text")}
        return write_rows(source, wanted, place, stem, **reading)

    cleaned = write([row for row in range(len(choice.examples)) if row not in choice.reasons], folder, "cleaned")
    split, count = recorded.settings.split_fraction < 1, len(kept["before"])
    data: dict[Arm, list[Any]] = {"before": [write(kept["before"][0], parts, "before") if split else source] * count}
    data["after"] = [write(kept["after"][0], parts, "after") if split else cleaned] * count
    if "control" in kept:
        data["control"] = [write(rows, parts, f"control-{number}") for number, rows in enumerate(kept["control"])]
    return data, cleaned.name
