from importlib.metadata import EntryPoint, EntryPoints

import pytest
from hypothesis import given, strategies as st

from vestige import registry
from vestige.compress import COMPRESSORS, Identity, Stream, compressor, list_compressors, parse_spec
from vestige.errors import SpecError

CANONICAL = [
    "none",
    "mask:65536",
    "mask:128x64",
    "mask:40,scale=none",
    "gauss:64",
    "rademacher:64",
    "sjlt:4096",
    "sjlt:4096,s=4",
    "sjlt:64x64",
    "logra:64x32",
    "logra:64x64,init=rademacher",
    "logra:256",
    "logra:256,init=orthonormal,min=4",
    "fjlt:1024",
    "fjlt:32x32",
    "tensorsketch:256",
    "mask:128x128 | sjlt:4096",
    "mask:65536 | sjlt:4096",
    "logra:64x64 | sjlt:256",
    "mask:32x32 | gauss:256",
]
SPELLINGS = {
    " Mask : 128 X 128|SJLT:4096 , S=1": "mask:128x128 | sjlt:4096",
    "mask:128*128": "mask:128x128",
    "none | sjlt:64": "sjlt:64",
    "none | none": "none",
    "mask:40,scale=unbiased": "mask:40",
    "gauss:64x32": "logra:64x32",
    "rademacher:64x32": "logra:64x32,init=rademacher",
    "Random-128*128": "mask:128x128",
    "RandomMask-32*32": "mask:32x32",
    "random_mask-1024": "mask:1024",
    "random_mask-16*16": "mask:16x16",
    "SJLT-4096": "sjlt:4096",
    "sjlt-4096": "sjlt:4096",
    "SJLT-64*64": "sjlt:64x64",
    "Gaussian-64*64": "logra:64x64",
    "Gaussian-64*32": "logra:64x32",
    "Gaussian-2048": "gauss:2048",
    "normal-2048": "gauss:2048",
    "normal-16*16": "logra:16x16",
    "Rademacher-2048": "rademacher:2048",
    "Rademacher-16*16": "logra:16x16,init=rademacher",
    "logra:256,min=8": "logra:256",
    "fjlt-2048": "fjlt:2048",
    "identity": "none",
    "grass-4096": "mask:16384 | sjlt:4096",
    "grass_8-4096": "mask:32768 | sjlt:4096",
    "GraSS-4096": "mask:16384 | sjlt:4096",
    "factgrass-4096": "mask:128x128 | sjlt:4096",
    "FactGraSS-256": "mask:32x32 | sjlt:256",
    "Random-128*128 | SJLT-4096": "mask:128x128 | sjlt:4096",
    "RandomMask-32768 | sjlt-4096": "mask:32768 | sjlt:4096",
    "random_mask-64*64 | normal-32*32": "mask:64x64 | logra:32x32",
    "fjlt-32*32": "fjlt:32x32",
}
MISTAKES = {
    "sjtl:256": ["Did you mean 'sjlt'", "mask", "logra", "Example"],
    "walsh:256": ["There is no compressor 'walsh'", "There are: fjlt, gauss", "sjlt"],
    "": ["empty stage", "none"],
    "mask:4 | | sjlt:2": ["empty stage"],
    "mask": ["mask:K or mask:AxB", "mask:128x128"],
    "mask:": ["mask:K or mask:AxB"],
    "mask:0": ["at least 1"],
    "mask:-4": ["at least 1"],
    "mask:4x": ["mask:K or mask:AxB"],
    "mask:4x4x4": ["mask:K or mask:AxB"],
    "mask:1e3": ["whole numbers"],
    "tensorsketch:16x16": ["tensorsketch:K", "tensorsketch:256"],
    "logra": ["logra:K or logra:AxB", "logra:64x64"],
    "logra:4x4,min=2": ["both sides are given", "logra:16,min=2"],
    "logra:256,min=0": ["whole number of at least 1"],
    "sjlt:4096 | logra:256": ["flattened gradient", "logra:256 | sjlt:4096"],
    "sjlt:256,t=3": ["no option 't'", "its options: s"],
    "gauss:256,s=3": ["no option 's'", "none"],
    "sjlt:256,s=0": ["whole number of at least 1"],
    "sjlt:256,s": ["whole number of at least 1"],
    "sjlt:4,s=8": ["s at most 4"],
    "sjlt:64x4,s=8": ["s at most 4"],
    "mask:4,scale=maybe": ["unbiased or none", "maybe"],
    "logra:4x4,init=uniform": ["gaussian or rademacher or orthonormal"],
    "none:4": ["no size", "--compress none"],
    "mask:4096 | logra:64x64": ["flattened gradient", "logra:64x64 | mask:4096"],
    "Random-4096 | Gaussian-64*64": ["flattened gradient"],
    "sjlt:4096 | tensorsketch:256": ["flattened gradient", "tensorsketch:256 | sjlt:4096"],
    "tensorsketch:256 | tensorsketch:64": ["flattened gradient"],
    "factgrass-1000": ["square", "factgrass-1024"],
}


@pytest.mark.parametrize("text", CANONICAL)
def test_canonical_specs_spell_themselves(text):
    assert parse_spec(text).canonical == text
    assert str(parse_spec(text)) == text


@pytest.mark.parametrize(("text", "canonical"), SPELLINGS.items())
def test_other_and_published_spellings(text, canonical):
    assert parse_spec(text).canonical == canonical
    assert parse_spec(text) == parse_spec(canonical)


@pytest.mark.parametrize(("text", "expected"), MISTAKES.items())
def test_mistakes_are_explained(text, expected):
    with pytest.raises(SpecError) as mistake:
        parse_spec(text)
    for part in expected:
        assert part in str(mistake.value)


numbers = st.integers(1, 10**7)
sides = st.one_of(
    st.builds("mask:{}x{}{}".format, numbers, numbers, st.sampled_from(["", ",scale=none", ",scale=unbiased"])),
    st.builds("logra:{}x{}{}".format, numbers, numbers, st.sampled_from(["", ",init=gaussian", ",init=rademacher"])),
    st.builds("Random-{}*{}".format, numbers, numbers),
    st.builds("logra:{},min={}".format, numbers, st.integers(1, 99)),
)
wholes = st.one_of(
    st.builds("{}:{}".format, st.sampled_from(["mask", "gauss", "rademacher", "sjlt", "fjlt"]), numbers),
    st.builds("sjlt:{},s={}".format, st.integers(9, 10**6), st.integers(1, 9)),
    st.builds("grass_{}-{}".format, st.integers(1, 99), numbers),
)
chains = st.builds(
    lambda first, then: " | ".join([*first, *then]), st.lists(sides, max_size=2), st.lists(wholes, max_size=2)
)


@given(chains.filter(bool))
def test_the_canonical_spelling_means_the_same(text):
    spec = parse_spec(text)
    assert parse_spec(spec.canonical) == spec
    assert parse_spec(spec.canonical).canonical == spec.canonical


@given(st.text(alphabet="mask:glotr-sj|x*=,0123456789 _", max_size=30))
def test_any_text_parses_or_is_explained(text):
    try:
        spec = parse_spec(text)
    except SpecError:
        return
    assert parse_spec(spec.canonical) == spec


@pytest.mark.slow
@given(chains.filter(bool), st.integers(1, 10**5), st.integers(1, 10**5))
def test_size_for_is_never_larger_than_the_gradient(text, rows, columns):
    spec = parse_spec(text)
    size = spec.size_for((rows, columns))
    assert 1 <= size <= rows * columns
    for stage in spec.stages:
        if not stage.on_sides:
            assert size <= stage.size[0]


def test_size_for():
    assert parse_spec("none").size_for((300, 200)) == 60000
    assert parse_spec("mask:128x64").size_for((300, 200)) == 128 * 64
    assert parse_spec("mask:128x64").size_for((300, 20)) == 128 * 20
    assert parse_spec("mask:128x64").size_for((300, 1)) == 128
    assert parse_spec("mask:128x128 | sjlt:4096").size_for((10, 10)) == 100
    assert parse_spec("logra:64").size_for((5, 20)) == 65
    assert parse_spec("mask:5x20 | logra:64 | sjlt:60").size_for((50, 200)) == 60


def test_a_registered_compressor_is_part_of_the_language():
    @compressor("every-other", forms=("K",), example="every-other:8")
    def build(in_size: int, out_size: int, stream: Stream, *, offset: int = 1) -> Identity:
        return Identity(in_size)

    try:
        assert "every-other" in list_compressors()
        assert parse_spec("mask:4x4 | every-other:8,offset=3").canonical == "mask:4x4 | every-other:8,offset=3"
    finally:
        del COMPRESSORS._added["every-other"]


def test_other_packages_announce_compressors_by_entry_point(monkeypatch, tmp_path):
    (tmp_path / "their_compressor.py").write_text(
        "from vestige.compress import compressor\n"
        "@compressor('third-party', forms=('K',), example='third-party:8')\n"
        "def build(in_size: int, out_size: int, stream): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("third-party", "their_compressor", "vestige.compressors")
    monkeypatch.setattr(registry, "entry_points", lambda: EntryPoints([point]))
    registry.forget_entry_points()
    try:
        assert "third-party" in list_compressors()
        assert parse_spec("third-party:8").canonical == "third-party:8"
    finally:
        registry.forget_entry_points()
        COMPRESSORS._added.pop("third-party", None)
