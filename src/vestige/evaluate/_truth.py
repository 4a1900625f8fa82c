"""A bank as the truth about some scores: its arrays in the order of the scores, and what speaks against it."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vestige.banks import Bank
from vestige.errors import DataError, IndexMismatch, SpecError
from vestige.evaluate._scored import AlignedScores, Scored, align_scores
from vestige.methods import METHODS
from vestige.settings import BankSettings, RemovalSettings, SelectionSettings, TruthValue
from vestige.storage import sha256_of
from vestige.training import bank


class Truth(NamedTuple):
    """What the models of a bank measured."""

    bank: Bank
    losses: Float[np.ndarray, "member query"]
    """Of the queries, or minus their margins."""
    value: TruthValue
    """Which of the two."""

    def scores_of(self, scored: Scored) -> AlignedScores:
        """Return the scores of a run in the bank's order.

        Raises:
            IndexMismatch: The run is of other data or other queries.
        """
        for what, record in (("data", scored.run.run.data), ("queries", scored.run.run.queries)):
            here = self.bank.identity.get(what)
            if what == "data" and record.fingerprint == self.bank.identity.get("learned"):
                continue  # a method that reads what was learned, with its weights, and no other targets
            # Methods that read text alone see no tokens, and have no fingerprint of them.
            if here and record.fingerprint and scored.run.run.model is not None and here != record.fingerprint:
                raise IndexMismatch(
                    f"{scored.run.folder} was made with other {what} than the bank: {record.name} has the tokens "
                    f"{record.fingerprint[:12]}, the bank's have {here[:12]}. Make both from the same file, with the "
                    "same --max-length and --chat."
                )
        return align_scores(scored.run, self.bank.query_ids, self.bank.example_ids)


def open_truth(folder: Path, value: TruthValue | None = None) -> Truth:
    """Return the bank in `folder` with what its models measured of the queries.

    Args:
        folder: Of the bank.
        value: None takes losses, or margins where the bank holds no losses, as published ones do not.

    Raises:
        DataError: It holds no queries, or not this value of them.
    """
    bank = Bank.open(folder)
    if not bank.query_ids:
        raise DataError(f"The bank {folder} has no queries whose losses could be predicted. Make it with --queries.")
    if value is None:
        value = "margin" if bank.holds("query_margin") and not bank.holds("query_loss") else "loss"
    return Truth(bank, bank.query_losses if value == "loss" else -bank.query_margins, value)


def retrain(settings: RemovalSettings | SelectionSettings, leave_out: Any, **changes: Any) -> Bank:
    """Return the bank in OUT/bank without each of some lists of ids, made as the settings say but for the changes."""
    shared = {name: getattr(settings, name) for name in BankSettings.model_fields if hasattr(settings, name)}
    return bank(**shared | {"out": settings.out / "bank", "leave_out_lists": leave_out} | changes)


def check_disjoint(folder: Path, truth: Truth, scored: Scored, *, allowed: bool) -> str | None:
    """Return a warning about the model of the scores and those of the bank, None if there is none.

    Raises:
        SpecError: The model is a member of the bank, and that is not allowed.
    """
    model = scored.run.run.model
    method = scored.run.run.method
    # A run of unlearning, or of a package that is not installed, is by no method that is known here.
    if model is None or (method in METHODS.names() and not METHODS.find(method).needs_model):
        return None
    if member := _member_of(folder, model.name):
        if not allowed:
            raise SpecError(
                f"{scored.run.folder} scores with {model.name}, which is the bank's own model {member}: it is part of "
                "the truth that it would be judged by. Score with a model that is not in the bank, or type "
                "--shared-model to have it all the same."
            )
        return f"The scores are of the bank's own model {member}: their numbers are biased upwards."
    if truth.bank.identity.get("model") == model.fingerprint and not truth.bank.identity.get("from_scratch"):
        return (
            f"The scores are of {model.name}, from which the bank's training begins: it has not been trained on this "
            "data as they have."
        )
    return None


def _member_of(folder: Path, model: str) -> str | None:
    """Return the name of the bank's model whose folder or weights these are."""
    path, members = Path(model).expanduser(), folder / "members"
    if not path.is_dir() or not members.is_dir():
        return None
    kept = sorted(each for each in members.iterdir() if each.is_dir())
    own = _weights(path)
    for each in kept:
        if each.resolve() == path.resolve() or (own and _weights(each) == own):
            return each.name
    return None


def _weights(folder: Path) -> list[str]:
    return [sha256_of(path) for path in sorted(folder.glob("*.safetensors"))]
