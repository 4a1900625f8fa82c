"""What the terminal shows of a run, and in which order: answers, ranking, then the rest."""

from tests.workshop import write_rows

SYSTEM = "You are\nshort."


def test_answers_are_printed_in_full_before_the_ranking_and_a_shared_system_prompt_once(workshop, vestige):
    rows = [
        {
            "id": f"chat-{number}",
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
                *([{"role": "assistant", "content": "Given\x1b[2J answer."}] if number else []),
            ],
        }
        for number, question in enumerate(["Who wrote Emma?", "Who wrote Hamlet?"])
    ]
    write_rows(workshop / "chats.jsonl", rows)
    words = (
        "attribute --model tiny-model --data train.jsonl --queries chats.jsonl --method grad-dot --no-trust --out run"
    )
    outcome = vestige(*words.split())
    assert outcome.status == 0
    answers, _, ranking = outcome.out.partition("proponents of query")
    assert answers.count("system, of all queries: You are\n    short.") == 1
    assert answers.count("You are") == 1
    assert "chat-0, answered by the model\n  user: Who wrote Emma?\n  assistant: " in answers
    assert "chat-1\n  user: Who wrote Hamlet?\n  assistant: Given\\x1b[2J answer.\n" in answers
    assert ranking
    assert outcome.out.endswith("See it with: vestige report run\n")
    assert "\x1b" not in outcome.out


def test_status_names_what_a_run_lacks(workshop, vestige):
    words = "attribute --model tiny-model --data train.jsonl --queries questions.jsonl --method grad-dot --out run"
    assert vestige(*words.split()).status == 0
    assert "missing" not in vestige("status", "run").out
    record = workshop / "run" / "run.json"
    record.write_text(record.read_text().replace('"missing": []', '"missing": ["checks"]'))
    out = vestige("status", "run").out
    assert f"Not there yet: trust checks. The same command adds what is missing: vestige {words.split()[0]} " in out
    again = vestige(*words.split())
    assert again.status == 0
    assert "[" in again.out
    assert vestige(*words.split()).status == 2
