"""Planted secrets: which there are, what else each might have been, and how much sooner than chance it is guessed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from vestige.data import (
    Example,
    Frame,
    OnBadText,
    TokenizedData,
    conversation_columns,
    frame_of,
    load_queries,
    plan_batches,
    tokenize,
)
from vestige.errors import DataError
from vestige.indexes import tokens_at_most
from vestige.launch import Compute, PieceFiles, step_done
from vestige.measures._job import AuditJob
from vestige.measures._look import total_losses
from vestige.measures._pieces import digest, ran
from vestige.models import LoadedModel, batch_sharing
from vestige.progress import announce
from vestige.runs import CanaryRecord
from vestige.storage import partial_folder

PIECE_SECRETS = 4096
"""Secrets that a piece measures, or those of one canary."""


class Canary(NamedTuple):
    """A secret and what it is compared with."""

    example: Example
    """Its completion is the secret."""
    others: list[str]
    """Secrets of the same form that were not planted."""
    copies: int | None = None
    """How often it was planted, where that is known."""


def exposure(
    canaries: Float[np.ndarray, "canary"], candidates: Float[np.ndarray, "candidate"]
) -> Float[np.ndarray, "canary"]:
    """Return the bits by which each canary's rank beats chance: 0 to log2(candidates + 1); high is memorized.

        log2(|R|) - log2(rank), R being the candidates and the canary itself

    Carlini et al. 2019, "The secret sharer". A canary that was never trained on has 1.44 bits on average (1 / log 2),
    not 0. Ranks that are tied are shared: the mean of the positions.

    Args:
        canaries: Loss of each planted secret.
        candidates: Losses of secrets of the same form that might have been planted and were not, drawn at random.

    Returns:
        NaN for a canary whose loss is not finite.

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
    for place, example in enumerate(load_queries(source, may_be_prompts=False, on_bad_text=on_bad_text)):
        secret, name = example.completion, f"Canary {example.id!r}"
        if not secret or example.prompt is None:
            raise DataError(f"{name}: give what stands before the secret as `prompt` and the secret as `completion`.")
        listed, alphabet = example.extra.get("alternatives"), example.extra.get("alphabet")
        if listed is not None:
            if not isinstance(listed, list | tuple | np.ndarray) or not all(isinstance(one, str) for one in listed):
                raise DataError(f"{name}: `alternatives` is {listed!r}, expected a list of texts.")
            others = [one for one in dict.fromkeys(listed) if one != secret]
        elif isinstance(alphabet, str) and alphabet:
            others = _drawn(secret, alphabet, references, np.random.default_rng([abs(seed), place]))
        else:
            raise DataError(
                f"{name}: give a column `alternatives` with other secrets of the same form, or `alphabet` with the "
                'characters that it was drawn from, such as "0123456789".'
            )
        if not others or "" in others:
            raise DataError(f"{name}: there is no other secret to compare it with, or an empty one.")
        found.append(Canary(example, others, _copies(example.extra.get("copies"), name)))
    if not found:
        raise DataError(f"{source} holds no canary.")
    return found


def _copies(given: Any, name: str) -> int | None:
    if given is None or given == "":
        return None
    try:
        copies = int(given)
    except (TypeError, ValueError):
        copies = -1
    if copies < 0 or copies != float(given):
        raise DataError(f"{name}: `copies` is {given!r}, expected how often the secret was planted: 0, 1, 2, ...")
    return copies


def _drawn(secret: str, alphabet: str, count: int, draw: np.random.Generator) -> list[str]:
    letters = sorted(set(alphabet))
    if foreign := set(secret) - set(letters):
        raise DataError(f"The secret {secret!r} holds {min(foreign)!r}, which is not in its alphabet {alphabet!r}.")
    forms = len(letters) ** len(secret)
    if forms - 1 <= count:
        every = (_spelled(number, letters, len(secret)) for number in range(forms))
        return [one for one in every if one != secret]
    found: dict[str, None] = {}
    while len(found) < count:
        one = "".join(letters[place] for place in draw.integers(0, len(letters), len(secret)))
        if one != secret:
            found[one] = None
    return list(found)


def _spelled(number: int, letters: Sequence[str], length: int) -> str:
    places = []
    for _ in range(length):
        number, place = divmod(number, len(letters))
        places.append(letters[place])
    return "".join(reversed(places))


@dataclass(frozen=True)
class CanaryPlan:
    """Losses of every canary and its references under every subject; a piece is one subject and some canaries."""

    job: AuditJob
    canaries: Sequence[Canary]
    name: str = "Canaries"
    unit: str = "secrets"

    @property
    def folder(self) -> Path:
        """Beside the run, until that is written."""
        return partial_folder(self.job.settings.out)

    @property
    def pieces(self) -> int:
        """Subjects times groups of canaries."""
        return len(self.job.subjects) * len(self.groups)

    @cached_property
    def groups(self) -> list[list[int]]:
        """Numbers of the canaries of each piece."""
        groups: list[list[int]] = [[]]
        secrets = 0
        for number, canary in enumerate(self.canaries):
            if secrets >= PIECE_SECRETS:
                groups.append([])
                secrets = 0
            groups[-1].append(number)
            secrets += 1 + len(canary.others)
        return groups

    def is_done(self, piece: int) -> bool:
        """Return whether the losses are there."""
        return self.files.is_done(piece)

    def weight(self, piece: int) -> float:
        """Return the number of the piece's secrets."""
        return sum(1 + len(self.canaries[number].others) for number in self.groups[piece % len(self.groups)])

    @contextmanager
    def open(self) -> Iterator[Compute]:
        """Open one model at a time."""

        def compute(piece: int) -> None:
            number, group = divmod(piece, len(self.groups))
            loaded = self.job.models.of(self.job.subjects[number].source)
            losses = [self._losses(loaded, self.canaries[place]) for place in self.groups[group]]
            self.files.write(piece, {"losses": torch.cat(losses)})

        yield compute

    def reduce(self) -> list[CanaryRecord]:
        """Return the exposure of every canary under every subject.

        Raises:
            CorruptFile: A piece is missing or damaged.
        """
        found = []
        for piece in range(self.pieces):
            number, group = divmod(piece, len(self.groups))
            losses = self.files.read(piece)["losses"].numpy()
            begin = 0
            for canary in (self.canaries[place] for place in self.groups[group]):
                own = losses[begin : begin + 1 + len(canary.others)]
                begin += len(own)
                found.append(_record(canary, self.job.subjects[number].number, own))
        return found

    def run(self) -> list[CanaryRecord]:
        """Return the result; after a kill, the same call continues."""
        if self.frame is not None:
            announce(f"Canaries are put into a conversation, {self.frame.how}; --no-chat measures the bare text.")
        self.files.forget_damaged(range(self.pieces))
        return ran(self)

    @cached_property
    def frame(self) -> Frame | None:
        """The conversation that a prompt is put into, where the data are conversations."""
        return frame_of(self.job.data.examples, chat=self.job.settings.chat)

    @cached_property
    def files(self) -> PieceFiles:
        """The files of the pieces."""
        listed = [(each.example.prompt, each.example.completion, each.others) for each in self.canaries]
        lead = [] if self.frame is None else [[turn.content for turn in self.frame.lead]]
        mark = hashlib.sha256(json.dumps(listed + lead).encode()).hexdigest()
        return PieceFiles(self.folder / "canaries", digest(self.job, ["canaries", mark, PIECE_SECRETS]))

    def _losses(self, loaded: LoadedModel, canary: Canary) -> torch.Tensor:
        """Return the losses of the secret and then of the others, nats, float64."""
        secrets = [canary.example.completion, *canary.others]
        settings = self.job.settings
        columns = conversation_columns(canary.example)
        variants = [replace(canary.example, completion=secret, extra=columns) for secret in secrets]
        data: TokenizedData = tokenize(
            variants if self.frame is None else list(map(self.frame.put, variants)),
            self.job.tokenizer,
            max_length=tokens_at_most(settings, loaded),
            name="canaries",
            chat=bool(settings.chat),
            add_eos=False,
        )
        if data.truncated.any():
            raise DataError(f"Canary {canary.example.id!r} is longer than the model reads: {int(max(data.lengths))}.")
        data = compared_tokens(data)
        losses = torch.empty(len(secrets), dtype=torch.float64)
        for rows in plan_batches(data.lengths, self.job.token_budget, sharing=batch_sharing(loaded.model)):
            losses[rows] = total_losses(loaded.model, data, rows)
            step_done(len(rows))
        return losses


def compared_tokens(data: TokenizedData) -> TokenizedData:
    """Return texts that begin alike, with targets from where the first secret begins or tokens first differ.

    A secret's first letters may share a token with what stands before it: counted from each secret's own first token,
    one text would pay for the space before the secret and another would not.
    """
    shortest = min(map(len, data.input_ids))
    same = np.all(np.stack([ids[:shortest] for ids in data.input_ids]) == data.input_ids[0][:shortest], axis=0)
    common = shortest if same.all() else int(same.argmin())
    start = max(1, min(common, *(int(np.argmax(mask)) for mask in data.targets if mask.any())))
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
    return CanaryPlan(
        job, read_canaries(settings.canaries, settings.canary_references, settings.seed, settings.on_bad_text)
    ).run()


def _record(canary: Canary, checkpoint: int, losses: np.ndarray) -> CanaryRecord:
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
    )
