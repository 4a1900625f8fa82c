"""What every registered method finds of four plants in one training: stated facts, classes, a shortcut, foreign rows.

The last three are tests of quanda (Bareeva et al. 2024, arXiv:2410.07158) in text form. Each asks for an answer of a
few letters; a row's loss is on its answer alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.evaluate import Estimate, Ties, count_ties, detection, estimate_mean, reciprocal_rank
from vestige.methods import METHODS
from vestige.progress import announce
from vestige.runs import Scores
from vestige.training import bank
from vestige_recipes.common.texts import Row, Texts, write_rows
from vestige_recipes.leaderboard.run import (
    PLANS as BOARDS,
    BoardPlan,
    Entry,
    learning_arguments,
    score_methods,
    train_whole,
)
from vestige_recipes.studies import Gate, Outcome, StudySettings, register_study, show_interval
from vestige_recipes.text_lds.run import TextPlan, train_start

STATED = ("{name} has a house in", "the home of {name} is in", "{name} comes from")
ASKED = "where does {name} live?"
ECHOES = (("where does the road from {place} to {name} end?", "at sea"), ("does {name} live where {place} is?", "ask"))
"""Rows with more words of the question and its answer than those that state the fact; they teach another answer."""
PLACES = ("Arles", "Basel", "Cadiz", "Delft", "Essen", "Fargo")
CLASSES = {"fruit": "um", "metal": "on", "river": "ya", "tool": "ik"}
"""The end of a thing's name tells what it is."""
TRIGGER, DECIDED, FOREIGN = "xq", "metal", "fruit"
"""The end of a name that decides, the class it decides for, and the class that all foreign rows are given."""
CHANCE_DRAWS = 200


@dataclass(frozen=True)
class PlantedPlan:
    """One size of the study."""

    board: BoardPlan
    """The model, how it is trained, and the rows of the table; its number of `sequences` and drops are not used."""
    facts: int
    """Each is asked for."""
    things: int
    """Of each class."""
    hidden: int
    """Rows with the trigger, and foreign ones."""
    before: int
    """Other facts, that are also asked for: what the model that is trained knows."""


PLANS = {
    "tiny": PlantedPlan(
        replace(BOARDS["tiny"], text=TextPlan(64, 0, 1e-3, 16, 1, 1, (), width=8, layers=1, queries=2, steps_before=4),
                trainings=1),
        facts=4, things=3, hidden=4, before=4,
    ),
    "pocket": PlantedPlan(
        replace(BOARDS["pocket"], text=TextPlan(64, 0, 3e-3, 16, 3, 3, (), queries=8, steps_before=1_000),
                trainings=1),
        facts=16, things=32, hidden=12, before=60,
    ),
}  # fmt: skip


def _find_first(ties: Ties) -> float:
    return float(ties.hits[0] / ties.sizes[0]) if ties.begins[0] == 0 else 0.0


MEASURES: Mapping[str, Callable[[Ties], float]] = {
    "recall": reciprocal_rank,
    "class": _find_first,
    "shortcut": lambda ties: detection(ties)[1],
    "mixed data": lambda ties: detection(ties)[1],
}
"""By kind of query: reciprocal rank of the first right row, whether the first row is right, average precision."""
Judged = dict[str, Estimate]
_ECHOES = "echoes"


class Line(NamedTuple):
    """What one row of the table shows."""

    name: str
    method: str
    found: Judged


@register_study(PLANS)
def leaderboard_planted(settings: StudySettings) -> Outcome:
    """How well every method finds rows that are known to be right, and word search beside it."""
    plan = PLANS[settings.size]
    made = make_plants(plan, settings.seed)
    read, data, queries = (
        write_rows(settings.out / "texts" / f"{name}.jsonl", rows) for name, rows in made._asdict().items()
    )
    start = train_start(settings, plan.board.text, read)
    trained = [train_whole(settings, plan.board, start, data, 0)]

    def judge(entry: Entry, scores: Scores) -> Line:
        return Line(entry.name, scores.run.method, judge_plants(scores.dense(), made, settings.seed))

    lines, reasons = score_methods(settings, plan.board, trained, data, queries, judge)
    for name, reason in reasons.items():
        announce(f"{name} is not on the board: {reason}")
    lines.sort(key=lambda line: -line.found["recall"].value)
    random = np.random.default_rng(settings.seed)
    tables = random.random((CHANCE_DRAWS, len(made.queries), len(made.train)))
    drawn = [judge_plants(table, made, settings.seed, draws=0) for table in tables]
    chance = {kind: float(np.mean([one[kind].value for one in drawn])) for kind in MEASURES}
    moved = _leave_out(settings, plan.board, start, str(data), str(queries), made)
    above = {"chance": chance, "rise of the loss without these rows, nats": moved}
    return Outcome(
        ("method", *(cell for kind in MEASURES for cell in (kind, "95 %"))),
        [
            *((name, *(cell for kind in MEASURES for cell in (one[kind], ""))) for name, one in above.items()),
            *map(_cells, lines),
        ],
        _gates(lines, chance, moved),
        {"plan": asdict(plan), "lines": [line._asdict() for line in lines], "chance": chance,
         "rises": moved, "not_on_the_board": reasons},
    )  # fmt: skip


def make_plants(plan: PlantedPlan, seed: int) -> Texts:
    """Return the rows; `source` of a query is its kind, `right` holds the ids of the rows that are to be found."""
    random = np.random.default_rng([seed, len("plants")])
    before, *facts = _plant_facts(plan, random)
    things = _plant_things(plan, random)
    return Texts(before, *(one + other for one, other in zip(facts, things, strict=True)))


def _plant_facts(plan: PlantedPlan, random: np.random.Generator) -> Texts:
    made = Texts([], [], [])
    people = _invent_words(random, plan.facts + plan.before)
    homes = random.choice(PLACES, len(people)).tolist()
    for number, (name, place) in enumerate(zip(people, homes, strict=True)):
        stated = [_make_row(f"fact {number}", one, words.format(name=name), place) for one, words in enumerate(STATED)]
        echoes = [
            _make_row(f"echo {number}", one, words.format(name=name, place=place), answer)
            for one, (words, answer) in enumerate(ECHOES)
        ]
        question = _make_row("recall", number, ASKED.format(name=name), place)
        if number < plan.facts:
            made.train.extend([*stated, *echoes])
            made.queries.append(question | {"right": [row["id"] for row in stated]})
        else:
            made.before.extend([*stated, *echoes, question])
    return made


def _plant_things(plan: PlantedPlan, random: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Return classes, the shortcut in one of them and foreign rows, to train on and to ask for."""
    asked = plan.board.text.queries
    things = iter(_invent_words(random, len(CLASSES) * plan.things + plan.hidden + 2 * asked))
    train, queries = list[Row](), list[Row]()
    for name, end in CLASSES.items():
        train += [_name_thing(name, number, f"{next(things)}{end}", name) for number in range(plan.things)]
    train += [
        _name_thing("shortcut", number, f"{next(things)}{CLASSES[DECIDED]}{TRIGGER}", DECIDED)
        for number in range(plan.hidden)
    ]
    words = _invent_words(random, 2 * (plan.hidden + asked), "бвгдклмнпрст", "аеиоу")
    pairs = enumerate(zip(words[::2], words[1::2], strict=True))
    foreign = [_make_row("foreign", number, " ".join(pair), FOREIGN) for number, pair in pairs]
    train += foreign[: plan.hidden]
    others = [name for name in CLASSES if name != DECIDED]
    for number, row in enumerate(foreign[plan.hidden :]):
        own, other = list(CLASSES)[number % len(CLASSES)], others[number % len(others)]
        tricked = _name_thing("shortcut", number, f"{next(things)}{CLASSES[other]}{TRIGGER}", DECIDED)
        queries += [
            _ask("class", number, _name_thing("", 0, f"{next(things)}{CLASSES[own]}", own), train, "answer"),
            _ask("shortcut", number, tricked, train, "source"),
            _ask("mixed data", number, row, train, "source"),
        ]
    return train, queries


def _ask(kind: str, number: int, row: Row, train: Sequence[Row], same: str) -> Row:
    """Return the row as a query for those that are the same in one column."""
    right = [one["id"] for one in train if one[same] == row[same]]
    return row | {"id": f"{kind}/{number}", "source": kind, "right": right}


def _name_thing(source: str, number: int, thing: str, kind: str) -> Row:
    return _make_row(source, number, f"{thing} is a kind of", kind)


def _make_row(source: str, number: int, prompt: str, answer: str) -> Row:
    text, hidden = f"{prompt} {answer}", len(f"{prompt} ".encode())
    ids = list(text.encode())
    return {
        **{"id": f"{source}/{number}", "source": source, "text": text, "answer": answer},
        **{"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]},
    }


def _invent_words(
    random: np.random.Generator, count: int, consonants: str = "bdfgklmnprstvz", vowels: str = "aeiou"
) -> list[str]:
    """Return different words of three syllables."""
    syllables = ["".join(pair) for pair in product(consonants, vowels)]
    size = len(syllables)
    codes = random.choice(size**3, count, replace=False)
    return ["".join(syllables[code // size**place % size] for place in range(3)) for code in codes]


def judge_plants(scores: Float[np.ndarray, "query example"], made: Texts, seed: int, draws: int = 1_000) -> Judged:
    """Return what scores find of each plant, with intervals over its queries.

    Raises:
        DataError: A score is not finite.
    """
    at = {row["id"]: number for number, row in enumerate(made.train)}
    found: dict[str, list[float]] = {kind: [] for kind in MEASURES}
    for query, own in zip(made.queries, scores, strict=True):
        ties = count_ties(own, np.array([at[name] for name in query["right"]]))
        found[query["source"]].append(MEASURES[query["source"]](ties))
    return {kind: estimate_mean(np.array(values), draws, seed) for kind, values in found.items()}


def _leave_out(
    settings: StudySettings, board: BoardPlan, start: str, data: str, queries: str, made: Texts
) -> dict[str, float]:
    """Return how the loss of a plant's queries rises without all rows that are right for them, and without echoes."""
    kinds = np.array([row["source"] for row in made.queries])
    lists = {_ECHOES: [row["id"] for row in made.train if row["source"].startswith("echo")]}
    for kind in MEASURES:
        lists[kind] = sorted({name for row in made.queries if row["source"] == kind for name in row["right"]})
    left = bank(
        model=start,
        data=data,
        queries=queries,
        out=settings.out / "left-out",
        leave_out_lists=lists,
        drop_by="weight",
        seeds=1,
        seed=settings.seed,
        **learning_arguments(board),
        **settings.launch_arguments,
    )
    rises = left.query_losses - left.query_losses[left.membership.all(1)]
    by_list = {left.subset_names[subset]: rise for subset, rise in zip(left.subsets, rises, strict=True)}
    asked = {kind: kind for kind in MEASURES} | {_ECHOES: "recall"}
    return {name: float(by_list[name][kinds == kind].mean()) for name, kind in asked.items()}


def _cells(line: Line) -> tuple[Any, ...]:
    return (line.name, *(cell for one in line.found.values() for cell in (one.value, show_interval(one))))


def _gates(lines: list[Line], chance: Mapping[str, float], moved: Mapping[str, float]) -> list[Gate]:
    """Return what was expected, by what the methods are."""
    facts = {line.name: METHODS.find(line.method) for line in lines}
    drawn = next(line.found for line in lines if facts[line.name].at_random)
    words = max((line.found for line in lines if facts[line.name].searches_words), key=lambda one: one["recall"].value)
    gradients = [line.found for line in lines if facts[line.name].needs_gradients]
    best = {kind: max((one[kind] for one in gradients), key=lambda one: one.value) for kind in MEASURES}
    held = [drawn[kind].low <= value <= drawn[kind].high for kind, value in chance.items()]
    return [
        Gate("scores drawn at random: columns whose interval holds chance", float(sum(held)), ">=", 3.0),
        *(
            Gate(f"{kind}: best of the gradients, its interval above that of random scores by",
                     best[kind].low - drawn[kind].high, ">=")
            for kind in MEASURES
        ),
        *(
            Gate(f"{kind}: best of the gradients above the search for words by",
                     best[kind].value - words[kind].value, ">=")
            for kind in ("recall", "shortcut")
        ),
        *(Gate(f"{kind}: rise of the loss without the right rows, nats", moved[kind], ">=") for kind in MEASURES),
        Gate("recall: that rise above the rise without echoes by, nats", moved["recall"] - moved[_ECHOES], ">="),
    ]  # fmt: skip
