"""Trained masks: the objective, what is kept, and files that cannot be mistaken for one another."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.reference.compress_dense import gradient_from_factors
from vestige.compress import (
    MaskPart,
    MaskTraining,
    Stream,
    _mask_training as training_module,
    compress_factors,
    compress_gradient,
    parse_spec,
    train_selective_mask,
    write_masks,
)
from vestige.errors import DataError, SpecError

SHAPE = (12, 16)
STREAM = Stream(0, "layer")
QUICK = MaskTraining(penalty=5e-3, learning_rate=0.02, epochs=60, batch=16, check_every=5, stop_below=0.0)


def _gradients(examples=60, seed=0):
    """Signal in rows 0-3 and columns 0-4, noise ten times smaller in all others."""
    generator = torch.Generator().manual_seed(seed)
    gradients = 0.1 * torch.randn(examples, *SHAPE, generator=generator)
    gradients[:, :4, :5] += torch.randn(examples, 4, 5, generator=generator)
    return gradients


def test_the_mask_of_both_sides_finds_the_entries_that_matter():
    mask = train_selective_mask(_gradients(), (4, 5), STREAM, QUICK)
    assert mask.parts["left"].coordinates.tolist() == [0, 1, 2, 3]
    assert mask.parts["right"].coordinates.tolist() == [0, 1, 2, 3, 4]
    assert mask.correlation > 0.95
    assert mask.history[0] < 0.6


def test_the_mask_of_the_whole_gradient_finds_them_too():
    mask = train_selective_mask(_gradients(), (20,), STREAM, QUICK)
    rows, columns = mask.parts["whole"].coordinates // SHAPE[1], mask.parts["whole"].coordinates % SHAPE[1]
    assert int(((rows < 4) & (columns < 5)).sum()) >= 18
    assert mask.correlation > mask.history[0] + 0.3


def test_exactly_k_coordinates_in_ascending_order():
    for size in ((4, 5), (7,), (1, 1), (100, 3), (500,)):
        mask = train_selective_mask(_gradients(12), size, STREAM, MaskTraining(epochs=2))
        lengths = SHAPE if len(size) == 2 else (SHAPE[0] * SHAPE[1],)
        for part, length, kept in zip(mask.parts.values(), lengths, size, strict=True):
            assert part.size == length
            assert len(part.coordinates.unique()) == len(part.coordinates) == min(kept, length)
            assert part.coordinates.tolist() == sorted(part.coordinates.tolist())


def test_seed_and_gradients_decide():
    torch.manual_seed(0)
    one = train_selective_mask(_gradients(20), (4, 5), STREAM, MaskTraining(epochs=3, check_every=1))
    torch.manual_seed(1)
    other = train_selective_mask(_gradients(20), (4, 5), STREAM, MaskTraining(epochs=3, check_every=1))
    assert one.history == other.history
    assert torch.equal(one.parts["left"].coordinates, other.parts["left"].coordinates)


@pytest.mark.slow
def test_the_best_mask_is_kept_not_the_last():
    """A penalty that drowns the correlation wrecks the mask; published software kept what was left at the end."""
    wrecking = MaskTraining(penalty=10.0, learning_rate=0.05, epochs=40, batch=16, check_every=2, stop_below=0.0)
    for seed in range(3):
        mask = train_selective_mask(_gradients(), (4, 5), Stream(seed, "layer"), wrecking)
        assert mask.correlation == max(mask.history)
    assert mask.correlation >= mask.history[0]
    kept = [part.coordinates for part in mask.parts.values()]
    assert _rank_correlation_of(kept, Stream(2, "layer")) == pytest.approx(mask.correlation)


def _rank_correlation_of(kept, stream):
    """What the mask is worth on the unseen queries, by numpy and scipy alone."""
    from scipy.stats import spearmanr

    split = training_module._split(_gradients(), stream)
    unseen, examples = (one.double().numpy().reshape(-1, *SHAPE) for one in (split.unseen, split.examples))
    exact = np.einsum("qoi,eoi->qe", unseen, examples)
    cut = np.ix_(range(len(unseen)), *kept), np.ix_(range(len(examples)), *kept)
    masked = np.einsum("qoi,eoi->qe", unseen[cut[0]], examples[cut[1]])
    return np.mean([spearmanr(one, other).statistic for one, other in zip(exact, masked, strict=True)])


@pytest.mark.parametrize("size", [(4, 5), (30,), (12, 5)])
def test_the_objective_is_the_published_formula(size):
    split = training_module._split(_gradients(30), STREAM)
    faces = training_module._faces(SHAPE, size, STREAM, torch.device("cpu"))
    ours = training_module.objective(split.examples, split.queries, faces, 0.01).item()

    soft = [1 / (1 + np.exp(-face.logits.detach().double().numpy())) for face in faces]
    price = 0.0
    for face, mask in zip(faces, soft, strict=True):
        active = (mask > 0.5).sum()
        factor = max(0.1, active / (2 * face.kept)) if active <= 2 * face.kept else 1.0
        price += factor * mask.sum() if face.kept < face.size else 0.0
    soft = [np.ones(face.size) if face.kept == face.size else one for face, one in zip(faces, soft, strict=True)]
    mask = soft[0] if len(soft) == 1 else np.outer(*soft).flatten()
    examples, queries = split.examples.double().numpy(), split.queries.double().numpy()
    correlations = [np.corrcoef(examples @ one, (examples * mask) @ (one * mask))[0, 1] for one in queries]
    assert ours == pytest.approx(np.mean(correlations) - 0.01 * price, rel=1e-4)


def test_adam_takes_one_step_a_batch(monkeypatch):
    steps = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *rest: (steps.append(1), step(self, *rest))[1])
    train_selective_mask(_gradients(50), (4, 5), STREAM, MaskTraining(epochs=3, batch=10))
    assert len(steps) == 3 * 3  # 30 of the 50 are neither queries nor unseen


def test_training_stops_when_the_sharp_mask_falls_below():
    patient, strict = (
        train_selective_mask(_gradients(), (1, 1), STREAM, MaskTraining(1e-2, 0.02, 20, 16, 2, stop_below=stop))
        for stop in (-1.0, 0.5)
    )
    assert len(patient.history) == 11
    assert 2 < len(strict.history) < 11
    assert patient.history[: len(strict.history)] == strict.history


def test_the_mask_never_gets_smaller_than_wanted():
    face = training_module._Face("left", 6, 3, torch.tensor([-1.0, 0.5, -3.0, -0.5, -2.0, -4.0]))
    training_module._keep_enough(face)
    assert face.logits.tolist() == [2.0, 2.0, -3.0, 2.0, -2.0, -4.0]
    training_module._keep_enough(face)
    assert face.logits.tolist() == [2.0, 2.0, -3.0, 2.0, -2.0, -4.0]


def test_rows_without_variance_have_no_say():
    gradients = _gradients(30)
    gradients[::3] = 0.0
    mask = train_selective_mask(gradients, (4, 5), STREAM, MaskTraining(epochs=5, check_every=1))
    assert all(np.isfinite(mask.history))


def test_too_little_to_train_on():
    with pytest.raises(DataError, match="at least 10 examples, given 9"):
        train_selective_mask(_gradients(9), (4, 5), STREAM)
    with pytest.raises(DataError, match="zero"):
        train_selective_mask(torch.zeros(20, 3, 4), (2, 2), STREAM)


class TestFile:
    @pytest.fixture
    def file(self, tmp_path):
        """A file of masks for components `layer` (both sides), `narrow` (one side is kept whole) and `flat`."""
        path = tmp_path / "masks.safetensors"
        masks = {
            "layer": train_selective_mask(_gradients(), (4, 5), STREAM, QUICK).parts,
            "narrow": {"left": MaskPart(torch.tensor([1, 3, 5, 7]), 9, 1.5)},
            "flat": {"whole": MaskPart(torch.arange(0, 192, 10), 192, 2.0)},
        }
        write_masks(path, masks)
        return path

    def test_the_trained_coordinates_are_what_is_kept(self, file):
        compressor = parse_spec(f"selective:4x5,file={file}").build("layer", SHAPE, 0)
        gradients = _gradients(5, seed=1)
        scale = compressor.left.scale * compressor.right.scale
        torch.testing.assert_close(compress_gradient(compressor, gradients), scale * gradients[:, :4, :5].flatten(1))

    def test_the_scale_brings_inner_products_back(self, file):
        compressor = parse_spec(f"selective:4x5,file={file}").build("layer", SHAPE, 0)
        gradients = _gradients(200, seed=1)
        small = compress_gradient(compressor, gradients)
        exact, kept = gradients.flatten(1) @ gradients.flatten(1).t(), small @ small.t()
        off_diagonal = ~torch.eye(200, dtype=torch.bool)
        slope = (exact * kept)[off_diagonal].sum() / kept.square()[off_diagonal].sum()
        assert float(slope) == pytest.approx(1.0, abs=0.05)

    def test_factors_and_gradients_agree(self, file):
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.randn(3, 4, side, generator=generator).double() for side in SHAPE)
        for name, spec in (("layer", "selective:4x5"), ("flat", "selective:20"), ("layer", "selective:4x5 | sjlt:8")):
            head, *rest = spec.split(" | ")
            compressor = parse_spec(" | ".join([f"{head},file={file}", *rest])).build(name, SHAPE, 0)
            expected = compress_gradient(compressor, gradient_from_factors(left, right))
            torch.testing.assert_close(compress_factors(compressor, left, right), expected, rtol=1e-6, atol=1e-6)

    def test_a_side_that_is_kept_whole_needs_no_mask(self, file):
        compressor = parse_spec(f"selective:4x5,file={file}").build("narrow", (9, 3), 0)
        gradients = torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            compress_gradient(compressor, gradients), 1.5 * gradients[:, [1, 3, 5, 7]].flatten(1)
        )

    def test_a_missing_file_is_an_error_when_the_spec_is_read(self, tmp_path):
        with pytest.raises(SpecError, match=r"no file of masks .*absent.safetensors"):
            parse_spec(f"selective:4x5,file={tmp_path / 'absent.safetensors'}")

    def test_what_is_not_trained_yet_is_refused_where_no_index_trains_it(self):
        for spec in ("selective:4x5", "selective_mask-4*5", "selective:4x5,file=", "selective_mask-4*5 | SJLT-8"):
            with pytest.raises(SpecError, match=r"vestige index.*selective:4x5,file=masks.safetensors.*'mask'"):
                parse_spec(spec).build("layer", SHAPE, 0)

    def test_the_training_is_part_of_the_spec_and_no_part_of_the_map(self, file):
        spec = parse_spec(f"selective:4x5,file={file},learning_rate=2e-2,epochs=500,examples=40")
        assert spec.stages[0].training == MaskTraining(learning_rate=0.02, examples=40)
        assert "learning_rate=0.02" in spec.canonical
        assert "epochs" not in spec.canonical, "500 is the default"
        assert parse_spec(spec.canonical) == spec
        spec.build("layer", SHAPE, 0)
        for wrong in ("learning_rate=fast", "learning_rate=inf", "epochs=0", "epochs=1.5"):
            with pytest.raises(SpecError, match=wrong.partition("=")[0] + " must be a"):
                parse_spec(f"selective:4x5,{wrong}")

    @pytest.mark.parametrize(
        ("published", "modern"),
        [
            ("selective_mask-4*5,file={}", "selective:4x5,file={}"),
            ("SelectiveMask-20,file={}", "selective:20,file={}"),
            ("selective_grass-5,file={}", "selective:20,file={} | sjlt:5"),
            ("selective_grass_2-10,file={}", "selective:20,file={} | sjlt:10"),
            ("selective_mask-4*5,file={} | SJLT-8", "selective:4x5,file={} | sjlt:8"),
        ],
    )
    def test_published_spellings(self, file, published, modern):
        spec = parse_spec(published.format(file))
        assert spec == parse_spec(modern.format(file))
        assert parse_spec(spec.canonical) == spec

    def test_a_missing_component_is_an_error_and_never_random_coordinates(self, file):
        """Published software took random coordinates and went on with a warning."""
        spec = parse_spec(f"selective:4x5,file={file}")
        with pytest.raises(SpecError, match=r"no mask 'layers/left'.*layer/left"):
            spec.build("layers", SHAPE, 0)
        with pytest.raises(SpecError, match="no mask 'narrow/right'"):
            spec.build("narrow", (9, 16), 0)

    def test_a_mask_of_another_size_is_an_error(self, file):
        with pytest.raises(SpecError, match=r"keeps 4 of 12 coordinates.*keeps 3 of 12"):
            parse_spec(f"selective:3x5,file={file}").build("layer", SHAPE, 0)
        with pytest.raises(SpecError, match=r"keeps 4 of 12 coordinates.*keeps 4 of 20"):
            parse_spec(f"selective:4x5,file={file}").build("layer", (20, 16), 0)

    def test_the_canonical_spec_knows_the_content(self, file):
        spec = parse_spec(f"Selective:4x5, file={file}")
        assert parse_spec(spec.canonical) == spec
        assert "digest=" in spec.canonical
        assert str(file) in spec.canonical
        write_masks(
            file, {"layer": {"left": MaskPart(torch.arange(4), 12, 1.0), "right": MaskPart(torch.arange(5), 16, 1.0)}}
        )
        assert parse_spec(f"selective:4x5,file={file}") != spec
        with pytest.raises(SpecError, match="have changed"):
            spec.build("layer", SHAPE, 0)

    @pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
    def test_another_file_is_refused(self, tmp_path, content):
        path = tmp_path / "other.safetensors"
        if content is None:
            save_file({"layer/left": torch.arange(4)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(SpecError, match="not a file of trained masks"):
            parse_spec(f"selective:4x5,file={path}")

    def test_coordinates_out_of_range_are_refused(self, tmp_path):
        path = tmp_path / "masks.safetensors"
        write_masks(path, {"layer": {"left": MaskPart(torch.tensor([1, 99]), 12, 1.0)}})
        with pytest.raises(SpecError, match="ascending coordinates below 12"):
            parse_spec(f"selective:2x2,file={path}")
