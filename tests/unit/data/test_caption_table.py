"""Captions beside images: a row says exactly what its table holds, or it is an error with its line."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.data.index import Index
from simpletuner.data.report import SkippedFiles
from simpletuner.errors import DataError
from tests.unit.data.images import write_image


def table(path: Path, content: str | bytes, columns: tuple[str, ...] | None = None) -> CaptionTable:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return CaptionTable(path, path.parent / "kept", "file_name", columns, "things", "data.json")


def jsonl(tmp_path: Path, *rows: object, name: str = "metadata.jsonl") -> CaptionTable:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    return table(tmp_path / name, "\n".join(lines))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_captions_are_read_whole(tmp_path: Path, suffix: str) -> None:
    rows = [("a.png", "a dog, on grass"), ("b", "B\u2028b"), ("a.png", "second")]
    path = tmp_path / f"metadata.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"file_name": [n for n, _ in rows], "text": [t for _, t in rows]}), path)
        made = CaptionTable(path, tmp_path, "file_name", None, "things")
    elif suffix == "csv":
        made = table(path, "file_name,text\n" + "".join(f'{name},"{text}"\n' for name, text in rows))
    else:
        made = jsonl(tmp_path, *({"file_name": name, "text": text} for name, text in rows))
    assert made.take(["a.png", "b.webp", "c.png"]) == [f"a dog, on grass{VARIANT_SEPARATOR}second", "B b", None]


def test_tables_of_windows_programs_are_read_by_their_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        made = table(tmp_path / f"{encoding}.csv", "file_name,text\r\na.png,Häuser\r\n".encode(encoding))
        assert made.take(["a.png"]) == ["Häuser"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,text\nb.png,B\na.png,a dog, on grass, at night\n", "line 3 has 4 cells for 2 columns"),
        ('file_name,text\nb.png,"B\nb"\na.png,a dog, on grass\n', "line 4 has 3 cells for 2 columns"),
        ("file_name,text,text\na.png,A,B\n", 'line 1 names the column "text" twice'),
        ('file_name,text\na.png,A\nb.png,"B\n', "line 3: unexpected end of data"),
        ("file_name,text\na.png,caf\xe9\n".encode("latin-1"), "is not UTF-8 text: line 2, byte 25 (0xe9)"),
        ("file_name,text\na.png,A\0\n", "holds a NUL character in line 2"),
        ("", "holds no rows"),
    ],
)
def test_a_csv_that_would_drop_a_part_of_a_caption_names_the_line(
    tmp_path: Path, content: str | bytes, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        table(tmp_path / "metadata.csv", content)
    assert words in str(caught.value)
    assert "data.json: things.metadata_file" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "a.png", "text": {"en": "a dog"}}, 'line 2: "text" is an object and no text'),
        ({"file_name": "a.png", "text": True}, 'line 2: "text" is a truth value and no text'),
        ({"file_name": "a.png", "text": 7}, 'line 2: "text" is a number and no text'),
        ({"file_name": "a.png", "text": ["x", ["y"]]}, 'line 2: "text" is a list and no text'),
        ({"file_name": True, "text": "A"}, 'line 2: "file_name" is a truth value and no text'),
        ('{"file_name": "a.png", "text": "smile \\ud83d"}', 'line 2: "text" holds half of a surrogate pair'),
        ('{"file_name": "\\ud83d.png", "text": "A"}', 'line 2: "file_name" holds half of a surrogate pair'),
        ('{"file_name": "a.png", "text": "a\\u0000b"}', 'line 2: "text" holds a NUL character'),
        ('{"file_name": "a.png", "text": "A", "text": "B"}', 'line 2 gives "text" twice'),
        ('{"file_name": "a.png", "text": "A"', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is"),
        ('{"file_name": "a.png", "text": ' + "9" * 5000 + "}", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
    ],
)
def test_a_value_that_is_no_text_is_an_error_with_its_line(tmp_path: Path, row: object, words: str) -> None:
    with pytest.raises(DataError) as caught:
        jsonl(tmp_path, {"file_name": "b.png", "text": "B"}, row)
    assert words in str(caught.value)


def test_not_a_number_is_no_caption_and_lists_are_variants(tmp_path: Path) -> None:
    made = jsonl(
        tmp_path,
        {"file_name": "a.png", "text": math.nan},
        {"file_name": 12, "text": ["one", None, " ", "two", "one"]},
        {"file_name": "c.png", "text": "one\x1etwo"},
        {"file_name": "d.png", "text": None},
    )
    found = made.take(["a.png", "12.png", "c.png", "d.png"])
    assert found == [None, f"one{VARIANT_SEPARATOR}two", "one two", None]


@pytest.mark.parametrize(
    ("values", "words"),
    [([b"a dog"], 'row 1: "text" is bytes and no text'), ([[["x", "y"]]], 'row 1: "text" is a list and no text')],
)
def test_columns_of_parquet_that_hold_no_text_are_refused(tmp_path: Path, values: list, words: str) -> None:
    pq.write_table(pa.table({"file_name": ["a.png"], "text": values}), tmp_path / "metadata.parquet")
    with pytest.raises(DataError) as caught:
        CaptionTable(tmp_path / "metadata.parquet", tmp_path, "file_name", None, "things")
    assert words in str(caught.value)


def test_rows_without_an_image_are_listed(tmp_path: Path) -> None:
    for number, name in enumerate(("a.png", "sub/b.png", "c.png")):
        write_image(tmp_path / "set" / name, seed=number)
    (tmp_path / "set" / "c.png").write_bytes(b"damaged")  # an image that cannot be used still has its row
    index = Index(tmp_path / "index.sqlite", LocalBackend(tmp_path / "set"))
    catalog = index.scan()
    names = ("a.png", "sub\\b", "c.png", "gone.png", "a.webp", "../a.png", "")
    made = jsonl(tmp_path, *({"file_name": name, "text": "x"} for name in names))
    for _ in range(2):  # looked for, then from what was kept
        aside = SkippedFiles()
        made.report_unused(catalog, index, aside)
        reason = "a row of metadata.jsonl without an image of its name"
        listed = ["gone.png (line 4)", "a.webp (line 5)", "../a.png (line 6)", "without a name (line 7)"]
        assert (aside.counts, aside.examples) == ({reason: 4}, {reason: listed})
        assert list(aside.files()) == [(name, reason) for name in listed]
    write_image(tmp_path / "set" / "gone.png", seed=9)
    aside = SkippedFiles()
    made.report_unused(index.scan(), index, aside)
    assert aside.counts == {reason: 3}


def test_tables_that_are_too_large_or_no_files_are_not_read(tmp_path: Path) -> None:
    for name, words in (("metadata.csv", "larger than 4096 MiB"), ("metadata.parquet", "not a Parquet file")):
        with (tmp_path / name).open("wb") as file:
            file.truncate(40 << 30)
        with pytest.raises(DataError, match=words):
            CaptionTable(tmp_path / name, tmp_path, "file_name", None, "things")
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        CaptionTable(tmp_path / "metadata.jsonl", tmp_path, "file_name", None, "things")
    with pytest.raises(DataError, match=r"line 2 has more than 10,000,000 characters"):
        table(tmp_path / "long.csv", b"file_name,text\na.png," + b"x" * 11_000_000)


def test_blank_lines_are_no_rows_and_lines_are_counted_with_them(tmp_path: Path) -> None:
    made = table(
        tmp_path / "m.jsonl", '\n{"file_name": "a.png", "text": "A"}\n  \n{"file_name": "b.png", "text": "B"}\n'
    )
    assert made.take(["a.png", "b.png"]) == ["A", "B"]
    with pytest.raises(DataError, match="line 4 is not JSON"):
        table(tmp_path / "n.jsonl", '\n{"file_name": "a.png", "text": "A"}\n\nx')
    made = table(tmp_path / "m.csv", 'file_name,text\n\na.png,A\n\nb.png,"B\nb"\n')
    assert made.take(["a.png", "b.png"]) == ["A", "B\nb"]
