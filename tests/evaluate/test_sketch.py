import json

import numpy as np
import pytest
import torch

import vestige.evaluate
from tests.workshop import furnish
from vestige.errors import CorruptFile, DataError, IndexMismatch, SpecError, UserError
from vestige.evaluate import Family
from vestige.gradients import GradientPass
from vestige.indexes import index


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    torch.set_num_threads(1)
    return furnish(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def evaluate(workshop, tmp_path):
    def run(**settings):
        defaults = {
            "model": str(workshop / "tiny-model"),
            "data": str(workshop / "train.jsonl"),
            "out": tmp_path / "out",
            "num_ref": 4,
            "sizes": (16, 64),
            "seeds": 2,
            "compress": ("tensorsketch:K", "mask:2Rx2R | sjlt:K"),
        }
        return vestige.evaluate.sketch(**(defaults | settings))

    return run


@pytest.mark.slow
def test_the_error_falls_with_the_size_and_everything_is_written(evaluate, tmp_path):
    report = evaluate(sizes=(16, 256))
    for points in report.curves.values():
        assert [point.size for point in points] == [16, 256]
        assert points[1].relative_error_percent < points[0].relative_error_percent
        assert points[1].spearman > points[0].spearman
        assert points[0].bytes_per_example == 4 * 16 * 14
    content = json.loads((tmp_path / "out" / "sketch.json").read_text())
    assert (content["num_ref_samples"], content["num_test_samples"], content["max_iters"]) == (4, 8, 12)
    curve = content["curves"][0]
    assert (curve["results_pattern"], curve["ranks"]) == ("tensorsketch:K", [16, 256])
    assert len(curve["rmse_values"]) == len(curve["relative_errors_percent"]) == 2
    for name in ("rmse", "relative", "loglog"):
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "tensorsketch:K" in str(report)


@pytest.mark.slow
def test_streaming_equals_projection_from_metadata_to_rounding(evaluate):
    report = evaluate(reference="naive_proj_layers=64")
    for points in report.curves.values():
        assert points[1].size == 64
        assert points[1].relative_error_percent < 1e-3
        assert points[0].relative_error_percent > 1


@pytest.mark.slow
def test_a_larger_rank_is_the_reference_and_no_point_of_the_figure(evaluate):
    report = evaluate(reference="rank=128")
    assert [point.size for point in report.curves["tensorsketch:K"]] == [16, 64]


@pytest.mark.slow
def test_all_parameters_as_reference_count_what_the_sketch_leaves_out(evaluate, tmp_path):
    selected = evaluate(compress="none").curves["none"][0]
    everything = evaluate(compress="none", reference="full").curves["none"][0]
    assert selected.relative_error_percent < 1e-2
    assert everything.relative_error_percent > 1
    covered = evaluate(compress="none", reference="full", components="all", out=tmp_path / "all").curves["none"][0]
    assert covered.relative_error_percent < 1e-2


@pytest.fixture
def passed(monkeypatch):
    """Examples of each pass of the model, in order."""
    batches, run = [], GradientPass.run

    def counted(self, batch, sink):
        batches.append(len(batch.rows))
        run(self, batch, sink)

    monkeypatch.setattr(GradientPass, "run", counted)
    return batches


@pytest.mark.slow
def test_a_second_call_computes_only_what_is_new(evaluate, passed):
    first = evaluate()
    passed.clear()
    assert evaluate().curves == first.curves
    assert passed == []
    more = evaluate(seeds=3)
    assert sum(passed) == 4 * 12, "one pass over all examples for the new seed of each of four specs"
    assert len(more.curves["tensorsketch:K"][0].seeds) == 3


@pytest.mark.slow
def test_a_killed_evaluation_continues_with_the_same_result(evaluate, tmp_path, passed, monkeypatch):
    whole = evaluate(out=tmp_path / "whole")
    passes = len(passed)
    passed.clear()
    counted = GradientPass.run

    def killed(self, batch, sink):
        if len(passed) == passes // 2:
            raise KeyboardInterrupt
        counted(self, batch, sink)

    monkeypatch.setattr(GradientPass, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate()
    monkeypatch.setattr(GradientPass, "run", counted)
    passed.clear()
    resumed = evaluate()
    assert 0 < len(passed) < passes, "what was finished is not computed again"
    for name, points in resumed.curves.items():
        assert [point.rmse for point in points] == [point.rmse for point in whole.curves[name]]


@pytest.mark.slow
def test_other_examples_are_not_mixed_in(evaluate):
    evaluate()
    with pytest.raises(IndexMismatch, match="references: 4 there, 5 now"):
        evaluate(num_ref=5)


@pytest.mark.slow
def test_a_damaged_file_is_named(evaluate, tmp_path):
    evaluate()
    victim = sorted((tmp_path / "out" / "products").iterdir())[0]
    victim.write_bytes(b"torn")
    with pytest.raises(CorruptFile, match=victim.name):
        evaluate()


@pytest.mark.slow
def test_a_record_that_is_no_object_is_named(evaluate, tmp_path):
    evaluate()
    victim = next(path for path in (tmp_path / "out").rglob("*.json") if path.name != "sketch.json")
    victim.write_text("[]")
    with pytest.raises(CorruptFile, match=victim.name):
        evaluate()


@pytest.mark.slow
def test_finished_indexes_are_compared_with_exact_gradients(evaluate, workshop, tmp_path):
    common = {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl")}
    for size in (16, 256):
        index(**common, out=tmp_path / f"i{size}", compress=f"tensorsketch:{size}", dtype="float32")
    folders = (str(tmp_path / "i16"), str(tmp_path / "i256"))
    report = evaluate(index=folders, compress=())
    (points,) = report.curves.values()
    assert [point.size for point in points] == [16, 256]
    assert points[1].relative_error_percent < points[0].relative_error_percent
    measured = evaluate(compress="tensorsketch:K", sizes=(16, 256), seeds=1, out=tmp_path / "fresh")
    expected = [point.rmse for point in measured.curves["tensorsketch:K"]]
    assert [point.rmse for point in points] == pytest.approx(expected, rel=1e-4)
    rebuilt = evaluate(index=folders, compress=(), reference="naive_proj_layers=256")
    assert next(iter(rebuilt.curves.values()))[1].relative_error_percent < 1e-3


@pytest.mark.slow
def test_indexes_are_compared_with_the_widest_without_the_model(evaluate, workshop, tmp_path):
    common = {"model": str(workshop / "tiny-model"), "data": str(workshop / "train.jsonl"), "dtype": "float32"}
    specs = {"small": "tensorsketch:16", "large": "tensorsketch:256", "exact": "none"}
    for name, spec in specs.items():
        index(**common, out=tmp_path / name, compress=spec)
    folders = [str(tmp_path / name) for name in specs]
    given = {"model": None, "data": None, "compress": ()}
    report = evaluate(**given, index=folders)
    assert (report.reference, report.num_ref_samples, report.num_test_samples) == (folders[2], 4, 8)
    (points,) = report.curves.values()
    exact = evaluate(index=folders[:2], compress=(), out=tmp_path / "with-model")
    (expected,) = exact.curves.values()
    assert [point.rmse for point in points] == pytest.approx([point.rmse for point in expected], rel=1e-4)
    ranked = evaluate(**given, index=folders, reference="rank=256", out=tmp_path / "ranked")
    assert ranked.reference == folders[1]
    with pytest.raises(SpecError, match="They keep 16, 256"):
        evaluate(**given, index=folders, reference="rank=64", out=tmp_path / "no")
    index(**common | {"limit": 6}, out=tmp_path / "six")
    with pytest.raises(IndexMismatch, match="other numbers of examples and examples"):
        evaluate(**given, index=[folders[0], str(tmp_path / "six")], out=tmp_path / "mixed")


@pytest.mark.slow
def test_an_index_of_other_data_is_refused(evaluate, workshop, tmp_path):
    index(model=str(workshop / "tiny-model"), data=str(workshop / "train.jsonl"), out=tmp_path / "idx", limit=6)
    with pytest.raises(IndexMismatch, match="another data"):
        evaluate(index=str(tmp_path / "idx"), compress=())


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"num_ref": 12}, DataError, "leave nothing to compare"),
        ({"reference": "fullest"}, SpecError, "naive_proj_layers=K"),
        ({"sizes": ()}, SpecError, "at least one size"),
        ({"sizes": "16,zero"}, SpecError, "sizes"),
        ({"compress": "maks:K"}, SpecError, "mask"),
        ({"compress": "tensorsketch:32", "reference": "rank=64"}, SpecError, "only of 32"),
        ({"memory": "10 apples"}, SpecError, "not a size"),
        ({"data": None}, SpecError, "go together"),
        ({"model": None, "data": None, "index": ("one",), "compress": ()}, SpecError, "Nothing to compare"),
        ({"memory": "10kB"}, UserError, "fewer `components`"),
    ],
)
def test_mistakes_are_answered(evaluate, settings, error, words):
    with pytest.raises(error, match=words):
        evaluate(**settings)


def test_a_folder_with_other_files_is_left_alone(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="other files"):
        evaluate()


@pytest.mark.slow
def test_sizes_may_be_written_with_commas(evaluate):
    assert [point.size for point in evaluate(sizes="64,16").curves["tensorsketch:K"]] == [16, 64]


def test_families_put_the_size_where_sizes_stand():
    assert Family("mask:2Rx2R | sjlt:K").at(256).canonical == "mask:32x32 | sjlt:256"
    assert Family("logra:RxR,init=rademacher").at(64).canonical == "logra:8x8,init=rademacher"
    assert Family("mask:4K | sjlt:K").at(64).canonical == "mask:256 | sjlt:64"
    assert not Family("logra:16x16").sized


@pytest.mark.slow
def test_the_default_is_every_published_compressor(evaluate):
    report = evaluate(compress=(), sizes=(16,), seeds=1)
    assert list(report.curves) == list(vestige.evaluate.PUBLISHED)
    assert np.isfinite([point.nrmse for points in report.curves.values() for point in points]).all()
