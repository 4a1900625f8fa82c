"""The commands that make something: an index, a run, an audit, models, a selection, an evaluation, data."""

import shlex
import sys
from functools import partial
from typing import get_args

from vestige import runs, settings, workspace
from vestige.cli._shown import SHOWN, SHOWN_PROPONENTS, Answers, show_checks, show_ladder, show_proofs, show_ranking
from vestige.errors import UserError
from vestige.progress import is_verbose
from vestige.registry import Command, command, make_command
from vestige.terminal import say, show

SOMETHING_BAD = 1

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
    answers, ranking = Answers(), partial(show_ranking, k=min(given.k, SHOWN_PROPONENTS))
    scores = attribute.call(given, on_answer=answers.show_one, on_answers=answers.show_all, on_ranking=ranking)
    show_proofs(scores)
    show_ladder(scores)
    show_checks(scores)


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
    show_ranking(scores, min(given.k, SHOWN))
    show_checks(scores)


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
