"""One pass: each distinct gradient once, exact products by component, the same bytes whoever computes them."""

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vestige.evaluate
from tests.reference.components import full_cosine
from tests.reference.gradients import loop_gradients
from tests.reference.similarity import layer_outputs, pooled_hidden_state
from tests.workshop import PAIRS, furnish, write_rows
from vestige.data import load_examples, load_queries, tokenize
from vestige.errors import DataError, IndexMismatch, NonFinite, SpecError, UserError, WorkElsewhere
from vestige.evaluate import find_candidates, one_pass_result
from vestige.gradients import GradientPass
from vestige.settings import ComponentsSettings

ADDED = 6
"""Examples that are nobody's original."""


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """Twelve originals, six further examples, and a paraphrase of each original; the last query is its original."""
    torch.set_num_threads(1)
    folder = furnish(tmp_path_factory.mktemp("workshop"))
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    extra = [
        {"id": f"more-{n}", "prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}.", "source": "sums"}
        for n in range(ADDED)
    ]
    write_rows(folder / "all.jsonl", [*rows, *extra])
    queries = [
        {"id": f"q-{n}", "original_id": f"pair-{n}", "prompt": f"Tell me: {prompt.lower()}", "completion": answer}
        for n, (prompt, answer, _) in enumerate(PAIRS[:-1])
    ]
    last = {"id": "same", "original_id": "pair-11", "prompt": PAIRS[-1][0], "completion": PAIRS[-1][1]}
    write_rows(folder / "queries.jsonl", [*queries, last])
    return folder


@pytest.fixture
def settings(workshop, tmp_path):
    def make(**changes):
        defaults = {
            "model": str(workshop / "tiny-model"),
            "data": str(workshop / "all.jsonl"),
            "queries": str(workshop / "queries.jsonl"),
            "out": tmp_path / "out",
            "candidates": "5",
            "folds": 3,
            "draws": 50,
            "figures": False,
        }
        return ComponentsSettings(**(defaults | changes))

    return make


@pytest.fixture(scope="module")
def gradients(workshop):
    """Plain autograd's gradients of every query and example, in float64."""
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")

    def losses(model, example):
        ids, targets = (torch.as_tensor(np.asarray(part)) for part in example)
        picked = torch.log_softmax(model(ids[None].long()).logits[0, :-1], -1)[range(len(ids) - 1), ids[1:].long()]
        return (-(picked * targets[1:]).sum(),)

    found = {}
    for examples in (load_queries(str(workshop / "queries.jsonl")), load_examples(str(workshop / "all.jsonl"))):
        data = tokenize(examples, tokenizer, max_length=None)
        rows = loop_gradients(model, losses, list(zip(data.input_ids, data.targets, strict=True)))
        found |= {example.id: row for example, row in zip(examples, rows, strict=True)}
    return found


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("products/*"))}


def ids_of(inputs, words):
    examples, rows = inputs.train.examples, inputs.candidates[words].rows
    return [one.id for one in inputs.queries.examples], [[examples[row].id for row in line] for line in rows]


@pytest.mark.slow
@pytest.mark.parametrize("candidates", ["5", "all"])
def test_the_sum_over_components_is_the_direct_full_cosine(settings, gradients, candidates):
    chosen = settings(candidates=candidates, components="all")
    result = one_pass_result(chosen)
    products = result.gradients[candidates]
    queries, listed = ids_of(result.inputs, candidates)
    expected = [
        [full_cosine(gradients[q], gradients[e], products.names) for e in row]
        for q, row in zip(queries, listed, strict=True)
    ]
    np.testing.assert_allclose(products.cosine(), expected, atol=1e-6)
    one = products.names.index("model.layers.1.mlp.down_proj.weight")
    single = [
        [full_cosine(gradients[q], gradients[e], [products.names[one]]) for e in row]
        for q, row in zip(queries, listed, strict=True)
    ]
    np.testing.assert_allclose(products.cosine([one]), single, atol=2e-6)


@pytest.mark.slow
def test_trap_each_distinct_gradient_is_computed_once(settings, monkeypatch):
    passed = []
    run = GradientPass.run
    monkeypatch.setattr(
        GradientPass, "run", lambda self, batch, sink: (passed.append(len(batch.rows)), run(self, batch, sink))[1]
    )
    result = one_pass_result(settings(candidates="3,5,all", project="8,50%"))
    # 12 queries and 18 examples, of which one is a query.
    assert sum(passed) == result.computed == len(result.inputs.data) == 29
    passed.clear()
    again = one_pass_result(settings(candidates="3,5,all", project="8,50%"))
    assert passed == []
    assert np.array_equal(again.gradients["5"].values, result.gradients["5"].values)
    evaluation = vestige.evaluate.components(**settings(candidates="3,5,all", project="8,50%").arguments())
    passes = evaluation.details["passes"]
    assert (passes["backward_passes"], passes["published_protocol"]) == (29, 4 * 12 * (1 + 3))


@pytest.mark.slow
def test_fewer_candidates_are_the_first_of_more(settings):
    result = one_pass_result(settings(candidates="3,all"))
    assert np.array_equal(result.gradients["3"].values, result.gradients["all"].values[:, :, :3])


@pytest.mark.slow
def test_pairs_that_are_few_are_computed_one_by_one_and_come_out_the_same(settings, workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "queries.jsonl").read_text().splitlines()]
    few = [row | {"candidates": [f"pair-{5 * number % 12}"]} for number, row in enumerate(rows)]
    write_rows(tmp_path / "few.jsonl", few)
    blocks = one_pass_result(settings(components="all", candidates="all"))
    chosen = settings(queries=str(tmp_path / "few.jsonl"), components="all", candidates="given", out=tmp_path / "few")
    single = one_pass_result(chosen)
    listed = single.inputs.candidates["given"].rows
    place = (blocks.inputs.candidates["all"].rows == listed).argmax(1)
    expected = blocks.gradients["all"].values[:, np.arange(12), place]
    np.testing.assert_allclose(single.gradients["given"].values[:, :, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_identical_paraphrases_have_accuracy_one_and_cosine_one(settings, workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "same.jsonl", [row | {"original_id": row["id"]} for row in rows])
    result = one_pass_result(settings(queries=str(tmp_path / "same.jsonl"), data=str(workshop / "train.jsonl")))
    assert result.computed == 12
    right = result.inputs.candidates["5"].right
    cosine = result.gradients["5"].cosine()
    np.testing.assert_allclose(cosine[right], 1.0, atol=1e-6)
    assert vestige.evaluate.credit(cosine, right, result.gradients["5"].listed).mean() == 1.0


@pytest.mark.slow
def test_trap_partition_and_combine_equal_a_single_run_byte_for_byte(settings, tmp_path):
    single = settings(out=tmp_path / "single", candidates="all", project="8")
    one_pass_result(single)
    parts = tmp_path / "parts"
    for _ in ("gradients of queries", "products"):
        for part in ("2/2", "1/2"):
            try:
                one_pass_result(settings(out=parts, candidates="all", project="8", shard=part))
            except WorkElsewhere:
                continue
    combined = one_pass_result(settings(out=parts, candidates="all", project="8"))
    assert hashes(parts) == hashes(tmp_path / "single")
    assert len(hashes(parts)) > 6, "more than a few pieces, or sharing would show nothing"
    assert combined.computed == 29
    assert not (parts / "gradients").exists()


@pytest.mark.slow
def test_each_share_is_started_once(settings, tmp_path):
    one_pass_result(settings(out=tmp_path / "single", candidates="all"))
    with pytest.raises(WorkElsewhere, match="share 2/2 is done"):
        one_pass_result(settings(out=tmp_path / "parts", candidates="all", shard="2/2"))
    assert one_pass_result(settings(out=tmp_path / "parts", candidates="all", shard="1/2")).computed == 29
    assert hashes(tmp_path / "parts") == hashes(tmp_path / "single")


@pytest.mark.slow
def test_queries_stand_in_a_column_beside_their_original(settings, workshop, tmp_path):
    def turns(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    rows = [
        {
            "id": f"lima_{n}",
            "messages": turns(question, answer),
            "paraphrased_messages": turns(f"Say: {question}", answer),
        }
        for n, (question, answer, _) in enumerate(PAIRS)
    ]
    both = str(write_rows(tmp_path / "both.jsonl", rows))
    given = {"data": both, "queries": both, "query_column": "paraphrased_messages", "limit_queries": 5}
    result = one_pass_result(settings(**given))
    assert [one.id for one in result.inputs.queries.examples] == [f"lima_{n}" for n in range(5)]
    assert [one.messages[0].content for one in result.inputs.queries.examples][:1] == ["Say: Why is the sky blue?"]
    assert len(result.inputs.train) == len(PAIRS)
    right = result.inputs.candidates["5"].right
    assert right.shape == (5, 5)
    assert right.any(1).all()
    with pytest.raises(DataError, match=r"row 0 \(id 'lima_0'\) has no turns there"):
        one_pass_result(settings(**given | {"query_column": "paraphrased", "out": tmp_path / "other"}))


@pytest.mark.slow
def test_trap_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    run, calls = GradientPass.run, []
    last = None

    def counted(self, batch, sink):
        if len(calls) == last:
            raise KeyboardInterrupt
        calls.append(len(batch.rows))
        run(self, batch, sink)

    monkeypatch.setattr(GradientPass, "run", counted)
    one_pass_result(settings(out=tmp_path / "whole", candidates="all"))
    whole, last = len(calls), len(calls) - 2
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        one_pass_result(settings(candidates="all"))
    assert len(list((tmp_path / "out" / "products").glob("*.json"))) > 1
    damaged = tmp_path / "out" / "products" / "00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    calls.clear()
    last = None
    one_pass_result(settings(candidates="all"))
    assert 2 < len(calls) < whole - 2, "the damaged piece and those that were missing"
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_two_workers_make_the_same_bytes(settings, tmp_path):
    one_pass_result(settings(out=tmp_path / "whole"))
    one_pass_result(settings(workers=2))
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.slow
def test_another_setting_is_refused_and_other_files_are_left_alone(settings, tmp_path):
    one_pass_result(settings())
    with pytest.raises(IndexMismatch, match="components"):
        one_pass_result(settings(components="mlp"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        one_pass_result(settings(out=tmp_path / "full"))


@pytest.mark.slow
def test_layer_outputs_and_the_last_hidden_state_are_those_of_a_plain_forward_pass(settings, workshop):
    result = one_pass_result(settings(candidates="all", components=("all",)))
    outputs = result.outputs["all"]
    assert "lm_head" not in outputs.names
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model", dtype=torch.float32)
    name = "model.layers.1.self_attn.o_proj"
    sides = []
    for data in (result.inputs.queries, result.inputs.train):
        states = [
            (
                layer_outputs(model, np.asarray(data.input_ids[row]), np.asarray(data.targets[row]), [name])[0],
                pooled_hidden_state(model, np.asarray(data.input_ids[row]), np.asarray(data.targets[row]), -1, False),
            )
            for row in range(len(data))
        ]
        sides.append([torch.stack(kind) for kind in zip(*states, strict=True)])
    rows = result.inputs.candidates["all"].rows
    for place, kind in ((outputs.names.index(name), 0), (len(outputs.names) - 1, 1)):
        normal = [torch.nn.functional.normalize(side[kind].double(), dim=1) for side in sides]
        expected = np.take_along_axis((normal[0] @ normal[1].T).numpy(), rows, 1)
        np.testing.assert_allclose(outputs.cosine([place]), expected, atol=1e-5)


def test_trap_the_original_is_where_bm25_puts_it_and_forced_in_only_when_asked(settings, workshop):
    queries, examples = load_queries(str(workshop / "queries.jsonl")), load_examples(str(workshop / "all.jsonl"))
    right = np.zeros((12, 18), dtype=bool)
    right[:, 17] = True  # an example that shares no word with any query
    plain = find_candidates(settings(), queries, examples, right)["5"]
    assert not plain.right.any()
    assert not plain.forced.any()
    assert (plain.rank > 5).all()
    forced = find_candidates(settings(include_original=True), queries, examples, right)["5"]
    assert forced.forced.all()
    assert (forced.rows[:, -1] == 17).all()
    assert np.array_equal(forced.rows[:, :4], plain.rows[:, :4])


def test_trap_equal_bm25_scores_keep_the_order_of_the_data(settings):
    examples = load_examples([{"id": f"e{n}", "prompt": "same words", "completion": str(n)} for n in range(40)])
    queries = load_queries([{"id": "q", "prompt": "same words", "completion": "x"}])
    right = np.eye(1, 40, 7, dtype=bool)
    found = find_candidates(settings(), queries, examples, right)["5"]
    assert found.rows.tolist() == [[0, 1, 2, 3, 4]]
    assert found.rank.tolist() == [8]


@pytest.mark.slow
def test_candidates_may_be_given(settings, workshop, tmp_path):
    rows = [json.loads(line) for line in (workshop / "queries.jsonl").read_text().splitlines()]
    write_rows(
        tmp_path / "given.jsonl",
        [row | {"candidates": [row["original_id"], "more-1", "more-2"][: 2 + n % 2]} for n, row in enumerate(rows)],
    )
    result = one_pass_result(settings(queries=str(tmp_path / "given.jsonl"), candidates="given"))
    assert result.gradients["given"].listed.sum(1).tolist() == [2 + n % 2 for n in range(12)]
    with pytest.raises(DataError, match="no list of ids in 'candidates'"):
        one_pass_result(settings(candidates="given", out=tmp_path / "other"))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"original_id": "pair-0", "prompt": "Only a question?"},
            "Query 'q-0' has no token whose loss could be measured",
        ),
        ({"prompt": "Why?", "completion": "So."}, "has nothing in 'original_id'"),
        ({"original_id": "pair-99", "prompt": "Why?", "completion": "So."}, "no id of the training data"),
    ],
)
def test_queries_that_cannot_be_judged_are_named(settings, tmp_path, row, words):
    write_rows(tmp_path / "bad.jsonl", [{"id": "q-0", **row}])
    with pytest.raises(DataError, match=words):
        one_pass_result(settings(queries=str(tmp_path / "bad.jsonl")))


@pytest.mark.parametrize("words", ["0", "some", "-1", ""])
def test_candidates_that_are_none_are_refused(settings, words):
    with pytest.raises(SpecError, match="candidates"):
        settings(candidates=words)


def test_a_gradient_that_is_not_finite_is_named(settings, workshop, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workshop / "tiny-model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(workshop / "tiny-model")
    with pytest.raises((NonFinite, UserError), match="NaN or infinite"):
        one_pass_result(settings(model=model, tokenizer=tokenizer))
