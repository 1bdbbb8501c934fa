"""The JSON reader agrees with the standard library on JSON, and says where anything else goes wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from simpletuner.config.json_reader import parse_json, read_json_file
from simpletuner.errors import ConfigError


def random_value(draw: random.Random, depth: int = 0) -> object:
    kinds = ["number", "real", "text", "word"] + (["object", "list"] * 2 if depth < 4 else [])
    kind = draw.choice(kinds)
    if kind == "object":
        return {random_text(draw): random_value(draw, depth + 1) for _ in range(draw.randrange(4))}
    if kind == "list":
        return [random_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind == "number":
        return draw.randrange(-(10**20), 10**20)
    if kind == "real":
        return draw.uniform(-1e10, 1e10) * 10 ** draw.randrange(-20, 20)
    return random_text(draw) if kind == "text" else draw.choice([True, False, None])


def random_text(draw: random.Random) -> str:
    return "".join(draw.choice('ab"\\/\n\t\x01é😀\u2028 ') for _ in range(draw.randrange(6)))


@pytest.mark.parametrize("seed", range(20))
def test_reads_what_the_standard_library_writes(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(20):
        value = random_value(draw)
        text = json.dumps(value, indent=draw.choice([None, 2]), ensure_ascii=draw.random() < 0.5)
        assert parse_json(text, "x").value == json.loads(text)


def test_every_value_has_its_line() -> None:
    document = parse_json('{\n"a": 1,\n"b": [\n  2,\n  {"c": 3}\n]}', "x")
    assert [document.line("a"), document.line("b"), document.line("b", 0), document.line("b", 1, "c")] == [2, 3, 4, 5]
    assert document.line("b", 1, "missing") == 5


def test_comments_are_blank() -> None:
    text = '// first\n{ /* two\nlines */ "a": "// no comment", // after\n "b": 2 }\n// end'
    assert parse_json(text, "x").value == {"a": "// no comment", "b": 2}


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ('{\n "a": 1,\n}', 2, 8, "comma"),
        ("[1,\n2,\n]", 2, 2, "comma"),
        ('{"a": 1,\n "b": 2,\n "a": 3}', 3, 2, "given twice, first in line 1"),
        ("", 1, 1, "empty"),
        ("   \n\n", 3, 1, "empty"),
        ("{'a': 1}", 1, 2, "single quotes"),
        ("{\"a\": 'b'}", 1, 7, "single quotes"),
        ('{"a" 1}', 1, 6, '":"'),
        ('{"a": 1 "b": 2}', 1, 9, '","'),
        (r'["\ud800"]', 1, 9, "surrogate"),
        (r'["\udfff"]', 1, 9, "surrogate"),
        ('{"a": tru}', 1, 7, "value"),  # codespell:ignore
        ('{"a": NaN}', 1, 7, "value"),
        ('{"a": 01}', 1, 7, "begins with 0"),
        ('{"a": "b}', 1, 7, "closing quote"),
        ('{"a": "b\nc"}', 1, 7, "closing quote"),
        ('{"a": "C:\\data"}', 1, 10, "escape"),
        ('{"a": 1} x', 1, 10, "after the end"),
        ('{"a": 1', 1, 8, "end of the file"),
        ("{a: 1}", 1, 2, "double quotes"),
        ("{ /* open", 1, 3, "not closed"),
        ("[" * 200, 1, 102, "nesting"),
    ],
)
def test_faults_are_placed(text: str, line: int, column: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "file.json")
    problem = caught.value.problems[0]
    assert problem.file == "file.json"
    assert problem.line == line
    assert f"(line {line}, column {column})" in problem.message
    assert words in problem.message


def test_a_byte_order_mark_and_other_encodings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    with pytest.raises(ConfigError, match="byte order mark"):
        read_json_file(path)
    path.write_bytes(b'{"a":\n "caf\xe9"}')
    with pytest.raises(ConfigError, match=":2: is not UTF-8"):
        read_json_file(path)
    path.write_bytes('{"a": "é"}'.encode("utf-16"))
    assert read_json_file(path).value == {"a": "é"}
    with pytest.raises(ConfigError, match="cannot be read"):
        read_json_file(tmp_path)


def test_a_missing_comma_belongs_at_the_end_of_the_line_before() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json('{\n"a": 1\n"b": 2}', "file.json")
    (problem,) = caught.value.problems
    assert (problem.line, problem.fix) == (3, "put a comma at the end of line 2")
