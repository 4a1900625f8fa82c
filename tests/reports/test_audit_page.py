"""The page of an audit: evidence without verdicts, inert texts, and the same page in a browser."""

import numpy as np
import pyarrow as pa
import pytest

from tests.reports.browser import open_page
from vestige.errors import UserError
from vestige.measures import attack
from vestige.reports import render_page, report
from vestige.runs import (
    Audit,
    AuditRecord,
    CanaryRecord,
    DataRecord,
    JudgementRecord,
    LayerRecord,
    MeasureRecord,
    ModelRecord,
    RateRecord,
    SubjectRecord,
    evidence_table,
    write_audit,
)

COUNT, HELD = 40, 20
HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"


def span(interval):
    return tuple(float(each) for each in interval)


def judged(measure, scores, found, sign, checkpoint=20, layer=None):
    told = attack(sign * scores, found)
    rates = {
        name: [
            RateRecord(level=level, rate=span(rate.rate), threshold=None, resolved=rate.resolved) for level, rate in of
        ]
        for name, of in (("tpr_at", told.tpr_at.items()), ("fpr_at", told.fpr_at.items()))
    }
    return JudgementRecord(
        truth="membership",
        measure=measure,
        checkpoint=checkpoint,
        layer=layer,
        sign=sign,
        auc=span(told.auc),
        found=told.members,
        others=told.others,
        unscored=told.unscored,
        **rates,
    )


@pytest.fixture
def audited(tmp_path):
    """A run of two checkpoints and two layers, written without any model."""
    draw, total = np.random.default_rng(0), COUNT + HELD
    own = np.arange(total) < COUNT
    loss = draw.normal(3.0, 0.3, total) - 1.5 * own
    ids, rows = [f"row-{row}" for row in range(total)], range(total)
    tables = []
    for number, shift in ((10, 2.0), (20, 0.0)):
        nothing = np.full(total, np.nan)
        tables.append(evidence_table(ids, {"loss": loss + shift, "logit_gap": nothing}, checkpoint=number, rows=rows))
        for layer in (1, 2):
            states = {"mahalanobis": draw.gamma(3.0, 1.0, total)}
            tables.append(evidence_table(ids, states, checkpoint=number, layer=layer, rows=rows))
    texts = [HOSTILE if row == int(loss[:COUNT].argmin()) else f"Example {row} <b>" for row in rows]
    nulls = pa.nulls(total, pa.string())
    examples = pa.table(
        {
            "row": list(rows),
            "example_id": ids,
            "part": ["data" if mine else "holdout" for mine in own],
            "source": nulls,
            "label": nulls,
            "class": nulls,
            "flag": pa.nulls(total, pa.bool_()),
            "targets": [5] * total,
            "text": texts,
        }
    )
    measures = {
        "loss": MeasureRecord(meaning="mean loss", high="not known"),
        "logit_gap": MeasureRecord(meaning="gap", high="known", missing=total, reason="no choices <i>"),
        "mahalanobis": MeasureRecord(meaning="distance", high="atypical", layered=True),
    }
    subjects = [
        SubjectRecord(number=number, name=f"run/checkpoint-{number}", steps=number, fingerprint="f", median_loss=1.0)
        for number in (10, 20)
    ]
    record = AuditRecord(
        vestige="0",
        created="2026-01-01T00:00:00+00:00",
        command="vestige audit --model run/checkpoint-20 --data train.jsonl --out run",
        config={},
        versions={"torch": "2"},
        model=ModelRecord(name="run/checkpoint-20", fingerprint="0" * 64, parameters=1000),
        data=DataRecord(name="train.jsonl", fingerprint="1" * 64, examples=COUNT),
        holdout=DataRecord(name="held.jsonl", fingerprint="2" * 64, examples=HELD),
        reference=None,
        bank=None,
        checkpoints=subjects,
        trigger=None,
        layers=[LayerRecord(layer=layer, directions=None, converged=None, smi=None) for layer in (1, 2)],
        main_layer=2,
        classes=[],
        measures=measures,
        judgement=[judged("loss", loss, own, -1), judged("blind", draw.normal(size=total), own, 1, checkpoint=None)],
        extraction={},
        notes=["A note."],
        seconds=1.0,
        peak_memory_bytes=0,
    )
    return write_audit(tmp_path / "run", record, tables, examples, {})


def test_the_page_says_evidence_and_sets_the_blind_baseline_beside_the_attack(audited):
    page = report(audited).read_text()
    assert "Evidence, no verdicts" in page
    assert page.index("loss, low values flagged") < page.index("blind: texts alone, no model")
    assert "Too few others to distinguish this level from zero" in page
    assert "none</td><td>no choices &lt;i&gt;" in page
    assert "is memorized" not in page


@pytest.mark.slow
def test_hostile_texts_stay_texts(audited, tmp_path, chromium):
    page = open_page(chromium, report(audited, tmp_path / "page.html").as_uri())
    assert page.console == []
    assert page.all("img") == []
    assert len(page.all("script")) == 1
    assert page.all("title")[0].text.startswith("What checkpoint-20 has memorized")
    assert "</script><img src=x" in page.all("li", "card")[0].text
    assert len(page.all("svg")) == 3 + 1, "loss while training, ROC, layers and agreement"
    names = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(names) == len(set(names)), "no two figures have a name in common"


@pytest.mark.slow
def test_planted_secrets_are_drawn_by_copies_and_over_checkpoints(audited, tmp_path):
    """Two secrets never planted and two planted eight times; of one, nothing is known."""
    shown = {"prompt": "", "secret": "1", "references": 15, "rank": 1.0, "loss": 1.0, "most": 4.0}
    planted = [
        CanaryRecord(id=f"{copies}-{number}", checkpoint=step, copies=copies, exposure=bits, **shown)
        for step, factor in ((10, 0.5), (20, 1.0))
        for copies, values in ((0, (1.0, 1.5)), (8, (3.0 * factor, 3.5 * factor)), (9, (None,)))
        for number, bits in enumerate(values)
    ]
    without = render_page(audited)
    record = Audit.open(audited).run.model_copy(update={"canaries": planted})
    (audited / "run.json").write_text(record.model_dump_json())
    page = render_page(audited)
    by_copies, course = (figure_of(page, title) for title in ("Exposure of planted secrets", "Exposure while training"))
    assert [f">{copies}</t" in by_copies for copies in ("0", "8", "9")] == [True, True, False]
    assert by_copies.count(">(2)</t") == 2
    assert all(f"</i>{words}</span>" in course for words in ("0 copies", "8 copies", "never planted, on average"))
    assert "</i>9 copies</span>" not in course
    assert "Exposure" not in without


def figure_of(page, title):
    """The part of the page from a figure's title to its end."""
    return page[page.index(f"<h2>{title}</h2>") :].partition("</figure>")[0]


@pytest.mark.slow
def test_the_link_chooses_the_measure(audited, tmp_path, chromium):
    address = report(audited, tmp_path / "page.html").as_uri()
    for choice in ("loss", "mahalanobis"):
        page = open_page(chromium, f"{address}#measure={choice}")
        shown = [each for each in page.all("div", "ranking") if "hidden" not in each.attributes]
        assert [each.attributes["data-measure"] for each in shown] == [choice]
    values = [float(each.text) for each in page.all("span", "score")]
    assert len(values) == 2 * 25


@pytest.mark.slow
def test_an_audit_is_served_live_and_a_folder_that_is_none_is_reported(audited, tmp_path):
    assert 'role="status">live' in render_page(audited, live="1")
    assert "All results" in render_page(audited, home="/")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError):
        report(tmp_path / "empty")


@pytest.mark.slow
def test_figures_load_nothing_carry_no_address_and_take_their_colours_from_the_page(audited):
    page = report(audited).read_text()
    figure = figure_of(page, "loss while training")
    assert "var(--tone-0)" in figure
    assert "DejaVu" not in page
    assert "://" not in page
    assert "<image" not in page
    assert "nan" not in figure.lower()
    assert report(audited).read_text() == page
