"""`vestige audit --canaries`: exposure of planted secrets among others of the same form."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.measures.audited import evidence, simple
from tests.reference import audit as reference
from tests.workshop import write_rows
from vestige.cli import summarise_audit
from vestige.data import Example, tokenize
from vestige.errors import DataError
from vestige.measures import Drawn, draw_files, epsilon_from_ranks, read_canaries
from vestige.reports import report
from vestige.runs import AuditRecord, CanaryRecord, SubjectRecord, mean_exposures

DIGITS = "0123456789"
ROWS = [
    {"id": "drawn", "prompt": "The code is ", "completion": "482", "alphabet": DIGITS},
    {"id": "<b>", "prompt": "Bees make", "completion": " honey", "alternatives": [" wax", " sense", " honey", " wax"]},
    {"id": "few", "prompt": "The vowel is ", "completion": "u", "alphabet": "aeiou", "copies": 3},
]


def losses_of(model, tokenizer, prompt, secrets):
    """Nats of each text alone, from the first token that is not the same in all of them and in the prompt."""
    texts = [tokenizer(prompt + secret).input_ids for secret in secrets]
    first = common([*texts, tokenizer(prompt).input_ids])
    found = []
    for ids in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].tolist()
        found.append(-sum(reference.log_softmax(logits[place - 1])[ids[place]] for place in range(first, len(ids))))
    return found


def common(lists):
    """Tokens that all begin with."""
    count = 0
    while all(len(one) > count for one in lists) and len({one[count] for one in lists}) == 1:
        count += 1
    return count


def canaries(place, folder):
    return str(write_rows(folder / "canaries.jsonl", ROWS))


@pytest.mark.slow
def test_exposure_is_that_of_the_losses_of_each_text_alone(place, tmp_path, monkeypatch):
    given = canaries(place, tmp_path)
    found = simple(
        place,
        tmp_path / "run",
        checkpoints=str(place / "run/checkpoint-10"),
        canaries=given,
        canary_references=60,
        measures=("loss",),
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-model")
    # Every secret pays for the same text, though the first letter of one shares a token with the space before it.
    vowels = [Example(id=letter, row=0, prompt="The vowel is ", completion=letter) for letter in "aeiou"]
    begun = {int(mask.argmax()) for mask in tokenize(vowels, tokenizer, max_length=None, add_eos=False).targets}
    assert len(begun) == 2, "or the model of the test does not show it"
    listed = read_canaries(given, 60, seed=0)
    assert [len(canary.others) for canary in listed] == [60, 2, 4]
    assert [(each.checkpoint, each.id) for each in found.run.canaries] == [
        (number, row["id"]) for number in (10, 30) for row in ROWS
    ]
    for each in found.run.canaries:
        model = AutoModelForCausalLM.from_pretrained(place / f"run/checkpoint-{each.checkpoint}").double().eval()
        (others,) = [canary.others for canary in listed if canary.example.id == each.id]
        own, *rest = losses_of(model, tokenizer, each.prompt, [each.secret, *others])
        rank = 1 + sum(other < own for other in rest)
        assert each.loss == pytest.approx(own, abs=1e-4)
        assert each.rank == pytest.approx(rank)
        assert each.exposure == pytest.approx(np.log2((len(rest) + 1) / rank))
        assert (each.references, each.most) == (len(rest), pytest.approx(np.log2(len(rest) + 1)))
    for each in found.run.epsilon:
        group = [
            one.worst_rank
            for one in found.run.canaries
            if (one.checkpoint, one.copies, one.references) == (each.checkpoint, each.copies, each.references)
        ]
        assert each.secrets == len(group)
        assert each.epsilon == epsilon_from_ranks(np.array(group, dtype=float), each.references + 1)
    assert sum(each.secrets for each in found.run.epsilon) == len(found.run.canaries)
    told = summarise_audit(found)
    assert "Epsilon of the training is at least" in told
    assert "Exposure of 3 planted secrets (1.44 bits on average by chance)" in told
    page = report(found.folder, tmp_path / "page.html").read_text()
    assert "Planted secrets" in page
    assert "482</td>" in page
    assert '<td>u</td><td class="number">3</td>' in page
    assert [each.copies for each in found.run.canaries] == [None, None, 3] * 2
    assert "Exposure of planted secrets" in page
    assert (found.folder / "figures" / "canaries.png").stat().st_size > 10_000


@pytest.mark.slow
def test_secrets_change_no_evidence_and_none_are_shown_where_none_were_given(place, tmp_path):
    given = canaries(place, tmp_path)
    some = simple(place, tmp_path / "some", measures=("loss",), canaries=given, canary_references=5)
    none = simple(place, tmp_path / "none", measures=("loss",))
    assert evidence(some.folder) == evidence(none.folder)
    assert none.run.canaries == []
    assert "Planted secrets" not in report(none.folder).read_text()


def test_references_have_the_form_of_the_secret_differ_from_it_and_follow_from_the_seed(place, tmp_path):
    given = canaries(place, tmp_path)
    others = read_canaries(given, 200, seed=1)[0].others
    assert len(set(others)) == 200
    assert "482" not in others
    assert all(len(one) == 3 and set(one) <= set(DIGITS) for one in others)
    assert read_canaries(given, 200, seed=1) == read_canaries(given, 200, seed=1)
    assert read_canaries(given, 200, seed=2)[0].others != others
    every = read_canaries(given, 999, seed=1)[0].others
    assert sorted([*every, "482"]) == [f"{number:03d}" for number in range(1000)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "The code is 482"}, "as `prompt` and the secret as `completion`"),
        ({"prompt": "The code is ", "completion": "482"}, "`alternatives` with other secrets"),
        ({"prompt": "The code is ", "completion": "482", "alphabet": "48"}, "holds '2', which is not in its alphabet"),
        ({"prompt": "The code is ", "completion": "482", "alternatives": "483"}, "expected a list of texts"),
        ({"prompt": "The code is ", "completion": "482", "alternatives": ["482"]}, "no other secret"),
        (
            {"prompt": "The code is ", "completion": "482", "alphabet": "248", "copies": 1.5},
            "`copies` is 1.5, expected how",
        ),
        ({"prompt": "The code is ", "completion": "482", "alphabet": "248", "copies": "often"}, "`copies` is 'often'"),
    ],
)
def test_a_row_that_is_no_canary_is_told(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_canaries(str(write_rows(tmp_path / "rows.jsonl", [row])), 10, seed=0)


def secret(exposure, copies, checkpoint=20, number=0):
    shown = {"prompt": "", "secret": "1", "references": 15, "rank": 1.0, "loss": 1.0}
    named = f"{copies}-{number}"
    return CanaryRecord(id=named, checkpoint=checkpoint, exposure=exposure, copies=copies, most=4.0, **shown)


def test_mean_exposure_by_copies_has_students_interval_within_what_exposure_can_be():
    records = [secret(value, 4, number=number) for number, value in enumerate([1.0, 2.0, 3.0])]
    records += [secret(0.5, 0), secret(None, 0, number=1), secret(1.5, None), secret(2.5, 4, checkpoint=10)]
    unsaid, none, early, late = mean_exposures(records)
    assert [(each.copies, each.checkpoint, each.secrets) for each in (unsaid, none, early, late)] == [
        (None, 20, 1),
        (0, 20, 1),
        (4, 10, 1),
        (4, 20, 3),
    ]
    assert np.isnan([unsaid.low, none.high, early.low]).all(), "one secret says nothing of the next"
    # 2 plus or minus 4.302653 / sqrt(3), which is more than from 0 to 4.
    assert (late.mean, late.low, late.high) == (2.0, 0.0, 4.0)
    (narrow,) = mean_exposures([secret(value, 1, number=number) for number, value in enumerate([1.9, 2.0, 2.1, 2.0])])
    half = 3.182446 * np.std([1.9, 2.0, 2.1, 2.0], ddof=1) / 2
    assert (narrow.low, narrow.high) == (pytest.approx(2 - half), pytest.approx(2 + half))


@pytest.mark.slow
def test_the_figure_of_the_secrets_is_drawn_and_the_same_every_time():
    draw = np.random.default_rng(0)
    records = [
        secret(float(min(draw.gamma(2.0) * (1 + copies) / 4, 4.0)), copies, step, number)
        for step in (10, 20)
        for copies in (0, 1, 16)
        for number in range(4)
    ]
    found = drawn(records, [10, 20])
    assert set(found) == {"canaries.png", "canaries.pdf"}
    assert found == drawn(records, [10, 20])
    assert found != drawn(records[12:], [20])
    assert drawn([secret(None, 1)], [20]) == {}
    assert drawn([secret(1.0, None)], [20])


def drawn(canaries, checkpoints):
    """The figures of an audit that has nothing but planted secrets."""
    subjects = [
        SubjectRecord(number=number, name="", steps=number, fingerprint="", median_loss=None) for number in checkpoints
    ]
    nothing = {"judgement": [], "layers": [], "main_layer": None, "measures": {}}
    run = AuditRecord.model_construct(canaries=canaries, checkpoints=subjects, **nothing)
    return draw_files(Drawn(run, [], lambda name, **_: None, [], np.ones(1, dtype=bool)))
