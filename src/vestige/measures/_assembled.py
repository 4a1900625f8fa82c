"""The measurements of every model, joined with those of texts and of a bank: the evidence."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from vestige.banks import Bank
from vestige.errors import DataError
from vestige.launch import is_worker
from vestige.measures._inputs import BankValues, Column, Losses
from vestige.measures._job import AuditJob
from vestige.measures._layered import LayerPlan
from vestige.measures._look import TOTAL_LOSS, Tensors
from vestige.measures._loss import margin
from vestige.measures._measuring import LookPlan
from vestige.measures._registry import Measure
from vestige.measures._states import check_room, rounds


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
        if name in [each.name for each in self.job.at("states")]:
            where = self.main_layer if layer is None else layer
            return None if where is None else self.seen[number].layers[where].get(name)
        return self.seen[number].measures.get(name)


def gather(job: AuditJob) -> Evidence:
    """Measure every example with every model; what is done already is not done again."""
    passes, layers = _passes(job)
    reference = passes.pop() if job.needs("reference model") else None
    norms = [each.compute(job) for each in job.at("weights")] or [[{} for _ in job.subjects]]
    seen = [
        Seen(
            _measures(job, passes[number], reference),
            {layer: _examples_only(job, found) for layer, found in layers[number].items()},
            {layer: found["layer:smi"].tolist() for layer, found in layers[number].items() if "layer:smi" in found},
            {
                layer: found["layer:directions"].tolist()
                for layer, found in layers[number].items()
                if "layer:directions" in found
            },
            {name: values for each in norms for name, values in each[number].items()},
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
    job, last, found = evidence.job, evidence.last, {}
    for each in job.measures:
        if each.of == "example":
            column = evidence.column(each.name)
            missing = len(job.data) if column is None else int(np.isnan(column).sum())
            if missing:
                found[each.name] = missing, _reason(job, each)
        elif not (last.smi if each.of == "layer" else last.norms):
            found[each.name] = len(job.data) if each.of == "layer" else 0, _reason(job, each)
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
    """Return the columns of one subject: of its passes, of its losses, and of what it generated."""
    values = {name: tensor.numpy() for name, tensor in seen.items()}
    total = None if reference is None else reference[TOTAL_LOSS].numpy()
    losses = Losses(values["loss"], values[TOTAL_LOSS], total, job.data, job.tokenizer)
    found = {name: values[name] for each in job.at("pass") for name in columns_of(job, each, values)}
    for each in job.at("losses"):
        found |= each.columns(each.compute(losses))
    found |= {name: values[name] for each in job.at("generation") for name in columns_of(job, each, values)}
    return {name: np.where(np.isfinite(column), column, np.nan) for name, column in found.items()}


def columns_of(job: AuditJob, measure: Measure, found: Collection[str]) -> list[str]:
    """Return the columns of a measure: its own, and its details, which are no measures themselves.

    Files of pieces hold columns in any order; here the order is the same for every process.
    """
    taken, start = {each.name for each in job.measures}, f"{measure.name}_"
    known = [f"{start}{detail}" for detail in measure.details]
    names = sorted(name for name in found if name.startswith(start) and name not in taken)
    names.sort(key=lambda name: (known.index(name) if name in known else len(known), len(name)))
    return [*(name for name in found if name == measure.name), *names]


def _examples_only(job: AuditJob, found: Tensors) -> dict[str, Column]:
    return {name: found[name].numpy() for each in job.at("states") for name in columns_of(job, each, found)}


def _add_bank(job: AuditJob, bank: Bank, seen: list[Seen]) -> None:
    """Add what compares every subject with the bank, and to the model the bank's own measures."""
    settings, places = job.settings, bank_places(job, bank)
    known, of = places >= 0, settings.bank_value
    if settings.bank_subset is not None and settings.bank_subset >= len(bank.subset_names):
        raise DataError(
            f"--bank-subset {settings.bank_subset}: the bank has subsets 0 to {len(bank.subset_names) - 1}."
        )
    left_out = None if settings.bank_subset is None else bank.subsets == settings.bank_subset
    values = -bank.example_token_losses if of == "loss" else bank.values(f"example_{of}")
    target = np.full(len(bank.example_ids), np.nan)
    given = BankValues(values, _of_copies(bank.membership, job.groups, places), bank.subsets, target, left_out)
    for each in job.at("each model and the bank"):
        for one in seen:
            loss = one.measures["loss"]
            own = {"loss": -loss, "margin": margin(loss), "gap": one.measures["token_gap"]}[of]
            target[places[known]] = own[known]
            one.measures.update(_spread(each, given, places))
    target[:] = np.nan
    if of == "loss":
        given = given._replace(values=-bank.values("example_loss"))
    for each in job.at("bank"):
        seen[-1].measures.update(_spread(each, given, places))


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


def _spread(measure: Measure, given: BankValues, places: Int[np.ndarray, "example"]) -> dict[str, Column]:
    """Return a measure of the bank's examples as columns of the data."""
    found = {name: column[places] for name, column in measure.columns(measure.compute(given)).items()}
    return {name: np.where((places >= 0) & np.isfinite(each), each, np.nan) for name, each in found.items()}


def _main_layer(job: AuditJob, last: Seen) -> int | None:
    """Return the last layer, or the one with most information on the task's labels; the truth plays no part."""
    if not job.layers:
        return None
    if job.settings.choose_layer == "smi" and last.smi:
        return max(last.smi, key=lambda layer: (last.smi[layer][0], layer))
    return max(job.layers)


def _reason(job: AuditJob, measure: Measure) -> str:
    if "choices" in measure.needs:
        return max(job.choices.reasons, key=job.choices.reasons.__getitem__, default="one choice alone")
    if "hidden states" in measure.needs and not job.layers:
        return "the model gives no hidden states"
    if "classes" in measure.needs and job.no_classes:
        return job.no_classes
    return measure.missing if isinstance(measure.missing, str) else measure.missing(job)
