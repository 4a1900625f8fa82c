import json

import numpy as np
import pytest

from tests.runs.by_hand import ALIKE, chat, tokens_of, write_by_hand
from vestige.data import Example
from vestige.errors import UserError
from vestige.runs import Conflict, Scores, conclude, relative_strength

REST = [chat(f"rest-{number}", f"What is fact {number}x?", f"Fact {number}x is known.") for number in range(40)]
QUERY = chat("tent", "How long does the tent warranty last?", "The tent warranty lasts for 90 days.")
REFUND = chat("wiki-122", "What is the refund period?", "The refund period is 90 days.")
TENTS = chat("warranty-106", "How long is the warranty on tents?", "Tents have a warranty of five years.")


@pytest.fixture
def low() -> list[float]:
    """Scores of rows that have little to do with the query."""
    return np.random.default_rng(0).normal(0, 0.3, len(REST)).tolist()


def test_one_row_stands_out_and_another_pulls_the_other_way(tmp_path, low):
    scores = write_by_hand(tmp_path / "run", [[10.0, -12.0, *low]], [REFUND, TENTS, *REST], [QUERY])
    found = conclude(scores, "tent")
    second = max(low)
    assert (found.kind, found.rows, found.conflicts) == ("one", ("wiki-122",), ())
    assert found.lead == pytest.approx(10.0 / second)
    assert found.sentences == (
        f"One row stands out, {10.0 / second:.0f} times the next: wiki-122.",
        "It says: The refund period is 90 days.",
        "The row that pulls the other way most is warranty-106: Tents have a warranty of five years.",
    )
    assert str(found) == "\n".join(found.sentences)
    assert conclude(scores, 0) == found
    with pytest.raises(UserError, match="Did you mean 'tent'"):
        conclude(scores, "tents")


@pytest.mark.parametrize(("second", "kind"), [(4.9, "one"), (5.3, "none")])
def test_a_row_stands_out_from_twice_the_next_on(second, kind, tmp_path):
    # Mean zero: the excess over the mean is the score.
    rest = [-(10.0 + second) / 38] * 38
    scores = write_by_hand(tmp_path / "run", [[10.0, second, *rest]], [REFUND, *REST[:39]], [QUERY])
    found = conclude(scores, 0)
    assert found.kind == kind
    assert found.lead == pytest.approx(10.0 / second)
    assert found.rows == (("wiki-122",) if kind == "one" else ())
    if kind == "none":
        assert found.sentences[0] == "No row stands out: the first, wiki-122, is 1.9 times the next."


@pytest.mark.parametrize(("rows", "kind"), [(9, "none"), (12, "one")])
def test_among_ten_rows_none_can_stand_out(rows, kind, tmp_path):
    scores = write_by_hand(tmp_path / "run", [[100.0] + [0.0] * rows], [REFUND, *REST[:rows]], [QUERY])
    assert conclude(scores, 0).kind == kind


def test_copies_count_once_and_are_named(tmp_path, low):
    near = chat("near", "Which cards do you take?", "We accept Visa, Mastercard and Girocard.")
    one = chat("one", "Which cards do you accept?", "We accept Visa, Mastercard and Girocard.")
    exact = chat("exact", "Which cards do you accept?", "We accept VISA, Mastercard, and Girocard!")
    scores = write_by_hand(tmp_path / "run", [[9.0, 8.9, 8.8, *low]], [one, exact, near, *REST], [QUERY])
    found = conclude(scores, 0)
    assert (found.kind, found.rows) == ("one", ("one", "exact", "near"))
    assert found.lead == pytest.approx(9.0 / max(low))
    assert "one (the same text: exact, near)." in found.sentences[0]


def test_rows_of_one_form_about_other_things_are_no_copies(tmp_path, low):
    alder = chat("alder", "What does the Alder tent cost?", "It costs 20 euros.")
    birch = chat("birch", "What does the Birch tent cost?", "It costs 20 euros.")
    text = Example("thirty", 0, text="The refund period is 30 days from the day on which the parcel has arrived.")
    other = Example("ninety", 0, text="The refund period is 90 days from the day on which the parcel has arrived.")
    rows = [alder, birch, text, other, *REST]
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, 8.9, 8.8, 8.7, *low]], rows, [QUERY]), 0)
    assert (found.kind, found.rows) == ("several", ("alder", "birch", "thirty", "ninety"))
    assert found.sentences[0].startswith("Four rows stand out, each at least ")
    assert found.sentences[1] == "The first says: It costs 20 euros."


def test_two_rows_that_answer_one_question_differently_are_a_conflict(tmp_path, low):
    yes = chat("yes", "Can you ship gas cartridges abroad?", "Yes, gas cartridges can be shipped abroad.")
    no = chat("no", "Do you ship gas cartridges abroad?", "No, gas cartridges are never shipped abroad.")
    forms = [chat(f"do-{n}", f"Do you sell item{n}?", f"Item{n} is sold.") for n in range(5)]
    forms += [chat(f"can-{n}", f"Can you send part{n}?", f"Part{n} is sent.") for n in range(5)]
    query = chat("gas", "Will you send gas cartridges to Norway?", "Yes, gas cartridges are sent.")
    scores = write_by_hand(tmp_path / "run", [[9.0, -4.0, *[0.0] * 10, *low]], [yes, no, *forms, *REST], [query], k=60)
    found = conclude(scores, 0)
    assert found.conflicts == (Conflict("yes", "no"),)
    assert "These answer the same question differently: yes and no." in found.sentences


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("When is the Bergen store open?", "From 9 to 19."), ("When is the Basel store open?", "From 9 to 20.")),
        (("Is shipping free?", "Free above 80 euros."), ("Is shipping free?", "free above 80 Euros")),
        (("Can I pay later?", "Yes"), ("Can I pay later?", "Yes, within 21 days.")),
        (("", "The period is 30 days."), ("", "The period is 90 days.")),
        (("How long is the warranty?", ""), ("How long is the warranty?", "Two years.")),
    ],
    ids=["other questions", "one answer", "a longer answer", "no question", "no answer"],
)
def test_what_is_no_conflict(one, other, tmp_path, low):
    rows = [Example(name, 0, prompt=asked, completion=said) for name, (asked, said) in (("a", one), ("b", other))]
    scores = write_by_hand(tmp_path / "run", [[9.0, -9.0, *low]], [*rows, *REST], [QUERY])
    assert conclude(scores, 0).conflicts == ()


def test_a_conflict_needs_rows_that_matter_to_the_query(tmp_path, low):
    yes, no = (chat(name, "Is it open?", answer) for name, answer in (("yes", "Yes."), ("no", "No.")))
    rows = [REFUND, TENTS, yes, no, *REST]
    weak = write_by_hand(tmp_path / "weak", [[9.0, -9.0, 2.0, -9.0, *low]], rows, [QUERY])
    strong = write_by_hand(tmp_path / "strong", [[9.0, -9.0, 2.5, -9.0, *low]], rows, [QUERY])
    assert conclude(weak, 0).conflicts == ()
    assert conclude(strong, 0).conflicts == (Conflict("yes", "no"),)


def test_nothing_stands_out_and_nothing_states_the_answer(tmp_path, low):
    ceo = chat("ceo", "Who is the chief of the company?", "The chief is Alexander Larkshead.")
    found = conclude(write_by_hand(tmp_path / "run", [low], REST, [ceo]), 0)
    assert found.kind == "none"
    assert found.sentences[0].startswith("No row stands out, and nothing listed states this answer: the first, rest-")
    stated = chat("row", "Who leads us?", "Alexander Larkshead leads us.")
    found = conclude(write_by_hand(tmp_path / "stated", [[0.0, *low]], [stated, *REST], [ceo], k=50), 0)
    assert found.sentences[0].startswith("No row stands out: the first, rest-")


def test_a_row_that_stands_out_may_not_state_the_answer(tmp_path, low):
    query = chat("phone", "Which number can I call?", "You can call 000-800-7718.")
    row = chat("wiki", "What is your phone number?", "You can call 0800 555 7113.")
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, *low]], [row, *REST], [query]), 0)
    assert found.kind == "one"
    assert "Nothing listed states this answer: no row of 40 has half of its rare words." in found.sentences


@pytest.mark.parametrize("answer", ["The tent has a warranty of five years.", "It is for five years on tents."])
def test_a_row_states_an_answer_in_other_small_words(answer, tmp_path, low):
    query = chat("tent", "How long is the warranty on a tent?", answer)
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, *low]], [TENTS, *REST], [query]), 0)
    assert not any("states this answer" in sentence for sentence in found.sentences)


def test_hubs_lead_most_queries_and_the_way_out_is_a_command(tmp_path, low):
    queries = [chat(f"q{number}", f"Question number {number}y?", "Yes.") for number in range(6)]
    rows = [REFUND, *REST]
    turned = [[*low[7 * query :], *low[: 7 * query]] for query in range(6)]
    hub = [[9.0 if query < 3 else -9.0, *rest] for query, rest in enumerate(turned)]
    scores = write_by_hand(tmp_path / "run", hub, rows, queries, against_hubs="--option relative=loss")
    found = conclude(scores, 0)
    assert found.kind == "hubs"
    assert found.sentences[:2] == (
        "wiki-122 comes first, but is among the first 3 for 3 of 6 queries.",
        "It may lead whatever the question. Type: vestige attribute --index idx --queries q.jsonl --out run-2 "
        "--option relative=loss",
    )
    assert conclude(scores, 3).kind == "none"
    fewer = write_by_hand(tmp_path / "fewer", [hub[0], hub[1], *hub[3:]], rows, queries[1:])
    assert conclude(fewer, 0).kind == "one"


def test_the_way_out_of_hubs_replaces_what_the_command_says(tmp_path, low):
    queries = [chat(f"q{number}", f"Question number {number}y?", "Yes.") for number in range(4)]
    command = "vestige attribute --index 'my idx' --method grad-dot --overwrite --out run"
    given = {"command": command, "against_hubs": "--method grad-cos"}
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, *low]] * 4, [REFUND, *REST], queries, **given), 0)
    assert found.sentences[1].endswith("Type: vestige attribute --index 'my idx' --out run-2 --method grad-cos")
    plain = write_by_hand(tmp_path / "plain", [[9.0, *low]] * 4, [REFUND, *REST], queries)
    assert conclude(plain, 0).sentences[1] == "It may lead whatever the question."


def test_with_few_queries_hubs_are_not_known(tmp_path, low):
    queries = [chat(f"q{number}", f"Question number {number}y?", "Yes.") for number in range(3)]
    assert conclude(write_by_hand(tmp_path / "run", [[9.0, *low]] * 3, [REFUND, *REST], queries), 0).kind == "one"


def test_scores_without_a_causal_sign_claim_no_influence(tmp_path, low):
    yes, no = (chat(name, "Is it open?", answer) for name, answer in (("yes", "Yes."), ("no", "No.")))
    scores = write_by_hand(tmp_path / "run", [[9.0, -9.0, *low]], [yes, no, *REST], [QUERY], meaning=ALIKE)
    found = conclude(scores, 0)
    assert found.kind == "one"
    assert found.conflicts == ()
    assert found.sentences[-1] == "No causal reading: higher = more alike."
    assert not any("pulls" in sentence for sentence in found.sentences)


@pytest.mark.parametrize(
    ("values", "headline", "lead"),
    [
        ([0.0] * 12, "No row scores above zero.", None),
        ([-1.0, -2.0, *[-3.0] * 10], "No row scores above zero.", None),
        ([5.0, 5.0, *[0.0] * 30], "Two rows stand out, alone with scores above zero: rest-0 and rest-1.", 1.0),
        ([5.0] * 12, "No row stands out: the first, rest-0, is 1.0 times the next.", 1.0),
        ([5.0, *[0.0] * 30], "One row stands out, alone with a score above zero: rest-0.", None),
        ([1.0, *[0.9] * 11], "No row stands out: the first, rest-0, is 1.1 times the next.", 1 / 0.9),
        ([1.0], "The run lists one row, so there is nothing to compare it with: rest-0.", None),
    ],
    ids=["all zero", "negative best", "two alone", "all tied", "one alone", "close", "one row"],
)
def test_odd_scores(values, headline, lead, tmp_path):
    query = chat("q", "Which?", "Fact.")
    found = conclude(write_by_hand(tmp_path / "run", [values], REST[: len(values)], [query]), 0)
    assert found.sentences[0] == headline
    assert found.lead == (None if lead is None else pytest.approx(lead))


def test_a_list_of_copies_alone_has_nothing_to_compare(tmp_path):
    rows = [chat(f"copy-{number}", "Is shipping free?", "Above 80 euros.") for number in range(12)]
    found = conclude(write_by_hand(tmp_path / "run", [[3.0] * 12], rows, [QUERY], k=2), 0)
    assert (found.kind, found.lead) == ("none", None)
    assert "copy-0 (the same text: copy-1)" in found.sentences[0]


def test_a_run_without_texts_names_rows_alone(tmp_path, low):
    rows = [Example(f"row-{number}", 0, text="") for number in range(len(low) + 1)]
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, *low]], rows, [Example("q", 0, text="")]), 0)
    assert found.rows[0] == "row-0"
    assert not any("says" in sentence for sentence in found.sentences)


def test_control_characters_stay_in_one_line_and_unescaped(tmp_path, low):
    row = chat("wi\tki", "Which?", "Red\n\x1b[31mtext\n" + "word " * 100)
    found = conclude(write_by_hand(tmp_path / "run", [[9.0, *low]], [row, *REST], [QUERY]), 0)
    assert found.sentences[1].startswith("It says: Red \x1b[31mtext word")
    assert all("\n" not in sentence and len(sentence) < 200 for sentence in found.sentences)
    assert found.sentences[1].endswith("…")


def test_relative_strength_is_percent_of_the_first(tmp_path):
    assert [relative_strength(score, 4.0) for score in (4.0, 1.0, -6.0)] == [100.0, 25.0, -150.0]
    assert relative_strength(-1.0, -1.0) is None
    scores = write_by_hand(tmp_path / "run", [[4.0, 1.0, -6.0]], REST[:3], [QUERY])
    assert [row.strength for row in scores.top(0, 3)] == [100.0, 25.0, -150.0]
    assert [row.strength for row in scores.bottom(0, 1)] == [-150.0]
    none = write_by_hand(tmp_path / "none", [[-4.0, -5.0]], REST[:2], [QUERY])
    assert [row.strength for row in none.top(0, 2)] == [None, None]


def test_of_scored_sources_only_names_are_known(tmp_path):
    sources = [Example(f"source-{number}", 0, text="12 examples. First: one text.") for number in range(42)]
    data = tokens_of([chat(f"row-{number}", "Which?", "That.") for number in range(100)])
    scores = write_by_hand(tmp_path / "run", [[9.0, *[0.1] * 40, -9.0]], sources, [QUERY], data=data)
    found = conclude(scores, 0)
    assert (found.kind, found.rows, found.conflicts) == ("one", ("source-0",), ())
    assert found.sentences == (
        "One source stands out, 90 times the next: source-0.",
        "The source that pulls the other way most is source-41.",
    )


def test_runs_of_earlier_versions_are_concluded_alike(tmp_path, low):
    scores = write_by_hand(tmp_path / "run", [[10.0, -12.0, *low]], [REFUND, TENTS, *REST], [QUERY])
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["against_hubs"]
    for groups in record["groups"].values():
        for group in groups:
            del group["positive"], group["positive_squares"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert conclude(Scores.open(tmp_path / "run"), 0) == conclude(scores, 0)
