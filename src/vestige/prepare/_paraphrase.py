"""`vestige data paraphrase`: every row in other words, with the id of the row that it came from."""

import time
from collections.abc import Sequence
from threading import Lock
from typing import Any, NamedTuple

from vestige.data import Example, load_queries
from vestige.errors import SpecError
from vestige.prepare._problems import PROBLEMS, problem_of
from vestige.prepare._replies import Paraphraser, Reply, ReplyCache, Request, request_for
from vestige.prepare._rules import Rules
from vestige.prepare._texts import Place, texts_of, with_texts
from vestige.prepare._write import Prepared, check_same_result, fingerprint_of, row_of, write_prepared
from vestige.progress import announce, progress
from vestige.settings import ParaphraseSettings, verb

KIND = "paraphrase"
WITHOUT_EFFECT = frozenset({"concurrency", "retries", "timeout", "price_in", "price_out", "cache", "dry_run"})


class Asked(NamedTuple):
    """One text of one paraphrase of a row."""

    place: Place
    text: str
    request: Request


class Draft(NamedTuple):
    """One paraphrase of a row, with what it needs."""

    example: Example
    number: int
    """Which one, from 1."""
    asked: tuple[Asked, ...]


@verb(ParaphraseSettings)
def paraphrase(settings: ParaphraseSettings) -> Prepared:
    """Every row in other words, as rows of their own in `out`, each with the `original_id` of the row it came from.

    The paraphrases of row `a` have the ids `a-p1`, `a-p2` and so on. Replies are kept in a cache under a hash of what
    was asked: killed at any moment, the same call asks only for what is missing, and equal texts are asked for once.
    Replies that are empty, refused, cut or not different from the text go to flagged.jsonl, each with its `problem`.

    Args:
        settings: Checked settings.

    Returns:
        Where the rows are, how many, and how many are flagged.

    Raises:
        SpecError: Not exactly one of `rules`, `model` and `api_model` was given.
        DataError: The data is absent or broken, or a row lacks a part.
        UserError: The endpoint cannot be used, or left texts without a reply.
    """
    paraphraser = _paraphraser(settings)
    examples = _examples(settings)
    fingerprint = fingerprint_of(examples)
    check_same_result(settings, KIND, fingerprint, WITHOUT_EFFECT)
    drafts = _drafts(examples, settings, paraphraser)
    requests = list({asked.request.key: asked.request for draft in drafts for asked in draft.asked}.values())
    started = time.monotonic()
    replies = _replies(paraphraser, requests, settings)
    rows, flagged = _rows(drafts, replies, keep_flagged=settings.keep_flagged)
    details = {"seconds": round(time.monotonic() - started, 3)}
    return write_prepared(
        settings, KIND, rows, fingerprint=fingerprint, flagged=flagged, details=details, notes=_notes(flagged, rows)
    )


def _examples(settings: ParaphraseSettings) -> list[Example]:
    examples = load_queries(settings.data)
    if settings.limit is not None and settings.limit < len(examples):
        announce(f"Only the first {settings.limit:,} of {len(examples):,} rows are used (limit={settings.limit}).")
    return examples[: settings.limit]


def _paraphraser(settings: ParaphraseSettings) -> Paraphraser:
    given = [name for name in ("rules", "model", "api_model") if getattr(settings, name) not in (None, False)]
    if len(given) != 1:
        raise SpecError(
            f"Who paraphrases? Expected one of --rules, --model and --api-model, got {', '.join(given) or 'none'}."
        )
    return Rules(settings.seed)


def _drafts(examples: Sequence[Example], settings: ParaphraseSettings, paraphraser: Paraphraser) -> list[Draft]:
    drafts = []
    for example in examples:
        texts = texts_of(example, settings.fields)
        for number in range(1, settings.paraphrases + 1):
            asked = tuple(
                Asked(place, text, request_for(paraphraser.identity, text, number)) for place, text in texts.items()
            )
            drafts.append(Draft(example, number, asked))
    return drafts


def _replies(paraphraser: Paraphraser, requests: Sequence[Request], settings: ParaphraseSettings) -> dict[str, Reply]:
    """The reply to every request by its key: out of the cache, or asked for now."""
    cache = ReplyCache(settings.cache or settings.out / "replies")
    known = {request.key: Reply(text="") for request in requests if not request.text}
    keeps = not isinstance(paraphraser, Rules)
    if keeps:
        known |= {request.key: reply for request in requests if (reply := cache.get(request.key)) is not None}
    waiting = [request for request in requests if request.key not in known]
    lock = Lock()
    with progress(len(waiting), "Paraphrasing", unit="texts") as counter:

        def keep(request: Request, reply: Reply) -> None:
            if keeps:
                cache.put(request, reply)
            with lock:
                known[request.key] = reply
                counter.advance()

        paraphraser.ask(waiting, keep)
    return known


def _rows(
    drafts: Sequence[Draft], replies: dict[str, Reply], *, keep_flagged: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Good rows, and flagged ones."""
    rows: list[dict[str, Any]] = []
    flagged: list[dict[str, Any]] = []
    earlier: dict[tuple[str, Place], list[str]] = {}
    for draft in drafts:
        problems = []
        for asked in draft.asked:
            said = earlier.setdefault((draft.example.id, asked.place), [])
            reply = replies[asked.request.key]
            problems.append(problem_of(asked.text, reply, said))
            said.append(reply.text)
        problem = next((each for each in problems if each), None)
        row = _row(draft, replies) | ({"problem": problem} if problem else {})
        (rows if problem is None or keep_flagged else flagged).append(row)
    return rows, flagged


def _row(draft: Draft, replies: dict[str, Reply]) -> dict[str, Any]:
    texts = {asked.place: replies[asked.request.key].text.strip() for asked in draft.asked}
    row = row_of(with_texts(draft.example, texts))
    own = {"id": f"{draft.example.id}-p{draft.number}", "original_id": draft.example.id, "paraphrase": draft.number}
    return own | {name: value for name, value in row.items() if name not in own and name != "problem"}


def _notes(flagged: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[str]:
    counts: dict[str, int] = {}
    for row in [*flagged, *(row for row in rows if "problem" in row)]:
        counts[row["problem"]] = counts.get(row["problem"], 0) + 1
    where = "left out, in flagged.jsonl" if flagged else "kept, marked in `problem`"
    return [f"{count:,} {where}: {PROBLEMS[problem]}." for problem, count in counts.items()]
