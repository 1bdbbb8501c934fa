"""Edits of JSON texts: the value changes, every other character stays."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from simpletuner.config.json_reader import parse_json
from simpletuner.config.json_writer import json_text, remove_value, set_value

COMMENTED = """{
    // how fast
    "--learning_rate": "4e-5",  // higher burns
    "steps": 10, "other": [1, 2],
    /* the end */
    "last": {"a": 1}  // really
    // nothing follows
}
"""


def test_only_the_value_itself_is_replaced():
    assert set_value(COMMENTED, ("--learning_rate",), 1e-4) == COMMENTED.replace('"4e-5"', "1e-4")
    assert set_value(COMMENTED, ("other", 1), "two") == COMMENTED.replace("[1, 2]", '[1, "two"]')
    assert set_value(COMMENTED, ("last", "a"), None) == COMMENTED.replace('"a": 1', '"a": null')


def test_a_new_member_stands_last_and_remarks_stay_with_their_lines():
    assert set_value(COMMENTED, ("new",), True) == COMMENTED.replace(
        '{"a": 1}  // really\n', '{"a": 1},  // really\n    "new": true\n'
    )
    assert set_value(COMMENTED, ("last", "b"), 2) == COMMENTED.replace('{"a": 1}', '{"a": 1, "b": 2}')
    assert set_value(COMMENTED, ("other", 2), 3) == COMMENTED.replace("[1, 2]", "[1, 2, 3]")
    assert set_value("{}\n", ("a",), 1) == '{\n    "a": 1\n}\n'
    assert set_value("[\n]", (0,), {"id": "x"}) == '[\n    {\n        "id": "x"\n    }\n]'


def test_a_member_goes_with_its_line_and_its_comma():
    without_rate = COMMENTED.replace('    "--learning_rate": "4e-5",  // higher burns\n', "")
    assert remove_value(COMMENTED, ("--learning_rate",)) == without_rate
    without_last = COMMENTED.replace('    "last": {"a": 1}  // really\n', "").replace("[1, 2],", "[1, 2]")
    assert remove_value(COMMENTED, ("last",)) == without_last
    assert json.loads(remove_value('{"a": 1, "b": 2}', ("a",))) == {"b": 2}
    assert json.loads(remove_value('{"a": 1, "b": 2}', ("b",))) == {"a": 1}
    assert remove_value('{\n    "a": 1\n}', ("a",)) == "{\n}"


def test_numbers_are_written_as_people_write_them():
    assert [json_text(value) for value in (1e-4, 4e-5, 0.01, 2.0, 1.5, 0.000123456789)] == [
        *("1e-4", "4e-5", "0.01", "2", "1.5", "0.000123456789")
    ]


@pytest.mark.parametrize("seed", range(5))
def test_any_series_of_edits_gives_what_the_same_edits_give_on_the_value(seed: int):
    rng = random.Random(seed)
    text = (Path(__file__).parents[3] / "config/config.json.example").read_text() if seed % 2 else COMMENTED
    value = parse_json(text, "").value
    for number in range(60):
        key = rng.choice([*value, f"new{number}"])
        if key in value and rng.random() < 0.4:
            text, _ = remove_value(text, (key,)), value.pop(key)
            continue
        value[key] = rng.choice([True, None, 3, 2.5e-6, "a // b", ["x"], {"deep": [1, {"y": "}"}]}, [{"z": 1}], {}, []])
        text = set_value(text, (key,), value[key])
        assert parse_json(text, "").value == value


WINDOWS = '{\r\n  // mine\r\n  "a": 1, // one\r\n  "b": 2\r\n}\r\n'


def test_line_ends_of_windows_stay():
    assert set_value(WINDOWS, ("c",), 3) == WINDOWS.replace("2\r\n", '2,\r\n  "c": 3\r\n')
    assert remove_value(WINDOWS, ("b",)) == '{\r\n  // mine\r\n  "a": 1 // one\r\n}\r\n'
    assert remove_value(WINDOWS, ("a",)) == '{\r\n  // mine\r\n  "b": 2\r\n}\r\n'
    mixed = '{\r\n  "a": 1,\n  "b": 2\n}\n'
    assert set_value(mixed, ("b",), 3) == mixed.replace("2", "3")


def test_what_is_put_in_is_indented_as_the_file_is():
    two = '{\n  "a": {\n    "b": 1\n  }\n}\n'
    assert set_value(two, ("a", "c"), {"d": 1}) == (
        '{\n  "a": {\n    "b": 1,\n    "c": {\n      "d": 1\n    }\n  }\n}\n'
    )
    assert set_value(two, ("a",), {"d": {"e": 1}}) == '{\n  "a": {\n    "d": {\n      "e": 1\n    }\n  }\n}\n'
    assert set_value(two, ("a", "b"), {}) == '{\n  "a": {\n    "b": {}\n  }\n}\n'
    tabs = '{\n\t"a": 1\n}\n'
    assert set_value(tabs, ("b",), {"c": [{"d": 1}]}) == (
        '{\n\t"a": 1,\n\t"b": {\n\t\t"c": [\n\t\t\t{\n\t\t\t\t"d": 1\n\t\t\t}\n\t\t]\n\t}\n}\n'
    )
