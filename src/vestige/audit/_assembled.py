"""The measurements of every model, joined with those of texts and of a bank: the evidence."""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from vestige.audit._from_bank import bank_evidence
from vestige.audit._job import AuditJob
from vestige.audit._layered import LayerPlan
from vestige.audit._lira import lira, lira_offline
from vestige.audit._look import Tensors
from vestige.audit._margin import margin
from vestige.audit._measuring import LookPlan
from vestige.audit._norms import NormsPlan
from vestige.audit._perplexity_ratio import perplexity_ratio
from vestige.audit._states import check_room, rounds
from vestige.audit._weights import WeightNorms
from vestige.audit._zlib_ratio import zlib_ratio
from vestige.bank import Bank
from vestige.errors import DataError
from vestige.launch import is_worker
from vestige.settings import BANK_MEASURES

LAYERED = ("psmi", "psmi_std", "psmi_low", "psmi_high", "mahalanobis")
_SEEN = ("loss", "answer_loss", "token_gap", "min_k", "min_k_plus_plus", "logit_gap", "accuracy", "brier")
Column = Float[np.ndarray, "example"]


class Seen(NamedTuple):
    """Everything that is known of one subject."""

    measures: dict[str, Column]
    """By name; NaN where it cannot be computed."""
    layers: dict[int, dict[str, Column]]
    smi: dict[int, list[float]]
    """Mean and 1 % and 99 % quantiles, by layer."""
    directions: dict[int, list[float]]
    """How many PSMI took, and whether they sufficed, by layer."""
    norms: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evidence:
    """Of each subject, and why examples have no value."""

    job: AuditJob
    seen: list[Seen]
    main_layer: int | None

    @property
    def last(self) -> Seen:
        """The measurements of the model under audit."""
        return self.seen[-1]

    def column(self, name: str, number: int = -1, layer: int | None = None) -> Column | None:
        """Return the values of a measure under a subject; a layered one at the main layer unless another is named."""
        if name in LAYERED:
            where = self.main_layer if layer is None else layer
            return None if where is None else self.seen[number].layers[where].get(name)
        return self.seen[number].measures.get(name)


def gather(job: AuditJob) -> Evidence:
    """Measure every example with every model; what is done already is not done again."""
    passes, layers = _passes(job)
    reference = passes.pop() if "perplexity_ratio" in job.wanted else None
    norms = NormsPlan(job).run() if job.norms else [{} for _ in job.subjects]
    seen = [
        Seen(
            _measures(job, passes[number], reference),
            {layer: _examples_only(found) for layer, found in layers[number].items()},
            {layer: found["smi"].tolist() for layer, found in layers[number].items() if "smi" in found},
            {
                layer: found["psmi_directions"].tolist()
                for layer, found in layers[number].items()
                if "psmi_directions" in found
            },
            {name: WeightNorms(*values.tolist())._asdict() for name, values in norms[number].items()},
        )
        for number in range(len(job.subjects))
    ]
    if job.bank is not None:
        _add_bank(job, job.bank, seen)
    return Evidence(job, seen, _main_layer(job, seen[-1]))


def _passes(job: AuditJob) -> tuple[list[Tensors], list[dict[int, Tensors]]]:
    """Return the measurements of every subject and of the reference model, and every subject's measures by layer."""
    passes: list[Tensors] = []
    layers: list[dict[int, Tensors]] = []
    plans = [LookPlan(job, part) for part in rounds(job)]
    if not is_worker():
        check_room(job, plans[0].groups, plans[0].files.input)
    for plan in plans:
        passes += plan.run()
        layers += LayerPlan(plan).run() if job.layers else [{} for _ in range(plan.part.first, plan.part.end)]
        plan.forget_states()
    return passes, layers


def reasons(evidence: Evidence) -> dict[str, tuple[int, str]]:
    """Return, for each measure that some examples of the data lack under the model, how many lack it and why."""
    job, found = evidence.job, {}
    for name in job.wanted:
        if name in ("smi", "weights"):
            continue
        column = evidence.column(name)
        missing = len(job.data) if column is None else int(np.isnan(column).sum())
        if missing:
            found[name] = missing, _reason(job, name)
    if "smi" in job.wanted and not evidence.last.smi:
        found["smi"] = len(job.data), _reason(job, "psmi")
    if "weights" in job.wanted and not job.norms:
        found["weights"] = 0, f"{job.parameters:,} weights: ask for them by name, --measures default weights"
    return found


def bank_places(job: AuditJob, bank: Bank) -> Int[np.ndarray, "example"]:
    """Return the row in the bank of each example, -1 for one that the bank lacks.

    Raises:
        DataError: Ids repeat, or none is in the bank.
    """
    count = int((~job.held_out).sum())
    places = np.full(len(job.data), -1, dtype=np.int64)
    if bank.identity.get("data") == job.own_fingerprint and len(bank.example_ids) == count:
        places[:count] = np.arange(count)
        return places
    ids = [example.id for example in job.data.examples[:count]]
    for name, values in (("the data", ids), ("the bank", bank.example_ids)):
        if len(set(values)) < len(values):
            repeated = Counter(values).most_common(1)[0][0]
            raise DataError(
                f"The bank is of other data or tokens, and the id {repeated!r} repeats in {name}: examples cannot be "
                "distinguished. Give the data that the bank was made of, with the same settings."
            )
    where = {name: row for row, name in enumerate(bank.example_ids)}
    places[:count] = [where.get(name, -1) for name in ids]
    if (places < 0).all():
        raise DataError(f"None of the {count:,} examples is in the bank {job.settings.bank}. Is it of other data?")
    return places


def _measures(job: AuditJob, seen: Tensors, reference: Tensors | None) -> dict[str, Column]:
    values = {name: tensor.numpy() for name, tensor in seen.items()}
    found = {name: values[name] for name in _SEEN}
    found["margin"] = margin(values["loss"])
    found["zlib_ratio"] = _zlib(job, values["total_loss"])
    if reference is not None:
        counts = np.where(job.data.target_counts > 0, job.data.target_counts, np.nan)
        # Per token of this model, so that a reference with other tokens is compared on the same text.
        found["perplexity_ratio"] = perplexity_ratio(
            values["total_loss"] / counts, reference["total_loss"].numpy() / counts
        )
    extracted = [name for name in values if name.startswith("extraction_")]
    if extracted:
        longest = max(extracted, key=lambda name: int(name.rpartition("_")[2]))
        found |= {
            "extraction": values[longest],
            **({name: values[name] for name in extracted} if len(extracted) > 1 else {}),
        }
    kept = {
        name: column for name, column in found.items() if name.partition("_")[0] == "extraction" or name in job.wanted
    }
    return {name: np.where(np.isfinite(column), column, np.nan) for name, column in kept.items()}


def _zlib(job: AuditJob, total: Column) -> Column:
    if job.tokenizer is None:
        return np.full(len(total), np.nan)
    predicted = [ids[mask].tolist() for ids, mask in zip(job.data.input_ids, job.data.targets, strict=True)]
    ratio = zlib_ratio(total, job.tokenizer.batch_decode(predicted))
    return np.where(job.data.target_counts > 0, ratio, np.nan)


def _examples_only(found: Tensors) -> dict[str, Column]:
    return {name: found[name].numpy() for name in LAYERED if name in found}


def _add_bank(job: AuditJob, bank: Bank, seen: list[Seen]) -> None:
    """Add likelihood ratios of every subject, and to the model the bank's own measures."""
    settings, places = job.settings, bank_places(job, bank)
    known, of = places >= 0, settings.bank_value
    if settings.bank_subset is not None and settings.bank_subset >= len(bank.subset_names):
        raise DataError(
            f"--bank-subset {settings.bank_subset}: the bank has subsets 0 to {len(bank.subset_names) - 1}."
        )
    left_out = None if settings.bank_subset is None else bank.subsets == settings.bank_subset
    values = -bank.example_token_losses if of == "loss" else bank.values(f"example_{of}")
    membership = _of_copies(bank.membership, job.groups, places)
    for each in seen:
        own = {
            "loss": -each.measures["loss"],
            "margin": margin(each.measures["loss"]),
            "gap": each.measures["token_gap"],
        }
        target = np.full(len(bank.example_ids), np.nan)
        target[places[known]] = own[of][known]
        for name, measure in (("lira", lira), ("lira_offline", lira_offline)):
            if name in job.wanted:
                score = measure(target, values, membership, left_out=left_out).score
                each.measures[name] = _spread(score, places)
    proved = bank_evidence(bank, of=of, membership=membership)
    whole = {
        "counterfactual": proved.counterfactual,
        "simplicity": proved.simplicity,
        "lira_global": proved.success.success,
    }
    seen[-1].measures.update({name: _spread(column, places) for name, column in whole.items() if name in job.wanted})


def _of_copies(
    membership: Bool[np.ndarray, "member row"], groups: Int[np.ndarray, "example"], places: Int[np.ndarray, "example"]
) -> Bool[np.ndarray, "member row"]:
    """Return where a member was trained on the row or on a copy of it: a bank made elsewhere may have split them."""
    known = places >= 0
    row = np.arange(membership.shape[1]) + len(groups)
    row[places[known]] = groups[known]
    order = np.argsort(row, kind="stable")
    begins = np.flatnonzero(np.diff(row[order], prepend=-1))
    found = np.empty_like(membership)
    inside = np.logical_or.reduceat(membership[:, order], begins, axis=1)
    found[:, order] = np.repeat(inside, np.diff(begins, append=len(order)), axis=1)
    return found


def _spread(values: Column, places: Int[np.ndarray, "example"]) -> Column:
    found = np.where(places >= 0, values[places], np.nan)
    return np.where(np.isfinite(found), found, np.nan)


def _main_layer(job: AuditJob, last: Seen) -> int | None:
    """Return the last layer, or the one with most information on the task's labels; the truth plays no part."""
    if not job.layers:
        return None
    if job.settings.choose_layer == "smi" and last.smi:
        return max(last.smi, key=lambda layer: (last.smi[layer][0], layer))
    return max(job.layers)


def _reason(job: AuditJob, name: str) -> str:
    if name in ("logit_gap", "accuracy", "brier"):
        return max(job.choices.reasons, key=job.choices.reasons.__getitem__, default="one choice alone")
    if name in ("psmi", "mahalanobis") and not job.layers:
        return "the model gives no hidden states"
    if name == "psmi":
        alone = "an example needs a class that another one of the data has too; the holdout is not measured"
        return job.no_classes or alone
    if name in BANK_MEASURES:
        return "fewer than two models of the bank with or without the example and its copies, or it is not in the bank"
    known = {
        "answer_loss": "a text without a prompt has no answer of its own",
        "extraction": f"shorter than {max(job.settings.prefixes)} + {job.settings.continuation} tokens",
        "perplexity_ratio": "cut off for one of the two models",
        "zlib_ratio": "no target token, or a model without tokenizer",
    }
    return known.get(name, "no target token, or a value that is not finite")
