"""The commands that make something: an index, a run, an audit, models, a selection, an evaluation, data."""

import shlex
import sys
from collections.abc import Sequence
from functools import partial
from typing import get_args

from vestige import data, runs, settings, workspace
from vestige.errors import UserError
from vestige.progress import format_seconds, is_verbose
from vestige.registry import Command, command, make_command
from vestige.terminal import lines_of_facts, say, shorten, show

SOMETHING_BAD = 1
SHOWN_QUERIES, SHOWN_PROPONENTS, SHOWN, SHOWN_LETTERS = 10, 5, 8, 500
"""What fits on a screen; the run holds everything."""


_MODEL_AND_DATA = "--model HuggingFaceTB/SmolLM2-135M-Instruct --data train.jsonl"
"""Of examples: a model of the hub, and data of one's own."""


@command(
    "doctor",
    settings.DoctorSettings,
    function="vestige.checks:doctor",
    order=10,
    examples=(
        f"vestige doctor {_MODEL_AND_DATA}",
        f"vestige doctor {_MODEL_AND_DATA} --components attention",
        f"vestige doctor {_MODEL_AND_DATA} --compress auto --disk 20GB",
    ),
    next_command="vestige index --model {model} --data {data} --out idx",
)
def doctor(given: settings.DoctorSettings) -> None:
    """Say whether it will work, what it covers, and what it will cost.

    Tries the model and the data with the settings that `vestige index` would get, and changes nothing. Ends with
    status 1 when something is bad.
    """
    report = doctor.call(given)
    say(report)
    if not report.ok:
        sys.exit(SOMETHING_BAD)


@command(
    "train",
    settings.TrainSettings,
    function="vestige.training:train",
    order=20,
    sweepable=True,
    examples=(
        f"vestige train {_MODEL_AND_DATA} --out trained --epochs 3",
        f"vestige train {_MODEL_AND_DATA} --out lora --lora-rank 16 --learning-rate 1e-3",
        f"vestige train {_MODEL_AND_DATA} --out watched --alarm --alarm-measure loss",
    ),
    next_command="vestige status {out}",
)
def train(given: settings.TrainSettings) -> None:
    """Train a model, in full or by LoRA, and keep what attribution and audit need.

    Checkpoints at fractions of epochs with the optimizer's state, the order of the examples, their losses, and, with
    --alarm, the list of those about to be memorized while the training goes on. Interrupted at any moment, the
    same command continues; with other settings it is refused, with the difference shown.
    """
    say(train.call(given))


@command(
    "index",
    settings.IndexSettings,
    function="vestige.indexes:index",
    order=30,
    sweepable=True,
    examples=(
        "vestige index HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --out idx",
        f"vestige index {_MODEL_AND_DATA} --out idx-attention --components attention",
        f"vestige index {_MODEL_AND_DATA} --out idx-small --compress 'mask:32x32 | sjlt:64'",
    ),
    next_command="vestige attribute QUESTION --index {out} --out run",
)
def index(given: settings.IndexSettings) -> None:
    """Store the compressed gradient of every training example.

    The estimate of time, memory and disk comes before the work. Interrupted at any moment, the same command
    continues; with other settings it is refused, with the difference shown.
    """
    index.call(given)
    say(workspace.describe_index(given.out))


@command(
    "precondition",
    settings.PreconditionSettings,
    function="vestige.curvature:precondition",
    order=40,
    sweepable=True,
    examples=(
        f"vestige index {_MODEL_AND_DATA} --out idx",
        "vestige precondition idx",
        "vestige precondition idx --out idx-preconditioned --damping 0.1",
    ),
    next_command="vestige attribute QUESTION --index {index} --out run",
)
def precondition(given: settings.PreconditionSettings) -> None:
    """Measure the curvature of an index, and precondition its gradients.

    `vestige attribute` measures it by itself when it is missing. Interrupted at any moment, the same command continues.
    """
    sizes = [len(block.matrix) for block in precondition.call(given).blocks]
    say(f"{given.index}: Fisher matrices of {len(sizes)} components, {min(sizes)} to {max(sizes)} numbers wide.")
    if given.out is not None:
        say(f"Preconditioned gradients: {given.out}")


@command(
    "bank",
    settings.BankSettings,
    function="vestige.training:bank",
    order=50,
    sweepable=True,
    examples=(
        f"vestige bank {_MODEL_AND_DATA} --out bank --subsets 4 --seeds 1 --epochs 1",
        f"vestige bank {_MODEL_AND_DATA} --out bank-sources --leave-source-out --seeds 1 --epochs 1",
        f"vestige bank {_MODEL_AND_DATA} --out bank-lora --subsets 2 --seeds 1 --lora-rank 8",
    ),
    next_command="vestige evaluate lds --bank {out} --methods influence --model {model} --data {data} "
    "--queries {queries} --out lds",
)
def bank(given: settings.BankSettings) -> None:
    """Train many models on parts of the data, and store what each makes of every example and query.

    Without a way of leaving out, the parts are random subsets. Interrupted at any moment, the same command continues;
    more --subsets or --seeds extend the bank; with other settings it is refused, with the difference shown.
    """
    made = bank.call(given)
    say(f"{given.out}: {made!r}, id {made.id}")


@command(
    "attribute",
    settings.AttributeSettings,
    function="vestige.methods:attribute",
    order=60,
    sweepable=True,
    writes_once=True,
    examples=(
        f"vestige index {_MODEL_AND_DATA} --out idx",
        'vestige attribute "Why is the sky blue?" --index idx --out run',
        "vestige attribute --data train.jsonl --queries train.jsonl --method bm25 --out run-words",
    ),
    next_command="vestige report {out}",
)
def attribute(given: settings.AttributeSettings) -> None:
    """Rank the training examples behind an answer.

    Writes a run: scores of proponents and opponents of every query, their texts, and how far to trust them. Answers and
    ranking are printed as soon as they are known, and the run is on disk then; the rest is added to it. Stopped in
    between, the same command adds what is missing.
    """
    show_ranking, answers = partial(_show_ranking, k=min(given.k, SHOWN_PROPONENTS)), _Answers()
    scores = attribute.call(given, on_answer=answers.show_one, on_answers=answers.show_all, on_ranking=show_ranking)
    _show_proofs(scores)
    _show_ladder(scores)
    _show_checks(scores)


@command(
    "fix",
    settings.FixSettings,
    function="vestige.fixes._fix:fix",
    order=65,
    examples=(
        f"vestige train {_MODEL_AND_DATA} --epochs 4 --learning-rate 1e-3 --out trained",
        "vestige attribute --model trained/checkpoint-8 --data train.jsonl --queries train.jsonl --out run",
        "vestige fix run --top 1 --queries pair-0 --seeds 1 --out fixed",
    ),
    next_command="vestige view {out}",
)
def fix(given: settings.FixSettings) -> None:
    """Remove rows that a run found, train again, and show the answers before and after.

    Writes the cleaned data, trains with the recorded settings on all rows, without the removed ones and without as many
    random ones, and asks the same questions again. Interrupted at any moment, the same command continues.
    """
    found = fix.call(given)
    show(found)
    if given.more_like is None and not given.dry_run:
        say(f"Cleaned data: {found.data}\nPage: {given.out}/report.html")


@command(
    "untrac",
    settings.UntracSettings,
    function="vestige.methods:untrac",
    order=80,
    sweepable=True,
    writes_once=True,
    examples=(
        f"vestige untrac {_MODEL_AND_DATA} --queries questions.jsonl --out run-sources",
        f"vestige untrac {_MODEL_AND_DATA} --queries questions.jsonl --level example --out run-examples",
        f"vestige untrac {_MODEL_AND_DATA} --queries questions.jsonl --lora-rank 8 --out run-lora",
    ),
    next_command="vestige report {out}",
)
def untrac(given: settings.UntracSettings) -> None:
    """Rank training sources or examples by unlearning.

    Climbs the loss of one set of examples after another and measures whose loss rises too. The model stays as it is.
    """
    scores = untrac.call(given)
    _show_ranking(scores, min(given.k, SHOWN))
    _show_checks(scores)


class _Answers:
    """Prints the first queries with their answers, the model's own in full and each as soon as it has ended."""

    def __init__(self) -> None:
        self._shown: set[int] = set()

    def show_one(self, queries: "Sequence[data.Example]", number: int) -> None:
        """Print an answer of the model. A query that chooses what is explained waits until that was found in it."""
        if number < SHOWN_QUERIES and queries[number].focus is None:
            self._show(queries, number, is_own=True)

    def show_all(self, queries: "data.TokenizedData", generated: Sequence[bool]) -> None:
        """Print the queries that were not printed before."""
        for number, is_own in enumerate(generated[:SHOWN_QUERIES]):
            if number not in self._shown:
                self._show(queries.examples, number, is_own=is_own)
        if len(queries) > SHOWN_QUERIES:
            say(f"... and {len(queries) - SHOWN_QUERIES} more queries.\n")

    def _show(self, queries: "Sequence[data.Example]", number: int, *, is_own: bool) -> None:
        """Print a query; before the first one, a system prompt that all share."""
        example, openings = queries[number], [_turns_of(query)[0] for query in queries]
        shared = len(openings) > 1 and len(set(openings)) == 1
        # A text without roles has one part, which is the answer.
        shared = shared and all(query.lacks_answer or len(_turns_of(query)) > 1 for query in queries)
        if shared and not self._shown:
            role, text = openings[0]
            say(f"{role}, of all queries: {_indent(text)}\n")
        self._shown.add(number)
        *turns, (role, answer) = _turns_of(example)[shared:]
        lines = [f"{example.id}, answered by the model" if is_own else example.id]
        lines += [f"  {role}: {_indent(_cut(text))}" for role, text in turns]
        lines.append(f"  {role}: {_indent(answer if is_own else _cut(answer))}")
        lines += [f"  {name}: {_indent(_cut(text))}" for name, text in _list_focus(example, answer)]
        say("\n".join(lines) + "\n")


def _turns_of(example: "data.Example") -> tuple[tuple[str, str], ...]:
    """Return the text of each role; for a query that is no conversation, the names of its columns stand for roles."""
    if example.messages:
        return tuple((turn.role, turn.content) for turn in example.messages)
    parts = {"prompt": example.prompt, "completion": example.completion, "text": example.text}
    return tuple((name, text) for name, text in parts.items() if text is not None) or (("tokens", example.display),)


def _list_focus(example: "data.Example", answer: str) -> list[tuple[str, str]]:
    """Return what of a query is explained: names of fields with their content."""
    focus = example.focus
    if focus is None:
        return []
    parts = [answer[slice(*span)] if isinstance(span, tuple) else span for span in focus.spans]
    weights = ", ".join(f"{weight:g}" for weight in focus.weights)
    found = {"instead of": focus.instead or "", "explained part": " … ".join(parts), "weights": weights}
    return [(name, text) for name, text in found.items() if text]


def _indent(text: str) -> str:
    return "\n    ".join(text.splitlines())


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"


def _show_ranking(scores: "runs.Scores", k: int) -> None:
    """Print the first `k` proponents of the first queries, and what they say."""
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.top(query, k)}\n{runs.conclude(scores, query)}\n")
    if len(scores.queries) > SHOWN_QUERIES:
        say(f"... and {len(scores.queries) - SHOWN_QUERIES} more queries.\n")


def _show_proofs(scores: "runs.Scores") -> None:
    """Print what moved the model to each answer, where the answer stands, and whether it is memorized."""
    for query in scores.queries[:SHOWN_QUERIES] if scores.has_verbatim else ():
        facts = {name.replace("_", " "): words for name, words in scores.proofs(query)._asdict().items()}
        say("\n".join([f"Three proofs of query {shorten(query)}:", *lines_of_facts(facts)]) + "\n")


def _show_ladder(scores: "runs.Scores") -> None:
    """Print where the first rows of each query stood at every rung, what each took, and what it bought."""
    if scores.run.ladder is None:
        return
    for query in scores.queries[:SHOWN_QUERIES]:
        say(f"{scores.ladder(query, SHOWN_PROPONENTS)}\n")
    for rung in scores.run.ladder.rungs:
        bought = "" if rung.lds is None else f", LDS {rung.lds[0]:.3f} [{rung.lds[1]:.3f}, {rung.lds[2]:.3f}]"
        bought += "" if rung.lds_of_all is None else f" by these candidates, {rung.lds_of_all[0]:.3f} by all rows"
        say(f"{rung.name}: {rung.rows:,} examples in {format_seconds(rung.seconds)}{bought}")
    say("")


def _show_checks(scores: "runs.Scores") -> None:
    """Print the checks, and what the sign means."""
    for check in scores.run.trust.checks:
        say(f"[{check.verdict}] {check.name}: {check.reading}")
    say(f"Sign: {scores.meaning.sign}")


@command(
    "audit",
    settings.AuditSettings,
    function="vestige.measures:audit",
    order=70,
    sweepable=True,
    writes_once=True,
    examples=(
        f"vestige audit {_MODEL_AND_DATA} --out audit",
        f"vestige audit {_MODEL_AND_DATA} --measures loss extraction --prefixes 4 --continuation 4 --out verbatim",
        f"vestige audit {_MODEL_AND_DATA} --limit 6 --out audit-some",
    ),
    next_command="vestige report {out}",
)
def audit(given: settings.AuditSettings) -> None:
    """Say for every example how well the model has memorized it, and how far that can be trusted.

    What it prints and stores is evidence about examples, no verdict on any of them. Measures that need classes, a bank
    or another model are null without them, and the run says why.
    """
    say(summarise_audit(audit.call(given)))


def summarise_audit(found: "runs.Audit") -> str:
    """Return the findings, planted secrets and notes; with --verbose also lists and tables of the measures."""
    if not is_verbose():
        more = f"Tables of all measures: vestige report {shlex.quote(str(found.folder))}, or --verbose."
        return "\n\n".join([str(found), *_exposures(found), *found.run.notes, more])
    try:
        parts = [str(found), str(found.top(SHOWN))]
    except UserError as error:
        parts = [str(found), str(error)]
    total = found.run.data.examples + (found.run.holdout.examples if found.run.holdout else 0)
    lines = [
        f"  {name}: {'none' if each.missing >= total else f'{total - each.missing:,} of {total:,}'} ({each.reason})"
        for name, each in found.run.measures.items()
        if each.reason
    ]
    parts += ["\n".join(["Not computed for every example:", *lines])] if lines else []
    last = found.checkpoints[-1]
    for truth in get_args(runs.Truth):
        rows = [each for each in found.judgement(truth, checkpoint=last) if each.layer in (None, found.run.main_layer)]
        parts += [runs.judgement_table(truth, rows)] if rows else []
    return "\n\n".join([*parts, *_exposures(found), *found.run.notes])


def _exposures(found: "runs.Audit") -> list[str]:
    """Return the planted secrets that are guessed soonest, if any were given."""
    last = found.checkpoints[-1]
    known = [
        (each.exposure, each) for each in found.run.canaries if each.checkpoint == last and each.exposure is not None
    ]
    known.sort(key=lambda pair: -pair[0])
    lines = [
        f"  {bits:5.2f} of {each.most:.2f} bits   rank {each.rank:,.4g} of {each.references + 1:,}   {each.id}"
        for bits, each in known[:SHOWN]
    ]
    title = f"Exposure of {len(known):,} planted secrets ({runs.CHANCE_BITS:.2f} bits on average by chance)"
    return ["\n".join([title, *lines])] if known else []


@command(
    "select",
    settings.SelectSettings,
    function="vestige.selection:select",
    order=90,
    sweepable=True,
    examples=(
        "vestige attribute --data train.jsonl --queries train.jsonl --method bm25 --dense --out run",
        "vestige select --scores run --budget 50% --out chosen",
        "vestige select --strategy random --data train.jsonl --budget 5 --out chosen-at-random",
    ),
    next_command="vestige train --model MODEL --data {out} --out trained",
)
def select(given: settings.SelectSettings) -> None:
    """Choose which examples to train on.

    By the scores of a run, by gradients, or at random: a smaller data set with a reason for every example in it.
    """
    show(select.call(given))


def _evaluation(kind: str, given: type[settings.Settings], order: int) -> Command:
    function = f"vestige.evaluate:{kind.replace('-', '_')}"
    return make_command(f"evaluate {kind}", given, function=function, order=order, sweepable=True)


lds = _evaluation("lds", settings.LdsSettings, 10)
sources = _evaluation("sources", settings.SourcesSettings, 20)
removal = _evaluation("removal", settings.RemovalSettings, 30)
tail_patch = _evaluation("tail-patch", settings.TailPatchSettings, 40)
mislabel = _evaluation("mislabel", settings.MislabelSettings, 50)
retrieval = _evaluation("retrieval", settings.RetrievalSettings, 60)
randomisation = _evaluation("randomisation", settings.RandomisationSettings, 70)
overlap = _evaluation("overlap", settings.OverlapSettings, 80)
selection = _evaluation("selection", settings.SelectionSettings, 90)
sketch = _evaluation("sketch", settings.SketchSettings, 100)
components = _evaluation("components", settings.ComponentsSettings, 110)

split = make_command("data split", settings.SplitSettings, function="vestige.prepare:split", order=50, sweepable=True)
tokenize = make_command(
    "data tokenize", settings.TokenizeSettings, function="vestige.prepare:tokenize", order=60, sweepable=True
)
