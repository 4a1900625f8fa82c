"""`vestige data multiple-choice`: questions with choices as prompts, with noise in the labels where it is asked for."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vestige.data import Encoder, Example, check_text, open_source, parse_record, place
from vestige.errors import DataError
from vestige.models import load_tokenizer
from vestige.prepare import Prepared, check_same_result, write_prepared
from vestige.settings import with_settings
from vestige_recipes.commands import MultipleChoiceSettings

KIND = "multiple-choice"
OPTIONS = "\n\nOPTIONS:\n"
"""Between a question and its options."""
CUT = "cut_words"
"""Column that says how many words a prompt lost."""
_TEMPLATE, _NOISE = 1, 2
"""Each draw of a row has a stream of its own: more noise changes no template."""
_SHOWN = 3
_WORD = re.compile(r"\S+")
_CONFESSION = re.compile(r"\s*(?:AITA|WIBTA)\b", re.IGNORECASE)

QUESTIONS = (
    "{question}\nWhich of the options below is right?",
    "Read the question and choose one option.\n\n{question}",
    "Question: {question}\nGive the label of the right option.",
    "Below is a question from an exam. Answer it with the label of one option.\n\n{question}",
    "{question}\n\nOnly one of these options answers the question. Name it.",
    "Pick the best answer.\n{question}",
    "A student was asked: {question}\nWhat should the student have answered?",
    "{question}\nYour choice among the following:",
    "Here is a problem. {question}\nThe solution is one of the options.",
    "Decide which option completes or answers this.\n\n{question}",
)
"""Ways of asking a question; options and answer follow."""

JUDGEMENTS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("{text}\nIs what the narrator does here right or wrong?", ("Right", "Wrong")),
    ("Someone says: {text}\nWas that ethical?", ("Ethical", "Unethical")),
    ("{text}\n\nWould most people find this acceptable?", ("Yes", "No")),
    ("Judge the behaviour in this story.\n{text}", ("Good", "Bad")),
    ("{text}\nDoes this go against common morals?", ("No", "Yes")),
    ("Story: {text}\nThe behaviour told here is", ("Acceptable", "Unacceptable")),
    ("Read what happened, and judge it.\n\n{text}", ("Moral", "Immoral")),
    ("{text}\nShould the person feel guilty about it?", ("No", "Yes")),
    ("A friend tells you this: {text}\nDo you approve?", ("Yes", "No")),
    ("{text}\n\nIn one word, how would you call that?", ("Fine", "Wrong")),
)
"""Ways of asking for a judgement of a short story, with the words for label 0 (nothing is wrong) and label 1."""

CONFESSIONS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("{text}\nIs the writer the one to blame?", ("No", "Yes")),
    ("Somebody asks strangers for their judgement.\n\n{text}\nWhat do they say of the writer?", ("Innocent", "Guilty")),
    ("{text}\n\nHas the writer done wrong?", ("No", "Yes")),
    ("A post in a forum: {text}\nThe writer behaved", ("Well", "Badly")),
    ("{text}\nWould you take the writer's side?", ("Yes", "No")),
)
"""Ways of asking about a post that asks whether its writer is (AITA) or would be (WIBTA) at fault."""


class Choices(NamedTuple):
    """A question as all formats have it."""

    question: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    """Of the options; empty where the labels say everything."""
    right: int
    format: str


@with_settings(MultipleChoiceSettings)
def multiple_choice(settings: MultipleChoiceSettings) -> Prepared:
    """Write every question as a `prompt`, and the label of its answer as its `completion`.

    Beside them stand `label` (the answer that is written, which a training learns), `true_label`, `status` (`true`, or
    `random` where the label was drawn again, be it the same), `template` and `choices`. Templates and noise follow from
    the seed and the row alone: whatever is split or drawn later, an example has the same label everywhere.

    With `tokenizer` and `max_length`, a question that is too long loses its first words (`cut_words`), never its
    options or its answer.

    Raises:
        DataError: The data is absent or broken, a row is none of the formats, or options and answer alone are too long.
    """
    source = open_source(settings.data, settings.split, limit=settings.limit, where=settings.where)
    rows, digest, replaced = [], hashlib.sha256(), 0
    for unread in source.records:
        record, halves = check_text(source.name, parse_record(unread), settings.on_bad_text)
        replaced += halves
        digest.update(json.dumps(record.value, sort_keys=True, default=str).encode())
        rows.append(_row(record.value, record.source_row, place(source.name, record), settings))
    if not rows:
        raise DataError(f"{source.name} holds no rows. Give data with at least one.")
    fingerprint = digest.hexdigest()
    check_same_result(settings, KIND, fingerprint, frozenset())
    notes = [f"{replaced:,} halves of surrogate pairs were replaced with U+FFFD."] if replaced else []
    if settings.label_noise:
        drawn = sum(row["status"] == "random" for row in rows)
        notes.append(f"{drawn:,} of {len(rows):,} labels were drawn again (--label-noise {settings.label_noise:g}).")
    if settings.max_length is not None:
        cut = _cut_to_fit(rows, load_tokenizer(settings.tokenizer), settings.max_length)
        notes.append(
            f"{cut:,} of {len(rows):,} prompts were cut at their beginning (--max-length {settings.max_length})."
        )
    return write_prepared(settings, KIND, rows, fingerprint=fingerprint, notes=notes)


def choices_of(value: Any, where: str, wanted: str = "auto") -> Choices:
    """Return the question in a row of ARC, MMLU or ETHICS.

    Raises:
        DataError: The row is none of them, or its answer is not among its choices.
    """
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object with named columns, got a {type(value).__name__}.")
    readers = {"arc": _arc, "mmlu": _mmlu, "ethics": _ethics}
    for name in readers if wanted == "auto" else [wanted]:
        found = readers[name](value, where)
        if found is not None:
            return found
    raise DataError(
        f"{where}: its columns are {', '.join(map(str, value)) or 'none'}; expected those of ARC (question, choices "
        "with text and label, answerKey), MMLU (question, choices, answer) or ETHICS (input, label)."
    )


def _arc(value: Mapping[str, Any], where: str) -> Choices | None:
    choices = value.get("choices")
    if not {"question", "answerKey"} <= set(value) or not isinstance(choices, Mapping):
        return None
    texts, labels = _words(choices.get("text")), _words(choices.get("label"))
    key = str(value["answerKey"])
    if len(texts) != len(labels) or len(labels) < 2 or key not in labels:
        raise DataError(f"{where}: the answer {key!r} and {len(texts)} texts do not go with the labels {labels}.")
    return Choices(str(value["question"]), labels, texts, labels.index(key), "arc")


def _mmlu(value: Mapping[str, Any], where: str) -> Choices | None:
    choices = value.get("choices")
    if not {"question", "answer"} <= set(value) or not isinstance(choices, Sequence) or isinstance(choices, str):
        return None
    texts, answer = _words(choices), str(value["answer"])
    labels = tuple(str(number) for number in range(len(texts)))
    # Some copies name the answer by a letter.
    right = answer if answer.isdigit() else str(ord(answer.upper()) - ord("A")) if len(answer) == 1 else answer
    if len(texts) < 2 or right not in labels:
        raise DataError(f"{where}: the answer {answer!r} is none of the {len(texts)} choices, which count from 0.")
    return Choices(str(value["question"]), labels, texts, labels.index(right), "mmlu")


def _ethics(value: Mapping[str, Any], where: str) -> Choices | None:
    if not {"input", "label"} <= set(value):
        return None
    if str(value["label"]) not in ("0", "1"):
        raise DataError(f"{where}: the label {value['label']!r} is neither 0 (nothing is wrong) nor 1.")
    return Choices(str(value["input"]), ("0", "1"), (), int(str(value["label"])), "ethics")


def _words(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values) if isinstance(values, Sequence | np.ndarray) else ()


def _row(value: Any, row: int, where: str, settings: MultipleChoiceSettings) -> dict[str, Any]:
    found = choices_of(value, where, settings.format)
    inserted, status = _draw_label(found, row, settings)
    template, labels, prompt = _prompt(found, np.random.default_rng([settings.seed, _TEMPLATE, row]))
    source = value.get("source") or value.get("subject")
    return {
        "id": str(value["id"] if value.get("id") not in (None, "") else row),
        "prompt": prompt,
        "completion": labels[inserted],
        "label": labels[inserted],
        "true_label": labels[found.right],
        "status": status,
        "template": template,
        "choices": list(labels),
        "format": found.format,
        **({"source": str(source)} if source else {}),
    }


def _draw_label(found: Choices, row: int, settings: MultipleChoiceSettings) -> tuple[int, str]:
    """Return the number of the choice that is written, and where it comes from."""
    draw = np.random.default_rng([settings.seed, _NOISE, row])
    # Both numbers are drawn always: a row that is noisy at 3 % is noisy, in the same way, at 10 %.
    chance, choice = draw.random(), int(draw.integers(len(found.labels)))
    return (choice, "random") if chance < settings.label_noise else (found.right, "true")


def _prompt(found: Choices, draw: np.random.Generator) -> tuple[str, tuple[str, ...], str]:
    """Return the name of the template, words of the labels, and the prompt."""
    if found.format == "ethics":
        confession = _CONFESSION.match(found.question) is not None
        # A confession may be asked about like any story.
        templates = (*JUDGEMENTS, *CONFESSIONS) if confession else JUDGEMENTS
        number = int(draw.integers(len(templates)))
        text, labels = templates[number]
        asked = text.format(text=found.question)
        options = "\n".join(f"- {label}" for label in labels)
    else:
        number, labels = int(draw.integers(len(QUESTIONS))), found.labels
        asked = QUESTIONS[number].format(question=found.question)
        options = "\n".join(f"- {label}: {text}" for label, text in zip(labels, found.texts, strict=True))
    return f"{found.format}-{number}", labels, f"{asked}{OPTIONS}{options}\n\n"


def _cut_to_fit(rows: Sequence[dict[str, Any]], tokenizer: Any, max_length: int) -> int:
    """Cut as few first words as have to go of prompts that are too long with their answer; return how many were cut."""
    encoder = Encoder(tokenizer, max_length=None, name="prompts", chat=False, prompts=True)
    too_long = [row for row, length in zip(rows, _lengths(rows, encoder), strict=True) if length > max_length]
    impossible = []
    for row in too_long:
        begin = _begin_that_fits(row, encoder, max_length)
        if begin is None:
            impossible.append(row["id"])
        else:
            prompt = row["prompt"]
            row |= {"prompt": prompt[begin:], CUT: len(_WORD.findall(prompt[:begin]))}
    if impossible:
        named = ", ".join(map(repr, impossible[:_SHOWN])) + (", ..." if len(impossible) > _SHOWN else "")
        raise DataError(
            f"{len(impossible):,} rows ({named}) have options and an answer that are longer than {max_length} tokens "
            "even without their question. Give a larger --max-length, or take them out."
        )
    return len(too_long)


def _begin_that_fits(row: Mapping[str, Any], encoder: Encoder, max_length: int) -> int | None:
    """Return where the longest prompt that fits begins; None if not even the options fit."""

    def fits(begin: int) -> bool:
        # Tokens at a cut may be others than before it, so every cut that is chosen was tried.
        return _lengths([{**row, "prompt": prompt[begin:]}], encoder)[0] <= max_length

    prompt = row["prompt"]
    end = prompt.rindex(OPTIONS)
    starts = [*(match.start() for match in _WORD.finditer(prompt[:end])), end]
    low, high = 0, len(starts) - 1
    if not fits(starts[high]):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(starts[middle]) else (middle, high)
    return starts[high]


def _lengths(rows: Sequence[Mapping[str, Any]], encoder: Encoder) -> list[int]:
    examples = [
        Example(id=row["id"], row=place, prompt=row["prompt"], completion=row["completion"])
        for place, row in enumerate(rows)
    ]
    return [len(ids) for ids in encoder.encode(examples).input_ids]
