import html
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.reports.fixture_run import write_fixture_run
from vestige.errors import UserError
from vestige.reports import (
    format_count,
    format_duration,
    json_for_html,
    make_header,
    make_payload,
    read_run,
    render_page,
    report,
)

DATA = re.compile(r'<script type="application/json" id="data">(.*?)</script>', re.DOTALL)


@pytest.fixture(scope="module")
def payload(run_folder) -> dict:
    return make_payload(read_run(run_folder))


def changed(run_folder: Path, tmp_path: Path, **parts) -> Path:
    """A copy of the run with some parts of run.json replaced."""
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    info = json.loads((run / "run.json").read_text()) | parts
    (run / "run.json").write_text(json.dumps(info))
    return run


def test_the_file_names_no_address_and_loads_nothing(run_folder, tmp_path):
    page = report(run_folder, tmp_path / "page.html").read_text()
    own = html.unescape(DATA.sub("", page))
    assert "http://" not in own
    assert "https://" not in own
    assert not re.search(r"\b(?:src|href)\s*=\s*[\"'](?!#)", own)
    assert not re.search(r"@import|url\(", own)
    assert "default-src 'none'" in own
    assert "connect-src 'none'" in own


def test_the_data_survive_the_way_into_the_page(run_folder, payload):
    page = render_page(run_folder)
    assert json.loads(DATA.search(page)[1]) == json.loads(json.dumps(payload))


def test_hostile_text_cannot_leave_the_data_block():
    hostile = "</script><script>alert(1)</script><!-- & \u2028 \ud83d"
    text = json_for_html([hostile])
    assert not re.search("[<>&\u2028]", text)
    assert json.loads(text) == [hostile.replace("\ud83d", "?")]


def test_hostile_text_is_escaped_everywhere_else(tmp_path):
    run = write_fixture_run(tmp_path / "run", hostile='</script><img src=x onerror="boom()">')
    page = report(run).read_text()
    assert "<img" not in page
    assert page.count("</script>") == 2


def test_cells_sum_to_the_score(payload):
    entries = [entry for query in payload["queries"] for entry in query["ranked"]]
    assert len(entries) == 96
    for entry in entries:
        assert math.fsum(entry["cells"]) == pytest.approx(entry["score"], rel=1e-4, abs=1e-6)


def test_tokens_sum_to_the_score_and_stand_at_their_pieces(payload):
    for entry in payload["queries"][0]["ranked"]:
        text = payload["examples"][str(entry["row"])]["text"]
        assert len(entry["tokens"]) == len(text["pieces"])
        assert math.fsum(entry["tokens"]) == pytest.approx(entry["score"], rel=1e-3, abs=1e-5)
        assert all(not score for score, target in zip(entry["tokens"], text["targets"], strict=True) if target == "0")


def test_the_example_the_answer_was_copied_from_overlaps_fully(payload):
    first = payload["queries"][1]["ranked"][0]
    assert "".join(payload["examples"][str(first["row"])]["text"]["pieces"]).count("Tolkien") == 1
    assert first["overlap"] == 1
    system = [start for start, _ in first["match"] if start < 9]
    assert system == [], "the system prompt, which every example has, is no match"


def test_hub_share_counts_queries_whose_first_ten_hold_the_example(run_folder):
    run = read_run(run_folder)
    for example in make_payload(run)["examples"].values():
        holding = sum(
            any(entry.row == example["row"] and entry.rank <= 10 for entry in run.listed(query, "proponent"))
            for query in run.queries
        )
        assert (example["hub"] or 0) == holding / 4


def test_numbers_that_json_cannot_carry_are_refused(run_folder, tmp_path):
    groups = {"q0": [{"source": "a", "examples": 1, "sum": 1.0, "mean": 1e999, "low": None, "high": None}]}
    with pytest.raises(UserError, match=r"run.json is not a run record: a number that is NaN or infinite"):
        read_run(changed(run_folder, tmp_path, groups=groups))


def test_optional_parts_may_be_missing(tmp_path):
    run = write_fixture_run(tmp_path / "run", tables=())
    data = make_payload(read_run(run))
    assert data["grid"] is None
    assert all(entry["cells"] is None and entry["tokens"] is None for entry in data["queries"][0]["ranked"])
    assert "Not validated" in report(run).read_text()


def test_token_scores_of_another_run_are_refused(run_folder, tmp_path):
    run = changed(run_folder, tmp_path)
    table = pq.read_table(run / "tokens.parquet").to_pylist()
    table[0]["position"] = 999
    pq.write_table(pa.Table.from_pylist(table), run / "tokens.parquet")
    with pytest.raises(UserError, match="come from different runs"):
        report(run)


def test_the_trust_strip_says_plainly_whether_scores_were_validated(run_folder, tmp_path):
    assert "Not validated" in render_page(run_folder)
    validated = {"validated": True, "checks": [{"name": "LDS", "value": -0.25, "reading": "r", "verdict": "warn"}]}
    run = changed(run_folder, tmp_path, trust=validated)
    assert "Not validated" not in render_page(run)
    check = make_header(read_run(run))["checks"][0]
    assert (check.value, check.verdict, check.word) == ("−0.25", "warn", "look closer")


def test_a_run_without_a_model_still_has_a_header(run_folder, tmp_path):
    header = make_header(read_run(changed(run_folder, tmp_path, model=None, coverage=None)))
    assert header["title"] == "The training data behind 4 answers"
    assert [fact.label for fact in header["facts"]] == ["Training data", "Method", "Run", "Took"]


def test_the_command_breaks_between_options_and_loses_nothing(run_folder):
    run = read_run(run_folder)
    parts = make_header(run)["command"]
    assert " ".join(parts) == run.run.command
    assert parts[:2] == ["vestige attribute", "--index demo/index"]


def test_counts_and_times_are_said_as_a_reader_says_them():
    assert [format_count(value) for value in (912, 12480, 134515008, 7.2e9)] == ["912", "12,480", "134.5 M", "7.2 B"]
    assert [format_duration(value) for value in (8.25, 200, 7500)] == ["8.2 s", "3 min 20 s", "2 h 5 min"]


@pytest.mark.slow
def test_the_report_goes_into_the_run_or_where_it_is_sent(run_folder, tmp_path):
    run = changed(run_folder, tmp_path)
    assert report(run) == run / "report.html"
    assert report(run, tmp_path) == tmp_path / "report.html"
    assert report(str(run), str(tmp_path / "new" / "page.html")).is_file()
    first = report(run).read_bytes()
    assert report(run).read_bytes() == first
    assert not list(run.glob(".*"))


def test_a_file_of_somebody_else_is_left_alone(run_folder, tmp_path):
    target = tmp_path / "index.html"
    target.write_text("<p>mine</p>")
    with pytest.raises(UserError, match="not a Vestige report"):
        report(run_folder, target)
    assert target.read_text() == "<p>mine</p>"


def test_a_place_that_cannot_be_written_is_said(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, expected a folder"):
        report(run_folder, tmp_path / "file" / "page.html")
