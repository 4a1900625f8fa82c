"""Planted secrets: how much sooner than chance each is guessed, and what that says of the privacy loss epsilon."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import beta, binom

from vestige import models
from vestige.data import (
    Example,
    Frame,
    OnBadText,
    TokenizedData,
    conversation_columns,
    frame_of,
    load_queries,
    tokenize,
)
from vestige.errors import DataError, SpecError
from vestige.jobs import Tensors
from vestige.lazy import torch
from vestige.measures._choices import count_shared_tokens, encoding_of
from vestige.measures._forward import total_losses
from vestige.measures._job import AuditJob
from vestige.measures._pieces import piece_files, run_audit_pieces
from vestige.progress import announce
from vestige.runs import CanaryRecord, EpsilonRecord

CONFIDENCE = 0.95
_STEPS = 60
"""Halvings of an interval of epsilon."""
_MOST_EPSILON = 64.0


class Canary(NamedTuple):
    """A secret and what it is compared with."""

    example: Example
    """Its completion is the secret."""
    others: list[str]
    """Secrets of the same form that were not planted."""
    copies: int | None = None
    """How often it was planted, where that is known."""

    @property
    def secrets(self) -> list[str]:
        """The secret and then the others."""
        return [self.example.completion or "", *self.others]


def exposure(
    canaries: Float[np.ndarray, "canary"], candidates: Float[np.ndarray, "candidate"]
) -> Float[np.ndarray, "canary"]:
    """Return the bits by which each canary's rank beats chance: 0 to log2(candidates + 1); high is memorized.

        log2(|R|) - log2(rank), R being the candidates and the canary itself

    Carlini et al. 2019, "The secret sharer". A canary that was never trained on has 1.44 bits on average (1 / log 2),
    not 0. Ranks that are tied are shared: the mean of the positions.

    Args:
        canaries: Loss of each planted secret; exposure is NaN where it is not finite.
        candidates: Losses of secrets of the same form that might have been planted and were not, drawn at random.

    Raises:
        DataError: No candidates, or one whose loss is not finite.
    """
    canaries, candidates = np.asarray(canaries, np.float64), np.sort(np.asarray(candidates, np.float64))
    if not len(candidates) or not np.isfinite(candidates).all():
        raise DataError(f"{len(candidates)} candidates: exposure needs at least one, all with finite losses.")
    below, upto = (np.searchsorted(candidates, canaries, side=side) for side in ("left", "right"))
    rank = 1 + (below + upto) / 2
    return np.where(np.isfinite(canaries), np.log2(len(candidates) + 1) - np.log2(rank), np.nan)


def read_canaries(source: Any, references: int, seed: int, on_bad_text: OnBadText = "refuse") -> list[Canary]:
    """Read every canary with its references: the column `alternatives`, or draws from the characters in `alphabet`.

    Drawn references are as long as the secret, differ from it and from each other, and follow from the seed and the
    canary's position alone; where the form has no more than `references` others, they are all taken.

    Raises:
        DataError: A row has no secret, nothing to compare it with, or a number of `copies` that is none.
    """
    found = []
    for position, example in enumerate(
        load_queries(source, may_be_prompts=False, focus="keep", on_bad_text=on_bad_text)
    ):
        secret, name = example.completion, f"Canary {example.id!r}"
        if not secret or example.prompt is None:
            raise DataError(f"{name}: give what stands before the secret as `prompt` and the secret as `completion`.")
        listed, alphabet = example.extra.get("alternatives"), example.extra.get("alphabet")
        if listed is not None:
            if not isinstance(listed, list | tuple | np.ndarray) or not all(isinstance(one, str) for one in listed):
                raise DataError(f"{name}: `alternatives` is {listed!r}, expected a list of texts.")
            others = [one for one in dict.fromkeys(listed) if one != secret]
        elif isinstance(alphabet, str) and alphabet:
            others = _draw_others(secret, alphabet, references, np.random.default_rng([abs(seed), position]))
        else:
            raise DataError(
                f"{name}: give a column `alternatives` with other secrets of the same form, or `alphabet` with the "
                'characters that it was drawn from, such as "0123456789".'
            )
        if not others or "" in others:
            raise DataError(f"{name}: there is no other secret to compare it with, or an empty one.")
        found.append(Canary(example, others, _read_copies(example.extra.get("copies"), name)))
    if not found:
        raise DataError(f"{source} holds no canary.")
    return found


def _read_copies(given: Any, name: str) -> int | None:
    if given is None or given == "":
        return None
    try:
        copies = int(given)
    except (TypeError, ValueError):
        copies = -1
    if copies < 0 or copies != float(given):
        raise DataError(f"{name}: `copies` is {given!r}, expected how often the secret was planted: 0, 1, 2, ...")
    return copies


def _draw_others(secret: str, alphabet: str, count: int, draw: np.random.Generator) -> list[str]:
    letters, length = sorted(set(alphabet)), len(secret)
    if foreign := set(secret) - set(letters):
        raise DataError(f"The secret {secret!r} holds {min(foreign)!r}, which is not in its alphabet {alphabet!r}.")
    if len(letters) ** length - 1 <= count:
        every = ("".join(one) for one in product(letters, repeat=length))
        return [one for one in every if one != secret]
    found: dict[str, None] = {}
    while len(found) < count:
        one = "".join(letters[number] for number in draw.integers(0, len(letters), length))
        if one != secret:
            found[one] = None
    return list(found)


def shorten_targets(data: TokenizedData) -> TokenizedData:
    """Return texts that begin alike, with targets from where the first secret begins or tokens first differ.

    A secret's first letters may share a token with what stands before it: counted from each secret's own first token,
    one text would pay for the space before the secret and another would not.
    """
    begins = (int(np.argmax(mask)) for mask in data.targets if mask.any())
    start = max(1, min(count_shared_tokens(data.input_ids), *begins))
    return replace(data, targets=[np.arange(len(ids)) >= start for ids in data.input_ids])


def measure_canaries(job: AuditJob) -> list[CanaryRecord]:
    """Measure the exposure of the given canaries under every subject; return none without any.

    Raises:
        DataError: A row is no canary, or the model has no tokenizer.
    """
    settings = job.settings
    if settings.canaries is None:
        return []
    if job.tokenizer is None:
        raise DataError("--canaries needs a tokenizer: give --tokenizer.")
    canaries = read_canaries(settings.canaries, settings.canary_references, settings.seed, settings.on_bad_text)
    frame = frame_of(job.data.examples, chat=settings.chat)
    if frame is not None:
        announce(f"Canaries are put into a conversation, {frame.how}; --no-chat measures the bare text.")

    def compute(number: int) -> Tensors:
        turn, place = divmod(number, len(canaries))
        loaded = job.models.of(job.subjects[turn].source)
        return {"losses": _compute_losses(job, loaded, frame, canaries[place])}

    def count(number: int) -> int:
        return len(canaries[number % len(canaries)].secrets)

    # A piece is one subject and one canary.
    numbers = range(len(job.subjects) * len(canaries))
    files = piece_files(job, "canaries", ["canaries", _fingerprint(canaries, frame)])
    found = run_audit_pieces(job, "Canaries", "secrets", files, numbers, compute, count)
    return [
        _make_record(canary, subject.number, tensors["losses"].numpy())
        for (subject, canary), tensors in zip(product(job.subjects, canaries), found, strict=True)
    ]


def bound_epsilon(canaries: Sequence[CanaryRecord]) -> list[EpsilonRecord]:
    """Return lower bounds on epsilon of secrets planted equally often, under each checkpoint; see `epsilon_from_ranks`.

    A secret without a finite loss, and one that was never planted, says nothing about epsilon.
    """
    groups: dict[tuple[int, int | None, int], list[int]] = {}
    for each in canaries:
        if each.worst_rank is not None and each.copies != 0:
            groups.setdefault((each.checkpoint, each.copies, each.references), []).append(each.worst_rank)
    return [
        EpsilonRecord(
            checkpoint=checkpoint,
            copies=copies,
            secrets=len(ranks),
            references=references,
            epsilon=epsilon_from_ranks(np.array(ranks, dtype=np.float64), references + 1),
            confidence=CONFIDENCE,
        )
        for (checkpoint, copies, references), ranks in groups.items()
    ]


def _fingerprint(canaries: Sequence[Canary], frame: Frame | None) -> str:
    listed = [(each.example.prompt, each.example.completion, each.others) for each in canaries]
    lead = [] if frame is None else [[turn.content for turn in frame.lead]]
    return hashlib.sha256(json.dumps(listed + lead).encode()).hexdigest()


def _compute_losses(job: AuditJob, loaded: models.LoadedModel, frame: Frame | None, canary: Canary) -> torch.Tensor:
    """Return the losses of the secret and then of the others, nats, float64."""
    columns = conversation_columns(canary.example)
    variants = [replace(canary.example, completion=secret, extra=columns) for secret in canary.secrets]
    put = variants if frame is None else list(map(frame.put, variants))
    data = tokenize(put, job.tokenizer, name="canaries", add_eos=False, **encoding_of(job.settings, loaded))
    if data.truncated.any():
        raise DataError(f"Canary {canary.example.id!r} is longer than the model reads: {int(max(data.lengths))}.")
    return total_losses(loaded.model, shorten_targets(data), np.arange(len(data)), job.token_budget)


def _make_record(canary: Canary, checkpoint: int, losses: np.ndarray) -> CanaryRecord:
    own, others = losses[:1], losses[1:]
    usable = bool(np.isfinite(losses).all())
    bits = float(exposure(own, others)[0]) if usable else None
    return CanaryRecord(
        id=canary.example.id,
        checkpoint=checkpoint,
        prompt=canary.example.prompt or "",
        secret=canary.example.completion or "",
        copies=canary.copies,
        references=len(others),
        rank=None if bits is None else float((len(others) + 1) / 2**bits),
        exposure=bits,
        most=float(np.log2(len(others) + 1)),
        loss=float(own[0]) if usable else None,
        worst_rank=1 + int((others <= own).sum()) if usable else None,
    )


def epsilon_from_ranks(ranks: Float[np.ndarray, "canary"], candidates: int, *, confidence: float = CONFIDENCE) -> float:
    """Return a lower bound on epsilon from the ranks of secrets among the candidates that they were drawn from.

    Under epsilon-differential privacy no set of t of the N candidates, chosen from the model, holds the secret with
    more than

        q(t) = t e^epsilon / (t e^epsilon + N - t)

    and the number of secrets of m whose rank is t or less is stochastically below a binomial of m and q(t) (the
    argument of Steinke et al. 2023, "Privacy auditing with one training run", for a choice of N in place of 2). The
    bound is the largest of those for t = 1, 2, 4, ... N / 2, each at a confidence that makes all hold at once.

    Valid if each secret was drawn uniformly, and independently, from its candidates before the training, which took
    it once: where a secret stands c times, the bound is for all c together, and 1 / c of it for one. Neighbouring data
    sets are those in which one secret is exchanged; for adding or leaving out, halve it. delta is 0.

    Args:
        ranks: 1 for the likeliest; where several are as likely, the last of their positions.
        candidates: N, the secret among them.
        confidence: That epsilon is at least the bound.

    Returns:
        0 where the ranks show nothing.

    Raises:
        DataError: No ranks, or one outside 1 to N.
        SpecError: A confidence outside (0, 1).
    """
    ranks = np.asarray(ranks, dtype=np.float64)
    if not len(ranks) or candidates < 2 or not ((ranks >= 1) & (ranks <= candidates)).all():
        raise DataError(f"{len(ranks)} ranks among {candidates} candidates: give ranks from 1 to 2 or more candidates.")
    _check_confidence(confidence)
    tops = [1]
    while tops[-1] * 4 <= candidates:
        tops.append(tops[-1] * 2)
    error, found = (1 - confidence) / len(tops), 0.0
    for top in tops:
        hits = int((ranks <= top).sum())
        if hits:
            least = float(beta.ppf(error, hits, len(ranks) - hits + 1))
            found = max(found, float(np.log(least / (1 - least) * (candidates - top) / top)))
    return found


def epsilon_from_guesses(
    correct: int, guesses: int, canaries: int, *, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return a lower bound on epsilon from guesses which canaries were trained on, each with probability 1/2.

        P(W >= v) <= P(B >= v) + 2 m delta max over i of P(v > B >= v - i) / i,  B binomial of r and e^eps / (1 + e^eps)

    for v right ones of r guesses about m canaries; the bound is the largest epsilon at which this is below
    1 - confidence. Steinke et al. 2023, "Privacy auditing with one training run", theorem 5.2. Neighbours differ in one
    canary, added or left out.

    Args:
        correct: Right guesses.
        guesses: Canaries that were guessed about; one may abstain from the others.
        canaries: All that a coin was thrown for.
        delta: Of (epsilon, delta)-differential privacy.
        confidence: That epsilon is at least the bound.

    Raises:
        DataError: Numbers that do not go together.
        SpecError: A confidence or a delta outside its range.
    """
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise DataError(f"{correct} right of {guesses} guesses about {canaries} canaries: these do not go together.")
    _check_confidence(confidence)
    if not 0 <= delta < 1:
        raise SpecError(f"delta={delta}: give a number from 0 to below 1.")
    low, high = 0.0, _MOST_EPSILON
    if _chance_of(correct, guesses, canaries, low, delta) > 1 - confidence:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _chance_of(correct, guesses, canaries, middle, delta) <= 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def _chance_of(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the most that the chance of as many right guesses can be under (epsilon, delta)."""
    right = 1 / (1 + np.exp(-epsilon))
    found = float(binom.sf(correct - 1, guesses, right))
    if delta and correct:
        below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
        found += 2 * canaries * delta * float((below / np.arange(1, correct + 1)).max())
    return min(found, 1.0)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise SpecError(f"confidence={confidence}: give a number between 0 and 1, such as 0.95.")
