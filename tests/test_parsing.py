import json
from typing import NamedTuple

import pytest

from vestige.parsing import as_record, parse_finite_json, parse_json, parse_yaml


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def test_json_reads_as_the_library_reads_it():
    for text in ('{"a": [1, 2.5, null, "\\u00e9"]}', " [] ", "-3", '"[[["', nested(50)):
        assert parse_json(text) == json.loads(text) == parse_json(text.encode())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(100_000), "nested more than 50 levels"),
        (nested(51), "nested more than 50 levels"),
        ('{"a": ' * 60 + "1" + "}" * 60, "nested more than 50 levels"),
        ("9" * 5000, "a whole number of more than 4,300 digits"),
        (b'"\xff"', "not UTF-8"),
        ("{", "Expecting property name"),
    ],
)
def test_json_that_is_broken_too_deep_or_too_large_is_one_kind_of_error(text, reason):
    with pytest.raises(json.JSONDecodeError, match=reason):
        parse_json(text)


def test_many_brackets_are_not_depth():
    text = json.dumps({"text": "[" * 1000, "rows": [[1]] * 1000})
    assert parse_json(text) == json.loads(text)


@pytest.mark.parametrize("text", ["NaN", '{"a": [Infinity]}', "[1e999]"])
def test_a_number_that_is_none_is_refused_where_numbers_must_be_finite(text):
    parse_json(text)
    with pytest.raises(json.JSONDecodeError, match="NaN or infinite"):
        parse_finite_json(text)


class Point(NamedTuple):
    name: str
    values: tuple[int, ...] = ()


def test_a_record_has_the_types_that_it_announces():
    assert as_record(Point, {"name": "a", "values": [1, 2]}) == Point("a", (1, 2))
    assert as_record(Point, {"name": "a"}) == Point("a")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "name: "),
        ({"name": 5}, "name: Input should be a valid string"),
        ({"name": "\ud800"}, "Invalid JSON"),
        ({"name": "a", "values": [1, "x"]}, r"values\.1: Input should be a valid integer"),
        ({"name": "a", "values": None}, "values: Input should be"),
        ({"name": "a", "more": 1}, "more: "),
    ],
)
def test_a_record_of_other_types_is_refused_with_the_first_of_them(fields, reason):
    with pytest.raises(ValueError, match=reason):
        as_record(Point, fields)


def test_yaml_is_plain_values_and_dates_stay_texts():
    text = "a: 2020-01-01\nb: [1, 2.5, yes, null]\nc: &x {d: e}\nf: {<<: *x, g: h}\n"
    assert parse_yaml(text) == {
        "a": "2020-01-01",
        "b": [1, 2.5, True, None],
        "c": {"d": "e"},
        "f": {"d": "e", "g": "h"},
    }


LAUGH = "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (nested(100_000), "50 levels"),
        ("a: &a [*a]", "50 levels"),
        ("a: &a {b: *a}", "50 levels"),
        (LAUGH, "more than 1,000,000 values"),
        ("1: 2", "the key 1 is no text"),
        ("? [a]\n: b", "constructing a mapping"),
        ("a: 1\na: 2", "`a` is there twice"),
        ("a: !!timestamp x", "does not read as what its tag names"),
        ("a: !!bool perhaps", "does not read as what its tag names"),
        ("a: !!binary aGFsbG8=", "of the type bytes"),
        ("a: !!set {b, c}", "of the type set"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: " + "9" * 5000, "does not read"),
        ("a: [", "while parsing"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_yaml_of_another_kind_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_yaml(text)
