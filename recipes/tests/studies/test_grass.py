"""The studies on a ResNet-9 and a music transformer: their modules, gradients, formulas and tables."""

import math

import numpy as np
import pytest
import torch

from studies.finished import installed, written
from vestige.errors import DataError, MissingExtra
from vestige_recipes import study
from vestige_recipes.grass.run import compress, influence, trak
from vestige_recipes.grass.tasks import MusicTransformer, digits_task, melodies_task, read_tunes

NOTES = "CDEFGABcdefgab"


def lay_out(folder):
    """A package with tunes of 60 notes and more, one of them twice and one too short."""
    draw = np.random.default_rng(0)
    tunes = ["".join(draw.choice(list(NOTES), 60)) for _ in range(30)]
    for book, part in (("oneills1850", tunes[:20]), ("ryansMammoth", [*tunes[20:], tunes[0], "CDE"])):
        place = folder / "music21" / "corpus" / book
        place.mkdir(parents=True)
        text = "".join(f"X: {number}\nT: no note\nK: G\n{tune}\n\n" for number, tune in enumerate(part, 1))
        (place / "all.abc").write_text(text)
    (folder / "music21" / "__init__.py").touch()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    with installed(tmp_path_factory.mktemp("package"), lay_out) as folder:
        yield folder


@pytest.fixture(scope="module", params=["resnet", "music"])
def task(request, package):
    """A task, its tensors and weights in float64."""
    made = digits_task(20, 5, 1, 4, 0) if request.param == "resnet" else melodies_task(20, 5, 1, 8, 12, 10, 0)

    def widen(batch):
        return tuple(part.double() if part.is_floating_point() else part for part in batch)

    return made._replace(train=widen(made.train), queries=widen(made.queries), build=lambda: made.build().double())


@pytest.fixture(scope="module")
def model(task):
    return task.fit(np.arange(20), 3)


def by_autograd(model, task, batch):
    """Gradients of one example after another, all weights in the model's order."""
    rows = []
    for inputs, labels in zip(*batch, strict=True):
        (loss,) = task.losses(model, (inputs[None], labels[None]))
        found = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([part.flatten() for part in found]))
    return torch.stack(rows)


def test_gradients_are_those_of_autograd_one_example_at_a_time(model, task):
    found = compress(model, task, task.queries, "none", 0)
    torch.testing.assert_close(found.double(), by_autograd(model, task, task.queries), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_trak_of_one_model_and_influence_are_their_formulas(model, task):
    """`none` keeps everything, so that the formulas can be written down with whole matrices."""
    train, queries = (by_autograd(model, task, side) for side in (task.train, task.queries))
    found = influence("all", model, task, "gauss:4", 0)
    assert found.numbers == sum(min(4, part.numel()) for part in model.parameters())
    rows, asked = (compress(model, task, side, "gauss:4", 0).double() for side in (task.train, task.queries))
    expected, start = torch.zeros(len(queries), len(train), dtype=torch.float64), 0
    for part in model.parameters():
        columns = slice(start, start + min(4, part.numel()))
        start = columns.stop
        fisher = rows[:, columns].T @ rows[:, columns] / len(rows)
        fisher += float(fisher.diagonal().mean()) * torch.eye(len(fisher), dtype=torch.float64)
        expected += asked[:, columns] @ torch.linalg.solve(fisher, rows[:, columns].T)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    doubts = [1 - torch.exp(-task.losses(model, side)).detach() for side in (task.train, task.queries)]
    sketch = [compress(model, task, side, "sjlt:16", 0, shared=True).double() for side in (task.train, task.queries)]
    phi, asked = (part / doubt[:, None] for part, doubt in zip(sketch, doubts, strict=True))
    kernel = phi.T @ phi / len(phi)
    kernel += float(kernel.diagonal().mean()) * torch.eye(len(kernel), dtype=torch.float64)
    expected = (asked @ torch.linalg.solve(kernel, phi.T) * doubts[0]).numpy()
    scores = trak("one", [model], task, "sjlt:16", 0).scores
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@torch.no_grad()
def test_attention_has_a_term_for_every_distance_and_never_looks_ahead():
    torch.manual_seed(0)
    layer = MusicTransformer(10, 8, 1, 2, 6).double().layers[0]
    hidden = torch.randn(2, 6, 8, dtype=torch.float64)
    found = layer._attend(hidden)
    query, key, value = layer.sides(hidden).view(2, 6, 3, 2, 4).unbind(2)
    for tune in range(2):
        for place in range(6):
            heads = []
            for head in range(2):
                asked = query[tune, place, head]
                raw = [
                    float(asked @ key[tune, other, head] + asked @ layer.distance.weight[place - other]) / 2
                    for other in range(place + 1)
                ]
                weights = np.exp(raw) / sum(map(math.exp, raw))
                heads.append(sum(w * value[tune, other, head] for other, w in enumerate(weights)))
            torch.testing.assert_close(found[tune, place], layer.out(torch.cat(heads)))


def test_tunes_are_read_once_and_without_their_fields(package, monkeypatch):
    tunes = read_tunes(50)
    assert len(tunes) == 30
    assert all(len(tune) == 50 and set(tune) <= set(NOTES) for tune in tunes)
    with pytest.raises(DataError, match="30 tunes of 51 notes, and 40 are needed"):
        melodies_task(35, 5, 1, 8, 50, 10, 0)
    with pytest.raises(DataError, match="holds no tunes of 100 notes"):
        read_tunes(100)
    monkeypatch.setattr("vestige_recipes.common.texts.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="music21==9"):
        read_tunes(10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grass-resnet9", "grass-music"])
def test_the_tiny_study_leaves_its_table_and_trains_nothing_again(name, package, tmp_path):
    report = study(name, size="tiny", out=tmp_path / "out", seeds=1)
    names = [row[0] for row in report.rows]
    assert names[0] == "noise ceiling"
    assert len(names) == 1 + 2 + 6 + 2 + 1
    assert {"grad-dot", "influence, LoGra 2x2", "influence, FactGraSS 4", "TRAK, GraSS 16", "random"} <= set(names)
    members = written(tmp_path / "out", "members/*.parquet")
    again = study(name, size="tiny", out=tmp_path / "out", seeds=1)
    assert written(tmp_path / "out", "members/*.parquet") == members
    assert [row[:3] for row in again.rows[1:]] == [row[:3] for row in report.rows[1:]]
