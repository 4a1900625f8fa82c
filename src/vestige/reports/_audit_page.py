"""The page of an audit: what is known of the examples, how well the measures find them, and which examples to read."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np

from vestige import measures
from vestige.reports._charts import Panel, make_panel, new_axes
from vestige.reports._read import (
    Fact,
    cut_command,
    describe_cost,
    format_count,
    join_versions,
    shorten_name,
)
from vestige.runs import (
    CHANCE_BITS,
    Audit,
    EvidenceRow,
    FindingRecord,
    JudgementRecord,
    Truth,
    format_span,
    mean_exposures,
)
from vestige.terminal import shorten

SHOWN, SHOWN_SECRETS = 25, 12
"""Examples of each list, and planted secrets."""
LONGEST_TEXT = 1200
FULL_COLOUR = 3.0
"""Nats, or deviations, by which a token is likelier than expected."""
TRUTHS = {
    "membership": ("Members", "examples that were trained on, against the holdout or what was left out"),
    "flag": ("Flagged examples", "those that the column marks, such as wrong labels"),
    "memorized": ("Memorized at the end", "those whose likelihood ratio against the bank is high under the model"),
}
"""Title and explanation of each kind of truth."""

Json = dict[str, Any]


def make_audit_page(audit: Audit) -> Json:
    """Return everything that is on the page of a run of `vestige audit`, as its template takes it."""
    run = audit.run
    return {
        "title": f"What {shorten_name(run.model.name)} has memorized",
        "subtitle": f"memorization · {shorten_name(run.data.name)}",
        "facts": _list_facts(audit),
        "findings": [_show_finding(each) for each in run.findings],
        "command": cut_command(run.command),
        "judged": [_make_table(audit, truth) for truth in get_args(Truth) if audit.judgement(truth)],
        "charts": _draw_panels(audit),
        "planted": _list_secrets(audit),
        "planted_note": _describe_secrets(audit),
        "contaminated": _list_contaminated(audit),
        "rankings": _rank_examples(audit),
        "token_note": _describe_tokens(audit),
        "missing": _list_missing(audit),
        "notes": [*run.notes, *_note_layers(audit)],
        "versions": join_versions(run.versions),
        "vestige": run.vestige,
    }


def _show_finding(finding: FindingRecord) -> Json:
    """Return a finding: its first sentence is the one to read, and commands are lists of words as `cut_command`'s."""
    commands = [(each.purpose, cut_command(each.command)) for each in finding.commands]
    first, *rest = finding.sentences or [""]
    return {"title": finding.title, "first": first, "rest": rest, "commands": commands}


def format_number(value: float | None) -> str:
    """Format a number as the page writes it."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}".replace("-", "−")


def _list_facts(audit: Audit) -> list[Fact]:
    run, model, data = audit.run, audit.run.model, audit.run.data
    facts = [
        Fact("Model", shorten_name(model.name), model.fingerprint[:8], f"{format_count(model.parameters)} parameters"),
        Fact("Examples", shorten_name(data.name), data.fingerprint[:8], format_count(data.examples)),
    ]
    if run.holdout:
        facts.append(Fact("Held out", shorten_name(run.holdout.name), note=format_count(run.holdout.examples)))
    if run.bank:
        note = f"{run.bank.models} models, by {run.bank.value}"
        facts.append(Fact("Bank", shorten_name(run.bank.name), run.bank.id[:8] or None, note))
        counted = f"{run.bank.memorized} of {format_count(data.examples)}"
        facts.append(Fact(f"Likelihood ratio {run.bank.memorized_at:g} or more", counted))
    if len(run.checkpoints) > 1:
        note = None if run.trigger is None else f"median loss below 5 % of its start from {run.trigger} on"
        facts.append(Fact("Checkpoints", str(len(run.checkpoints)), note=note))
    if run.classes:
        facts.append(Fact("Classes", str(len(run.classes)), note=", ".join(run.classes[:6])))
    for prefix, span in run.extraction.items():
        facts.append(Fact(f"Given back word for word, {prefix} tokens given", format_span(span)))
    return [*facts, describe_cost(run.seconds, run.peak_memory_bytes, run.peak_gpu_memory_bytes)]


def _make_table(audit: Audit, truth: Truth) -> Json:
    """Return the table of one kind of truth."""
    rows = [
        each
        for each in audit.judgement(truth, checkpoint=audit.checkpoints[-1])
        if each.layer in (None, audit.run.main_layer)
    ]
    rows.sort(key=lambda each: each.measure == "blind")
    title, note = TRUTHS[truth]
    return {
        "title": title,
        "note": note,
        "counts": f"{max(each.found for each in rows):,} among {max(each.others for each in rows):,} others",
        "rows": list(map(_format_row, rows)),
        "unresolved": any(not rate.resolved for each in rows for rate in each.tpr_at),
    }


def _format_row(row: JudgementRecord) -> tuple[str, ...]:
    rates = [format_span(rate.rate) + ("" if rate.resolved else " *") for rate in (*row.tpr_at, *row.fpr_at)]
    name = f"{row.measure}, {'low' if row.sign < 0 else 'high'} values flagged"
    rule = ""
    if row.rule and row.rule_tpr and row.rule_fpr:
        rule = f"{row.rule}: TPR {format_span(row.rule_tpr)}, FPR {format_span(row.rule_fpr)}"
    shown = "blind: texts alone, no model" if row.measure == "blind" else name
    return (shown, format_span(row.auc), *rates, rule)


def _draw_panels(audit: Audit) -> list[Panel]:
    """Draw everything that the run has data for."""
    known = _find_known(audit)
    installed = {each.name for each in measures.MEASURES}
    detailed = tuple(f"{each.name}_" for each in measures.MEASURES if each.detail)
    names = [name for name in audit.measures if name in installed or not name.startswith(detailed)]
    drawn = measures.Drawn(audit.run, names, audit.values, known, audit.own)
    two_sided = [each for each in known if len(np.unique(each.found[each.judged])) == 2]
    return [
        *_draw_secrets(drawn),
        *_draw_course(drawn),
        *(_draw_roc(drawn, each) for each in two_sided if drawn.curves(each.name)),
        *_draw_layers(drawn),
        *_draw_agreement(drawn),
    ]


def _find_known(audit: Audit) -> list[measures.Known]:
    """Return what is to be found, and where it is known, as far as the run's own tables have it."""
    own, known = audit.own, list[measures.Known]()
    if not own.all():
        texts = audit.examples["text"].to_pylist()
        trained = {text for text, mine in zip(texts, own, strict=True) if mine}
        copies = np.array([not mine and text in trained for text, mine in zip(texts, own, strict=True)])
        known.append(measures.Known("membership", own, ~copies))
    flags = audit.examples["flag"].to_pylist()
    if any(flag is not None for flag in flags):
        known.append(measures.Known("flag", np.array([bool(flag) for flag in flags]), own))
    if audit.run.bank and "lira" in audit.measures:
        ratio = audit.values("lira")
        with np.errstate(invalid="ignore"):
            known.append(measures.Known("memorized", ratio >= audit.run.bank.memorized_at, ~np.isnan(ratio)))
    return known


def _draw_secrets(drawn: measures.Drawn) -> Iterator[Panel]:
    """Draw exposure by number of copies where that is known, and over checkpoints if there are several."""
    groups = mean_exposures(drawn.run.canaries)
    if sum(each.checkpoint == drawn.checkpoints[-1] for each in groups) > 1:
        measures.draw_exposure_by_copies(axes := new_axes(), drawn)
        note = "Mean over the secrets with its 95 % interval, under the model; number of secrets in brackets."
        yield make_panel("Exposure of planted secrets", note, axes)
    if groups and len(drawn.checkpoints) > 1:
        measures.draw_exposure_over_time(axes := new_axes(), drawn)
        note = "Mean exposure by copies in the training data, with its 95 % interval, at each checkpoint."
        yield make_panel("Exposure while training", note, axes)


def _draw_course(drawn: measures.Drawn) -> Iterator[Panel]:
    for name in drawn.measures_over_time() if len(drawn.checkpoints) > 1 else []:
        measures.draw_dynamics(axes := new_axes(), drawn, name)
        note = "Median, and the middle half of the examples, at each checkpoint."
        yield make_panel(f"{name} while training", note, axes)


def _draw_roc(drawn: measures.Drawn, truth: measures.Known) -> Panel:
    axes, blind = new_axes(), measures.blind_area(drawn.run, truth.name)
    measures.draw_roc(axes, drawn, truth)
    note = "No blind baseline could be computed."
    if blind is not None:
        note = f"The blind baseline, which never uses the model, has AUC {format_span(blind.auc)}."
    return make_panel(f"{TRUTHS[truth.name][0]}: ROC", note, axes)


def _draw_layers(drawn: measures.Drawn) -> Iterator[Panel]:
    if name := drawn.first_layered_measure():
        axes = new_axes()
        shown = f"AUC of {name}" if measures.draw_layers(axes, drawn) else f"Median {name} and its quartiles"
        main = f"The main layer is {drawn.run.main_layer} (dotted), chosen without looking at these curves."
        names = {truth: title for truth, (title, _) in TRUTHS.items()}
        yield make_panel("Layers", f"{shown} at each layer. {main}", axes, names=names)


def _draw_agreement(drawn: measures.Drawn) -> Iterator[Panel]:
    names, table = drawn.agreement()
    if len(names) > 1:
        size = 1.6 + 0.45 * len(names)
        measures.draw_agreement(axes := new_axes((size, size)), names, table)
        note = "Spearman's rank correlation under the model: 1 is the same order of examples, −1 the reverse."
        yield make_panel("Agreement of measures", note, axes, broad=True)


def _list_secrets(audit: Audit) -> list[Json]:
    """Return canaries by their exposure under the model, the most exposed first."""
    last = [each for each in audit.run.canaries if each.checkpoint == audit.checkpoints[-1]]
    last.sort(key=lambda each: -math.inf if each.exposure is None else each.exposure, reverse=True)
    found = []
    for each in last[:SHOWN_SECRETS]:
        course = [one.exposure for one in audit.run.canaries if (one.id, one.secret) == (each.id, each.secret)]
        found.append(
            {
                "secret": each.secret,
                "before": each.prompt,
                "copies": "–" if each.copies is None else f"{each.copies:,}",
                "exposure": format_number(each.exposure),
                "rank": "–" if each.rank is None else f"{each.rank:,.4g} of {each.references + 1:,}",
                "course": " → ".join(map(format_number, course)),
            }
        )
    return found


def _describe_secrets(audit: Audit) -> str:
    last = [each for each in audit.run.canaries if each.checkpoint == audit.checkpoints[-1]]
    values = [each.exposure for each in last if each.exposure is not None]
    if not values:
        return ""
    most = max(each.most for each in audit.run.canaries)
    groups = [each for each in mean_exposures(audit.run.canaries) if each.checkpoint == audit.checkpoints[-1]]
    means = f"mean exposure {np.mean(values):.2f} bits"
    if len(groups) > 1:
        by_copies = [f"{each.mean:.2f} with {_count_copies(each.copies)}" for each in groups]
        means = f"mean exposure in bits {', '.join(by_copies)}"
    first = f" The {SHOWN_SECRETS} most exposed:" if len(values) > SHOWN_SECRETS else ""
    return (
        f"{len(values):,} secrets, {means}; {CHANCE_BITS:.2f} is the mean of secrets that were never planted, and more "
        f"than {most:.1f} cannot be measured with this number of references.{first}"
    )


def _count_copies(copies: int | None) -> str:
    return "copies unknown" if copies is None else f"{copies:,} {'copy' if copies == 1 else 'copies'}"


def _list_contaminated(audit: Audit) -> list[Json]:
    """Return the items of the benchmark that stand in the data, the longest spans first."""
    if audit.contamination is None:
        return []
    rows = [each for each in audit.contamination.to_pylist() if each["example_id"] is not None]
    rows.sort(key=lambda each: (-each["words"], -each["similarity"]))
    return [
        {
            "item": each["item_id"],
            "text": shorten(each["text"], 200),
            "kind": each["kind"],
            "row": each["example_id"],
            "words": f"{each['words']:,} ({each['share']:.0%})" if each["words"] else "–",
            "similarity": f"{each['similarity']:.2f}",
            "loss": format_number(each["loss"]),
            "rank": "–" if each["score_rank"] is None else str(each["score_rank"]),
        }
        for each in rows[:SHOWN]
    ]


def _describe_tokens(audit: Audit) -> str:
    """Return what the colours of tokens mean."""
    if audit.tokens is None:
        return ""
    against = audit.run.tokens_against
    if against is None:
        return (
            "Tokens are coloured by how much likelier they are than the model's own distribution expects at their "
            "position, in deviations of log-probability over the vocabulary: a hint of what is known word for word, "
            "which any easy token gives too."
        )
    return (
        f"Tokens are coloured by how much likelier they are than under {shorten_name(against)}, in nats: what the "
        f"model learned since. Full colour is {FULL_COLOUR:g} or more."
    )


def _colour_tokens(audit: Audit) -> dict[int, list[tuple[str, int, str]]]:
    """Return, by row, the tokens with the strength of their colour in percent and what is known of them."""
    if audit.tokens is None:
        return {}
    found: dict[int, list[tuple[str, int, str]]] = {}
    for row, token, own, standard, against in zip(
        *(audit.tokens[name].to_pylist() for name in ("row", "token", "log_probability", "standardised", "against")),
        strict=True,
    ):
        value = standard if own is None or against is None else own - against
        strength = 0 if value is None else round(100 * min(max(value / FULL_COLOUR, 0.0), 1.0))
        facts = [] if own is None else [f"log-probability {format_number(own)}"]
        facts += [] if against is None else [f"before {format_number(against)}"]
        facts += [] if standard is None else [f"standardised {format_number(standard)}"]
        pieces = found.setdefault(row, [])
        if sum(len(piece[0]) for piece in pieces) < LONGEST_TEXT:
            pieces.append((token, strength, ", ".join(facts)))
    return found


def _rank_examples(audit: Audit) -> list[Json]:
    """Return examples in the order of each measure, the preferred one first."""
    found, first, tokens = [], audit.preferred if audit.measures else "", _colour_tokens(audit)
    for name in sorted(audit.measures, key=lambda each: each != first):
        record, listed = audit.run.measures[name], audit.top(SHOWN, name)
        if len(listed):
            order = "lowest first" if audit.lowest_first(name) else "highest first"
            meaning = record.meaning + (f"; high: {record.high}" if record.high else "")
            rows = [_list_example(audit, row, name) | {"tokens": tokens.get(row.row, [])} for row in listed]
            found.append({"measure": name, "order": order, "meaning": meaning, "rows": rows})
    return found


def _list_example(audit: Audit, row: EvidenceRow, measure: str) -> Json:
    """Return one example of a ranking."""
    described = audit.examples.slice(row.row, 1).to_pylist()[0]
    facts = [f"{name} {described[name]}" for name in ("class", "label", "source") if described[name] is not None]
    return {
        "rank": row.rank,
        "id": row.example_id,
        "value": format_number(row.value),
        "text": row.text if len(row.text) <= LONGEST_TEXT else row.text[:LONGEST_TEXT] + " …",
        "facts": facts + (["flagged"] if described["flag"] else []),
        "others": [(name, format_number(value)) for name, value in row.evidence.items() if name != measure],
    }


def _list_missing(audit: Audit) -> list[tuple[str, str, str]]:
    """Return each measure that some examples lack, for how many it is known, and why not for the others."""
    total = audit.run.data.examples + (audit.run.holdout.examples if audit.run.holdout else 0)
    return [
        (name, "none" if each.missing >= total else f"{total - each.missing:,} of {total:,}", each.reason)
        for name, each in audit.run.measures.items()
        if each.reason
    ]


def _note_layers(audit: Audit) -> list[str]:
    loose = [each.layer for each in audit.run.layers if each.converged is False]
    more = "PSMI had not settled after as many directions as it may take, at layers " + ", ".join(map(str, loose))
    return [f"{more}: its lowest values still move by more than 5 %."] if loose else []
