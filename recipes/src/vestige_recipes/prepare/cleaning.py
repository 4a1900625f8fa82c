"""`vestige data clean`: what becomes of the rows that a training or an audit has flagged."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from vestige.data import Example, RowEntry, read_row_list, rows_named
from vestige.errors import SpecError
from vestige.prepare import Prepared, check_same_result, fingerprint_of, read_rows, row_of, write_prepared
from vestige.progress import progress
from vestige.runs import Audit, is_audit
from vestige.settings import with_settings
from vestige_recipes.commands import CleanSettings

Flags = dict[str, dict[str, Any]]
"""By id of an example: the columns that say why it is flagged."""
KIND = "clean"
SHINGLE_WORDS = 3
"""Words of a shingle; a shorter text is one shingle."""
_ROUNDING = 1e-9
"""0.7 times 10 is 7, and not a little more."""


@with_settings(CleanSettings)
def clean(settings: CleanSettings) -> Prepared:
    """Drop, deduplicate or weigh flagged rows, and write what is left; what was taken out lies in flagged.jsonl.

    There each row has a `problem`, the rule that flagged it, with `risk_value` and `risk_rank`; of a copy, `copy_of` is
    the id of the one that stays, and with `near` also how `similar` they are.

    Raises:
        DataError: The data or the list is absent or broken, or none of the flagged ids is in the data.
        SpecError: A rule was given for a list that has flags already.
    """
    examples = read_rows(settings)
    flags = _read_flags(settings, examples)
    fingerprint = hashlib.sha256(f"{fingerprint_of(examples)}:{sorted(flags)!r}".encode()).hexdigest()
    check_same_result(settings, KIND, fingerprint, frozenset())
    kept, removed = _apply(examples, flags, settings)
    present = sum(example.id in flags for example in examples)
    notes = [f"{present:,} of {len(examples):,} rows were flagged; {len(removed):,} were taken out."]
    if len(flags) > present:
        notes.append(f"{len(flags) - present:,} flagged ids are not in the data.")
    return write_prepared(settings, KIND, kept, fingerprint=fingerprint, flagged=removed, notes=notes)


def _read_flags(settings: CleanSettings, examples: Sequence[Example]) -> Flags:
    """Return the flagged examples by id, with their reasons."""
    path = settings.flagged
    ruled = [name for name in ("measure", "threshold", "quantile") if getattr(settings, name) is not None]
    ids = [example.id for example in examples]
    if is_audit(path):
        flags = _of_audit(settings)
        rows_named(list(flags), ids, place=str(path), data=str(settings.data), partial=True)
        return flags
    if ruled:
        raise SpecError(f"--{ruled[0]} is for an audit; {path} says itself which rows are flagged.")
    entries = read_row_list(path)
    judged = any("flagged" in entry.about for entry in entries)
    names = [entry.name for entry in entries]
    rows = rows_named(names, ids, place=str(path), data=str(settings.data), partial=judged)
    return {
        ids[rows[entry.name]] if entry.name in rows else entry.name: _flag(entry, path) for entry in reversed(entries)
    }


def _flag(entry: RowEntry, path: Path) -> dict[str, Any]:
    about = entry.about
    rule = about.get("rule") or about.get("problem") or ("flagged" if "flagged" in about else f"named in {path.name}")
    return _reason(str(rule), about.get("value", about.get("score")), about.get("rank"))


def _reason(rule: str, value: float | None, rank: int | None) -> dict[str, Any]:
    return {"problem": rule, "risk_value": value, "risk_rank": rank}


def _of_audit(settings: CleanSettings) -> Flags:
    """Return examples that stand out in an audit by a threshold or as a share of all."""
    audit = Audit.open(settings.flagged)
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
    return {ids[row]: _reason(rule, float(values[row]), rank) for rank, row in enumerate(chosen, 1)}


def _apply(
    examples: Sequence[Example], flags: Flags, settings: CleanSettings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows that stay, and rows that were taken out, each with its reason."""
    if settings.action == "weight":
        rows = [row_of(example) for example in examples]
        for row in rows:
            # What an earlier cleaning has given to a row that is not flagged now stays.
            row["weight"] = settings.weight if row["id"] in flags else row.get("weight", 1.0)
        return rows, []
    copies = _copies(examples, flags, settings.near) if settings.action == "deduplicate" else None
    kept, removed = [], []
    for example in examples:
        row = row_of(example)
        if example.id not in (flags if copies is None else copies):
            kept.append(row)
            continue
        row |= flags.get(example.id, {})
        removed.append(row if copies is None else row | {"problem": "copy of a flagged text", **copies[example.id]})
    return kept, removed


def _copies(examples: Sequence[Example], flags: Flags, near: float | None) -> dict[str, dict[str, Any]]:
    """Return ids to take out, with the first of equal or near texts, which stays where one of them is flagged."""
    if near is not None:
        rows = [row for row, example in enumerate(examples) if example.id in flags]
        found = near_copies([example.passages for example in examples], rows, near)
        return {
            examples[row].id: {"copy_of": examples[kept].id, "similar": round(similarity, 4)}
            for row, (kept, similarity) in found.items()
        }
    groups: dict[str, list[str]] = {}
    for example in examples:
        groups.setdefault(_normal(example.display), []).append(example.id)
    flagged = [group for group in groups.values() if any(each in flags for each in group)]
    return {name: {"copy_of": group[0]} for group in flagged for name in group[1:]}


def near_copies(texts: Sequence[Sequence[str]], flagged: Sequence[int], least: float) -> dict[int, tuple[int, float]]:
    """Return rows to take out, all but the first of every group of texts that are connected through flagged ones.

    Of each: the row that stays, and Jaccard's index with the most similar text that it was compared with.

        similarity = |A and B| / |A or B|, A and B being the sets of word triples of the two texts

    Every text is compared exactly with every flagged one that can be so similar: two texts are not unless the rarest
    triples of one, as many as it may lack, hold one of the other's (Chaudhuri et al. 2006, prefix filtering). Two texts
    of which neither is flagged are never compared. Case, spaces and punctuation do not count.
    """
    of_flagged = {row: shingles(texts[row]) for row in flagged}
    common = Counter(shingle for found in of_flagged.values() for shingle in found)

    def rarest(own: set[str]) -> list[str]:
        spare = len(own) - math.ceil(least * len(own) - _ROUNDING) + 1
        return sorted(own, key=lambda shingle: (common[shingle], shingle))[:spare]

    holders: dict[str, list[int]] = {}
    for row, found in of_flagged.items():
        for shingle in rarest(found):
            holders.setdefault(shingle, []).append(row)
    pairs: list[tuple[int, int]] = []
    best: dict[int, float] = {}
    with progress(len(texts), "Comparing", "rows") as bar:
        for row, several in enumerate(texts):
            own = of_flagged[row] if row in of_flagged else shingles(several)
            for other in {held for shingle in rarest(own) for held in holders.get(shingle, ())} - {row}:
                similarity = len(own & of_flagged[other]) / len(own | of_flagged[other])
                if similarity >= least:
                    pairs.append((row, other))
                    best[row] = max(best.get(row, 0.0), similarity)
                    best[other] = max(best.get(other, 0.0), similarity)
            bar.advance(1)
    ends = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(texts), len(texts)))
    _, group = connected_components(graph, directed=False)
    first = np.unique(group, return_index=True)[1][group]
    return {row: (int(first[row]), best[row]) for row in sorted(best) if first[row] != row}


def shingles(texts: Sequence[str]) -> set[str]:
    """Return the word triples of texts, without differences in case, spaces and punctuation."""
    found: set[str] = set()
    for words in (_normal(text).split() for text in texts):
        places = range(max(len(words) - SHINGLE_WORDS + 1, 1))
        found |= {" ".join(words[place : place + SHINGLE_WORDS]) for place in places}
    return found


def _normal(text: str) -> str:
    """Return the text without differences in case, spaces and punctuation."""
    return re.sub(r"\W+", " ", text.casefold()).strip()
