"""`vestige data clean`: what becomes of the rows that a training or an audit has flagged."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from vestige.data import Example
from vestige.errors import CorruptFile, DataError, SpecError, UserError
from vestige.parsing import parse_json
from vestige.prepare._near import near_copies
from vestige.prepare._write import Prepared, check_same_result, fingerprint_of, read_rows, row_of, write_prepared
from vestige.runs import Audit
from vestige.settings import CleanSettings, verb

KIND = "clean"
AT_RISK = "at_risk.parquet"


class Flag(NamedTuple):
    """Why an example is flagged."""

    rule: str
    value: float | None
    rank: int | None


@verb(CleanSettings)
def clean(settings: CleanSettings) -> Prepared:
    """The rows after what was asked for has been done to the flagged ones; what was taken out lies in flagged.jsonl.

    There each row has a `problem`, the rule that flagged it, with `risk_value` and `risk_rank`; of a copy, `copy_of` is
    the id of the one that stays, and with `near` also how `similar` they are.

    Raises:
        DataError: The data or the list is absent or broken, or none of the flagged ids is in the data.
        SpecError: A rule was given for a list that has flags already.
    """
    examples = read_rows(settings)
    flags = read_flags(settings)
    known = {example.id for example in examples}
    if flags and not known & set(flags):
        raise DataError(
            f"None of the {len(flags):,} flagged ids, such as {next(iter(flags))!r}, is in {settings.data}. Give the "
            "data that was trained on or audited, with its ids."
        )
    fingerprint = _fingerprint(examples, flags)
    check_same_result(settings, KIND, fingerprint, frozenset())
    kept, removed = _acted(examples, flags, settings)
    present = sum(example.id in flags for example in examples)
    notes = [f"{present:,} of {len(examples):,} rows were flagged; {len(removed):,} were taken out."]
    if len(flags) > present:
        notes.append(f"{len(flags) - present:,} flagged ids are not in the data.")
    return write_prepared(settings, KIND, kept, fingerprint=fingerprint, flagged=removed, notes=notes)


def read_flags(settings: CleanSettings) -> dict[str, Flag]:
    """The flagged examples by id, with their reasons.

    Raises:
        DataError: There is no list.
        SpecError: A rule was given where the list has flags of its own, or none where it has not.
    """
    path = settings.flagged
    ruled = [name for name in ("measure", "threshold", "quantile") if getattr(settings, name) is not None]
    if path.is_dir() and not (path / AT_RISK).exists():
        return _of_audit(settings)
    if ruled:
        raise SpecError(f"--{ruled[0]} is for an audit; {path} says itself whom its rule flagged.")
    return _of_list(path / AT_RISK if path.is_dir() else path)


def _of_list(path: Path) -> dict[str, Flag]:
    try:
        rows = (
            [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else parquet.read_table(path, memory_map=False).to_pylist()
        )
    except FileNotFoundError:
        raise DataError(f"{path} is not there. Give a folder of `vestige train --alarm` or `vestige audit`.") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptFile(f"{path} does not read as a list of flagged examples: {error}.") from error
    if rows and not all(isinstance(row, Mapping) and {"example_id", "flagged"} <= set(row) for row in rows):
        raise DataError(f"{path}: every row needs `example_id` and `flagged`.")
    return {
        str(row["example_id"]): Flag(str(row.get("rule") or "flagged"), row.get("value"), row.get("rank"))
        for row in rows
        if row["flagged"]
    }


def _of_audit(settings: CleanSettings) -> dict[str, Flag]:
    """Examples that stand out in an audit by a threshold or as a share of all."""
    try:
        audit = Audit.open(settings.flagged)
    except UserError as error:
        raise DataError(
            f"{settings.flagged} is neither a training whose alarm has rung nor an audit ({error})."
        ) from error
    if settings.threshold is None and settings.quantile is None:
        raise SpecError("An audit gives evidence, no verdicts: say whom to flag with --threshold or --quantile.")
    measure = settings.measure or audit.preferred
    values = audit.values(measure)
    sign = -1 if audit.lowest_first(measure) else 1
    own = np.array([part == "data" for part in audit.examples["part"].to_pylist()])
    ids, risk = audit.examples["example_id"].to_pylist(), np.where(own, sign * values, np.nan)
    order = [int(row) for row in np.argsort(-risk, kind="stable") if np.isfinite(risk[row])]
    if settings.threshold is not None:
        chosen = [row for row in order if risk[row] >= sign * settings.threshold]
        rule = f"{measure} {'>=' if sign > 0 else '<='} {settings.threshold:g}"
    else:
        assert settings.quantile is not None
        chosen = order[: int(np.ceil(settings.quantile * len(order)))]
        rule = f"the {settings.quantile:.4g} of the examples that stand out most by {measure}"
    return {ids[row]: Flag(rule, float(values[row]), rank) for rank, row in enumerate(chosen, 1)}


def _acted(
    examples: Sequence[Example], flags: Mapping[str, Flag], settings: CleanSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows that stay, and rows that were taken out, each with its reason."""
    if settings.action == "weight":
        rows = [row_of(example) for example in examples]
        for row in rows:
            # What an earlier cleaning has given to a row that is not flagged now stays.
            row["weight"] = settings.weight if row["id"] in flags else row.get("weight", 1.0)
        return rows, []
    copies = _copies(examples, flags, settings.near) if settings.action == "deduplicate" else None
    kept, removed = [], []
    for example in examples:
        gone = example.id in flags if copies is None else example.id in copies
        if not gone:
            kept.append(row_of(example))
            continue
        flag = flags.get(example.id)
        reason = {"problem": flag.rule, "risk_value": flag.value, "risk_rank": flag.rank} if flag else {}
        reason |= {} if copies is None else {"problem": "copy of a flagged text", **copies[example.id]}
        removed.append(row_of(example) | reason)
    return kept, removed


def _copies(examples: Sequence[Example], flags: Mapping[str, Flag], near: float | None) -> dict[str, dict[str, Any]]:
    """Ids to take out, with what stays: the first of texts that are equal, or near, among which one is flagged."""
    if near is not None:
        rows = [row for row, example in enumerate(examples) if example.id in flags]
        found = near_copies([example.display for example in examples], rows, near)
        return {
            examples[row].id: {"copy_of": examples[copy.kept].id, "similar": round(copy.similarity, 4)}
            for row, copy in found.items()
        }
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(_normal(example.display), []).append(example.id)
    flagged = [group for group in groups.values() if any(each in flags for each in group)]
    return {name: {"copy_of": group[0]} for group in flagged for name in group[1:]}


def _normal(text: str) -> str:
    """The text without differences in case, spaces and punctuation."""
    return re.sub(r"\W+", " ", text.casefold()).strip()


def _fingerprint(examples: Sequence[Example], flags: Mapping[str, Flag]) -> str:
    return hashlib.sha256(f"{fingerprint_of(examples)}:{sorted(flags)!r}".encode()).hexdigest()
