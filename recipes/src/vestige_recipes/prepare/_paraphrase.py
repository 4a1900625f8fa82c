"""`vestige data paraphrase`: every row in other words, with the id of the row that it came from."""

import time
from collections.abc import Sequence
from typing import Any

from vestige.data import Example
from vestige.errors import SpecError
from vestige.prepare import Prepared, check_same_result, fingerprint_of, read_rows, row_of, write_prepared
from vestige.progress import announce
from vestige.settings import verb
from vestige_recipes.data_commands import ParaphraseSettings
from vestige_recipes.prepare._endpoint import Endpoint
from vestige_recipes.prepare._problems import problem_of, told_problems
from vestige_recipes.prepare._replies import Paraphraser, Reply, request_for
from vestige_recipes.prepare._rules import Rules
from vestige_recipes.prepare._texts import Place, texts_of, with_texts
from vestige_recipes.prepare._work import Asked, Draft, Work

KIND = "paraphrase"
WITHOUT_EFFECT = frozenset({"concurrency", "retries", "timeout", "price_in", "price_out", "cache", "dry_run"})


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
    examples = read_rows(settings)
    fingerprint = fingerprint_of(examples)
    if not settings.dry_run:
        check_same_result(settings, KIND, fingerprint, WITHOUT_EFFECT)
    drafts = _drafts(examples, settings, paraphraser)
    work = Work(drafts, settings)
    if settings.dry_run:
        return Prepared(KIND, settings.out, 0, notes=(work.plan(), "Dry run: nothing was asked, nothing was written."))
    announce(work.plan())
    started = time.monotonic()
    work.do(paraphraser)
    rows, flagged = _rows(drafts, work.replies, keep_flagged=settings.keep_flagged)
    details = {"seconds": round(time.monotonic() - started, 3), **work.account(paraphraser)}
    notes = [*work.bill(paraphraser), *told_problems(rows, flagged)]
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, flagged=flagged, details=details, notes=notes)


def _paraphraser(settings: ParaphraseSettings) -> Paraphraser:
    given = [name for name in ("rules", "model", "api_model") if getattr(settings, name) not in (None, False)]
    if len(given) != 1:
        raise SpecError(
            f"Who paraphrases? Expected one of --rules, --model and --api-model, got {', '.join(given) or 'none'}."
        )
    if settings.rules:
        return Rules(settings.seed)
    if settings.api_model is not None:
        return Endpoint(settings)
    from vestige_recipes.prepare._local import LocalModel

    return LocalModel(settings)


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
