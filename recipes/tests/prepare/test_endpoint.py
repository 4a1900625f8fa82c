"""Paraphrasing through an endpoint that fails, throttles and stalls: nothing is lost, and nothing is paid twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import pytest

from prepare.conftest import TEXTS
from prepare.server import Act
from vestige.errors import MissingExtra, SpecError, UserError
from vestige_recipes.prepare import paraphrase
from vestige_recipes.prepare.endpoint import Again, read_reply, read_wait


def ask(questions, out, **settings):
    return paraphrase(data=questions, out=out, api_model="tiny", **settings)


def once_each(endpoint, texts=TEXTS, seed=0):
    return endpoint.paid == {f"{text}#{seed}": 1 for text in texts}


def test_every_text_is_asked_once_and_its_row_knows_where_it_came_from(endpoint, questions, tmp_path, lines):
    result = ask(questions, tmp_path / "out", price_in=1.0, price_out=10.0)
    assert once_each(endpoint)
    rows = lines(result.data)
    assert [row["original_id"] for row in rows] == [f"q{row}" for row in range(12)]
    assert [row["prompt"] for row in rows] == [f"That is, number 0: {text}" for text in TEXTS]
    assert {row["completion"] for row in rows} == {"Nobody."}
    assert "12 texts asked for now, 0 kept from before: 1,200 tokens sent and 120 received, cost 0.0024" in str(result)
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["now"] == {"sent": 1200, "received": 120, "untold": 0, "cost": pytest.approx(0.0024)}
    before = result.data.read_bytes()
    again = ask(questions, tmp_path / "out", price_in=1.0, price_out=10.0)
    assert len(endpoint.seen) == 12
    assert again.data.read_bytes() == before
    assert "0 texts asked for now, 12 kept from before: 0 tokens sent and 0 received, cost 0 " in str(again)
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["all"]["sent"] == 1200


def test_what_is_sent_is_what_was_set(endpoint, questions, tmp_path):
    ask(questions[:1], tmp_path / "out", temperature=0.3, seed=7, max_new_tokens=50, instruction="Say it otherwise.")
    (seen,) = endpoint.seen
    assert seen.body["messages"][0] == {"role": "system", "content": "Say it otherwise."}
    wanted = {"model": "tiny", "temperature": 0.3, "seed": 7, "max_tokens": 50}
    assert {name: seen.body[name] for name in wanted} == wanted
    assert len(seen.key) == 64


def test_failures_broken_replies_and_lost_connections_are_sent_again(endpoint, questions, tmp_path, lines):
    failures = [Act(status=500), Act(broken=True), Act(hang_up=True), Act(status=503)]
    endpoint.behave = lambda text, before: failures[before] if before < TEXTS.index(text) % 5 else Act()
    result = ask(questions, tmp_path / "out", concurrency=4)
    assert once_each(endpoint)
    assert len(lines(result.data)) == 12
    assert endpoint.asked == {text: 1 + row % 5 for row, text in enumerate(TEXTS)}
    assert "of 33 requests failed and were sent again" in str(result)
    assert "The endpoint may have charged for 10 of those." in str(result)
    keys = {seen.text: seen.key for seen in endpoint.seen}
    assert all(seen.key == keys[seen.text] for seen in endpoint.seen), "sent again under another key"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["seconds", "milliseconds"])
def test_retry_after_stops_all_requests_for_as_long_as_it_says(form, endpoint, questions, tmp_path):
    header = ("Retry-After", "0.5") if form == "seconds" else ("Retry-After-Ms", "500")
    throttled = threading.Event()

    def behave(text, before):
        if not throttled.is_set():
            throttled.set()
            return Act(status=429, headers=(header,))
        return Act(stall=0.02)

    endpoint.behave = behave
    ask(questions, tmp_path / "out", concurrency=2)
    times = sorted(seen.time for seen in endpoint.seen)
    # One other request may be under way when the first is refused, and one more be sent before the word is out.
    gap = max(after - before for before, after in pairwise(times))
    assert gap > 0.4
    assert times[3] - times[0] > 0.45
    assert once_each(endpoint)


def test_a_date_in_retry_after_is_understood():
    assert read_wait({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert read_wait({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0
    assert read_wait({"retry-after": "soon"}) is None
    assert read_wait({}) is None


def test_waits_grow_and_differ(monkeypatch):
    from vestige_recipes.prepare.endpoint import Pace

    waits = []
    pace = Pace()
    monkeypatch.setattr(pace.stop, "wait", lambda seconds: waits.append(seconds))
    for attempt in [0] * 50 + [3] * 50 + [20] * 50:
        pace.rest(attempt, None)
    assert 0.25 <= min(waits[:50]) < max(waits[:50]) <= 0.5
    assert 2 <= min(waits[50:100]) < max(waits[50:100]) <= 4
    assert 30 <= min(waits[100:]) < max(waits[100:]) <= 60


def test_a_stall_ends_with_the_timeout_and_is_sent_again(endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(stall=30) if before == 0 and text in TEXTS[:3] else Act()
    started = time.monotonic()
    result = ask(questions, tmp_path / "out", timeout=0.4)
    assert time.monotonic() - started < 10
    assert result.rows == 12
    assert endpoint.asked == {text: 1 + (text in TEXTS[:3]) for text in TEXTS}
    assert "3 no word for 0.4 s" in str(result)


def test_no_more_requests_than_allowed_are_under_way(endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(stall=0.03)
    ask(questions, tmp_path / "out", concurrency=3)
    assert endpoint.most_at_once == 3


@pytest.mark.slow
def test_killed_and_run_again_nothing_is_lost_and_nothing_paid_twice(endpoint, questions, tmp_path, lines):
    endpoint.behave = lambda text, before: Act(stall=0.15)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    words = ["data", "paraphrase", "--data", str(data), "--out", str(tmp_path / "out"), "--api-model", "tiny"]
    command = [sys.executable, "-m", "vestige.cli", *words, "--concurrency", "2"]
    process = subprocess.Popen(command, env=os.environ | {"VESTIGE_QUIET": "1"}, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "out").rglob("*.json"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {json.loads(path.read_text())["text"] for path in (tmp_path / "out" / "replies").rglob("*.json")}
    assert 5 <= len(kept) < 12
    under_way = set(endpoint.asked) - kept
    assert len(under_way) <= 2
    result = paraphrase(data=data, out=tmp_path / "out", api_model="tiny", concurrency=2)
    assert all(endpoint.asked[text] == 1 for text in kept)
    assert all(endpoint.asked[text] == 2 for text in under_way)
    assert sum(endpoint.asked.values()) == 12 + len(under_way)
    assert [row["original_id"] for row in lines(result.data)] == [f"q{row}" for row in range(12)]


@pytest.mark.slow
def test_ctrl_c_waits_for_the_replies_under_way(endpoint, questions, tmp_path, monkeypatch):
    def interrupted(futures, return_when):
        while len(endpoint.seen) < 3:
            time.sleep(0.01)
        raise KeyboardInterrupt

    endpoint.behave = lambda text, before: Act(stall=0.3)
    monkeypatch.setattr("vestige_recipes.prepare.endpoint.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(questions, tmp_path / "out", concurrency=3)
    assert len(endpoint.seen) == 3
    monkeypatch.undo()
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.address)
    ask(questions, tmp_path / "out", concurrency=3)
    assert once_each(endpoint)


def test_a_text_that_never_gets_a_reply_is_named_and_the_others_are_kept(endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(status=500) if text == TEXTS[4] else Act()
    with pytest.raises(UserError, match="1 of 12 texts got no reply in 3 attempts each, such as 'Who lives in house 4"):
        ask(questions, tmp_path / "out", retries=2)
    assert not (tmp_path / "out" / "data.jsonl").exists()
    endpoint.behave = lambda text, before: Act()
    assert ask(questions, tmp_path / "out", retries=2).rows == 12
    assert once_each(endpoint)


def test_an_endpoint_that_is_down_is_left_in_peace(endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(status=500)
    with pytest.raises(UserError, match=r"does not answer: the last \d+ texts failed 2 times each \(status 500\)"):
        ask(questions, tmp_path / "out", retries=1, concurrency=2)
    assert len(endpoint.seen) <= 2 * 5


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "invalid_api_key", "Check OPENAI_API_KEY"),
        (404, "model_not_found", "Check `api_model`"),
        (400, "unsupported_parameter", "`temperature`"),
        (429, "insufficient_quota", "quota"),
    ],
)
def test_what_does_not_pass_is_not_sent_again(status, code, advice, endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(status=status, error=code)
    with pytest.raises(UserError, match=rf"refuses \(status {status}\): .*(\n|.)*{advice}"):
        ask(questions, tmp_path / "out", concurrency=2)
    assert len(endpoint.seen) <= 4
    assert max(endpoint.asked.values()) == 1


def test_replies_that_are_no_paraphrases_are_flagged_and_counted(endpoint, questions, tmp_path, lines):
    acts = [
        Act(text=""),
        Act(text="  \n"),
        Act(text="I'm sorry, but I can't help with that."),
        Act(text="", refusal="No."),
        Act(text="", finish="content_filter"),
        Act(status=400, error="content_filter"),
        Act(text="Which person has their home in", finish="length"),
        Act(text='"who lives in house 7"'),
        Act(status=400, error="context_length_exceeded"),
    ]
    endpoint.behave = lambda text, before: (acts + [Act()] * 3)[TEXTS.index(text)]
    result = ask(questions, tmp_path / "out")
    assert result.flagged == {"empty": 2, "refused": 4, "cut": 1, "same": 1, "too-long": 1}
    assert [row["id"] for row in lines(result.data)] == ["q9-p1", "q10-p1", "q11-p1"]
    flagged = lines(tmp_path / "out" / "flagged.jsonl")
    assert [row["problem"] for row in flagged] == ["empty"] * 2 + ["refused"] * 4 + ["cut", "same", "too-long"]
    assert "4 left out, in flagged.jsonl: the model or its filter refused." in str(result)
    kept = ask(questions, tmp_path / "out", keep_flagged=True, overwrite=True)
    assert (kept.rows, kept.flagged, len(endpoint.seen)) == (12, result.flagged, 12)
    assert not (tmp_path / "out" / "flagged.jsonl").exists()


def test_a_reply_with_half_an_emoji_is_kept_and_paid_once(endpoint, questions, tmp_path, lines, capsys):
    endpoint.behave = lambda text, before: Act(text=f"{text} \ud83d so")
    result = ask(questions[:3], tmp_path / "out")
    assert [row["prompt"] for row in lines(result.data)] == [f"{text} \ufffd so" for text in TEXTS[:3]]
    assert "Replies: 3 halves of surrogate pairs" in capsys.readouterr().err
    ask(questions[:3], tmp_path / "out", overwrite=True)
    assert len(endpoint.seen) == 3


def test_a_reply_that_is_nested_too_deeply_is_a_broken_one(questions):
    with pytest.raises(Again, match="broken reply"):
        read_reply("[" * 100_000)


def test_equal_texts_are_asked_for_once_and_several_paraphrases_with_several_seeds(endpoint, tmp_path, lines):
    rows = [{"id": name, "prompt": "Who are you?", "completion": "Me."} for name in "ab"]
    result = ask(rows, tmp_path / "out", paraphrases=3, seed=5)
    assert endpoint.paid == {f"Who are you?#{seed}": 1 for seed in (5, 6, 7)}
    assert [row["id"] for row in lines(result.data)] == ["a-p1", "a-p2", "a-p3", "b-p1", "b-p2", "b-p3"]
    more = ask(rows, tmp_path / "more", paraphrases=4, seed=5, cache=tmp_path / "out" / "replies")
    assert (len(endpoint.seen), more.rows) == (4, 8)


def test_a_dry_run_asks_nothing_and_writes_nothing(endpoint, questions, tmp_path):
    result = ask(questions, tmp_path / "out", dry_run=True, price_in=2.0, instruction="x" * 36)
    assert "12 texts, of which 0 have a reply from before." in str(result)
    # 9 tokens of instruction, 6 of each text (24 or 25 bytes) and 8 around them.
    sent = sum(9 + 8 + (len(text) + 3) // 4 for text in TEXTS)
    assert f"about {sent} tokens sent and {sent - 12 * 17} received, cost {sent * 2e-6:.4g}" in str(result)
    assert (endpoint.seen, list(tmp_path.iterdir())) == ([], [])


def test_replies_without_usage_are_said_to_be_uncounted(endpoint, questions, tmp_path):
    endpoint.behave = lambda text, before: Act(usage=text not in TEXTS[:2])
    result = ask(questions, tmp_path / "out")
    assert "1,000 tokens sent and 100 received" in str(result)
    assert "2 replies did not say how many tokens they took" in str(result)


def test_a_damaged_reply_is_asked_for_again(endpoint, questions, tmp_path):
    ask(questions[:2], tmp_path / "out")
    path = next((tmp_path / "out" / "replies").rglob("*.json"))
    path.write_text(path.read_text()[:20])
    assert ask(questions[:2], tmp_path / "out").rows == 2
    assert len(endpoint.seen) == 3


def test_without_a_key_and_an_address_it_says_what_to_set(questions, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SpecError, match="set OPENAI_API_KEY"):
        ask(questions, tmp_path / "out")


def test_an_endpoint_of_ones_own_needs_no_key(endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert ask(questions[:1], tmp_path / "out").rows == 1


def test_a_password_in_the_address_is_sent_and_never_written(endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.address.replace("://", "://me:secret@"))
    result = ask(questions[:1], tmp_path / "out")
    assert result.rows == 1
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"secret" in content for content in written)
    assert json.loads((tmp_path / "out" / "prepare.json").read_text())["address"] == endpoint.address


def test_without_the_package_it_says_how_to_install_it(questions, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'vestige\[openai\]'"):
        ask(questions, tmp_path / "out")


def test_nobody_listening_is_told_from_a_slow_answer(questions, tmp_path, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setattr("vestige_recipes.prepare.endpoint.FIRST_DELAY", 0.01)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/v1 does not answer: .*connection lost"):
        ask(questions, tmp_path / "out", retries=1)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:1/v1?key=hidden", "holds a query"),
        ("http://127.0.0.1:1/v1#part", "holds a query"),
        ("nonsense", "is not a web address"),
        ("http://[::1", "is not an address"),
        ("http://host:port/v1", "is not an address"),
    ],
)
def test_an_address_that_no_request_can_go_to(address, message, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(SpecError, match=message) as caught:
        ask(questions, tmp_path / "out")
    assert "hidden" not in str(caught.value)


def test_a_key_that_cannot_be_sent(endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "kéy-of-mine")
    with pytest.raises(SpecError, match="OPENAI_API_KEY holds letters") as caught:
        ask(questions, tmp_path / "out")
    assert "of-mine" not in str(caught.value)


@pytest.mark.parametrize(
    "echoed",
    [
        "Authorization: Bearer my-secret-key",
        "no such key: my-secret-key",
        "Basic dXNlcjpwYXNzd29yZA==",
        "user:password",
        "Incorrect API key provided: sk-abc123def",
    ],
)
def test_what_an_endpoint_repeats_of_a_key_or_password_is_masked(echoed, endpoint, questions, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "my-secret-key")
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint.address.replace("//", "//user:password@"))
    endpoint.behave = lambda text, before: Act(status=401, error="invalid", message=f"{echoed} \x1b[31m")
    with pytest.raises(UserError, match=r"refuses \(status 401\): .*\*\*\*") as caught:
        ask(questions, tmp_path / "out")
    for secret in ("my-secret-key", "dXNlcjpwYXNzd29yZA", "password", "abc123def", "\x1b"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("wait", ["inf", "nan", "1e18", "-5", "soon", "Fri, 99 Foo 99999 99:99:99 GMT"])
def test_a_wait_that_is_none_is_not_listened_to(wait):
    found = read_wait({"retry-after": wait})
    assert found is None or found == 0
    assert read_wait({"retry-after-ms": wait}) in (None, 0)
