"""What is wrong with a reply, so that a paraphrase that is none does not pass for one."""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from vestige_recipes.prepare._replies import Reply

PROBLEMS = {
    "nothing": "there was no text to paraphrase",
    "empty": "the reply is empty",
    "refused": "the model or its filter refused",
    "cut": "the reply was cut at its greatest length",
    "too-long": "the text does not fit into the model",
    "same": "the reply is the text itself",
    "repeated": "the reply is an earlier paraphrase of the same row",
}

_REFUSAL = re.compile(
    r"(i['’]?m|i am)\s+(really\s+|very\s+)?(sorry|unable|afraid)\b.{0,40}\b(can|could|able|unable|not|assist|help)|"
    r"(sorry|unfortunately),?\s+(but\s+)?(i|as an ai)\b.{0,40}(n['’]t|not|unable)|"
    r"i\s+(can['’]?t|cannot|can not|won['’]?t|will not)\s+(help|assist|comply|paraphrase|rephrase|do that|provide)|"
    r"as an ai\b",
    re.IGNORECASE,
)


def problem_of(original: str, reply: Reply, earlier: Collection[str] = ()) -> str | None:
    """A key of `PROBLEMS`, or None for a paraphrase.

    Whether a model refuses is told from how its reply begins, unless the text itself begins so. Two texts are the same
    if they differ in capitals, blanks and marks only.
    """
    text = reply.text.strip()
    if not original:
        return "nothing"
    if reply.finish in ("refused", "too-long"):
        return reply.finish
    if not text:
        return "empty"
    if reply.finish == "length":
        return "cut"
    if _REFUSAL.match(text) and not _REFUSAL.match(original):
        return "refused"
    if bare(text) == bare(original):
        return "same"
    return "repeated" if bare(text) in {bare(each) for each in earlier} else None


def bare(text: str) -> str:
    """The letters and digits of a text in lower case; a text of marks alone as it is."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text.strip()


def told_problems(rows: Sequence[Mapping[str, Any]], flagged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each problem of rows that were kept and of rows that were left out."""
    lines = []
    for where, some in (("left out, in flagged.jsonl", flagged), ("kept, marked in `problem`", rows)):
        counts = Counter(str(row["problem"]) for row in some if "problem" in row)
        lines += [f"{count:,} {where}: {PROBLEMS[problem]}." for problem, count in counts.items()]
    return lines
