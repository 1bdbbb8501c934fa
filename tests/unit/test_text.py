"""Bytes become text or an error that names the place; only line ends end lines."""

from __future__ import annotations

import io
from pathlib import Path

import jinja2
import pytest

from simpletuner.templating import cell, environment, inline, to_bytes
from simpletuner.text import (
    NotText,
    bounded_lines,
    check_encoding,
    count_text,
    decode,
    decode_lenient,
    encoding_of,
    fault_in,
    for_terminal,
    forms_of,
    has_control,
    lines_of,
    one_form,
    printable,
    read_file,
    read_json_text,
    read_tensor_header,
    without_separators,
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_marked_unicode_is_read(encoding: str, tmp_path: Path) -> None:
    text = "Häuser 猫\r\nzwei 😀"
    assert decode(text.encode(encoding)) == text
    (tmp_path / "a").write_bytes(text.encode(encoding))
    with (tmp_path / "a").open(encoding=check_encoding(tmp_path / "a"), newline="") as file:
        assert file.read() == text


@pytest.mark.parametrize(
    ("data", "words", "line"),
    [
        (b"one\r\ntwo\rth\xffree", "is not UTF-8 text: line 3, byte 12 (0xff)", 3),
        (b"one\ncut \xe7\x8c", "is not UTF-8 text: line 2, byte 9 (0xe7)", 2),
        ("a\nb".encode("utf-16-le"), "holds a NUL character in line 1", 1),
        ("dog\n猫".encode("utf-32-le"), "holds a NUL character in line 1", 1),
        (b"\xff\xfea\x00\x00\xd8b\x00", "is not UTF-16 text: line 1, byte", 1),
        (b"one\ntwo\0", "holds a NUL character in line 2", 2),
    ],
)
def test_what_is_no_text_is_an_error_with_its_place(data: bytes, words: str, line: int) -> None:
    with pytest.raises(NotText) as caught:
        decode(data)
    assert words in str(caught.value)
    assert caught.value.line == line


def test_a_large_file_is_checked_in_parts_with_the_right_place(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    head = "é,line\n" * 400_000  # 3.2 MB; letters of two bytes lie across the borders of the parts
    path.write_bytes(head.encode() + b"caf\xe9,last\n")
    with pytest.raises(NotText) as caught:
        check_encoding(path)
    assert f"line 400001, byte {len(head.encode()) + 4} (0xe9)" in str(caught.value)
    path.write_bytes(head.encode() + b"nul,\0\n")
    with pytest.raises(NotText, match="NUL character in line 400001"):
        check_encoding(path)


def test_western_text_without_unicode_is_read_as_windows_1252() -> None:
    for text in ("a dog\u2019s nose", "Häuser am See", "Größe, çà et là, naïve œuvre", "mañana…", "100 € \u2013 “so”"):
        assert decode_lenient(text.encode("cp1252")) == (text, "cp1252")
    assert decode_lenient(b"plain") == ("plain", None)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [("一只猫在草地上", "gbk"), ("犬の写真", "shift_jis"), ("собака на траве", "cp1251"), ("개 한 마리", "euc_kr")],
)
def test_other_encodings_are_not_guessed(text: str, encoding: str) -> None:
    with pytest.raises(NotText, match="is not UTF-8 text: line 1, byte "):
        decode_lenient(text.encode(encoding))


def test_only_line_ends_end_lines() -> None:
    assert lines_of("a\nb\r\nc\rd") == ["a", "b", "c", "d"]
    assert lines_of("") == []
    assert lines_of("a\n\n") == ["a", ""]
    separators = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    assert len(f"a{separators}b".splitlines()) == 9
    assert lines_of(f"a{separators}b") == [f"a{separators}b"]
    assert without_separators(f"a{separators}b") == f"a{' ' * len(separators)}b"


def test_a_line_is_measured_before_all_of_it_is_read() -> None:
    assert list(bounded_lines(io.StringIO("ab\ncde\n"), 4)) == ["ab\n", "cde\n"]

    class Endless(io.StringIO):
        taken = 0

        def readline(self, size: int | None = -1) -> str:
            self.taken += size or 0
            return "x" * (size or 0)

    endless = Endless()
    with pytest.raises(NotText, match="line 1 has more than 1,000 characters"):
        list(bounded_lines(endless, 1000))
    assert endless.taken == 1001


def test_texts_with_nul_or_half_a_character_have_a_fault() -> None:
    assert fault_in("a 😀") is None
    assert "NUL" in str(fault_in("a\0"))
    assert "surrogate" in str(fault_in("smile \ud83d"))
    assert "UTF-8" in str(fault_in("caf\udce9"))


def test_terminal_codes_are_shown_not_sent() -> None:
    assert printable("a\x1b[31m\n\udcff 😀 %s") == "a\\x1b[31m\\n\\udcff 😀 %s"


def test_a_name_has_one_form_and_every_form_in_which_systems_write_it() -> None:
    composed, decomposed, raw = "caf\xe9.png".encode(), "cafe\u0301.png".encode(), b"caf\xe9.png"
    assert [one_form(name) for name in (b"a.png", composed, decomposed, raw)] == [b"a.png", composed, composed, raw]
    assert forms_of(b"a.png") == (b"a.png",)
    assert forms_of(composed) == (composed, decomposed)
    assert forms_of(decomposed) == (decomposed, composed)
    assert forms_of(raw) == (raw,)


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1_500_000)
    assert len(read_file(tmp_path / "a", 1_500_000)) == 1_500_000
    with pytest.raises(ValueError, match=r"^is larger than 1\.5 MB$"):
        read_file(tmp_path / "a", 1_499_999)


@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a": ', "}")])
def test_a_hundred_levels_of_json_are_read_and_one_more_is_not(start: str, end: str) -> None:
    assert read_json_text(start * 99 + "[]" + end * 99)
    with pytest.raises(ValueError, match="more than 100 levels"):
        read_json_text(start * 100 + "[]" + end * 100)


def test_a_header_of_tensors_ends_within_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert read_tensor_header(path) == ({}, 10)
    for length in (0, 1, 3, 10):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        with pytest.raises(ValueError, match="the header whose length it gives"):
            read_tensor_header(path)


def test_of_two_marks_that_begin_alike_the_longer_counts() -> None:
    marks = [b"\xef\xbb\xbf", b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\xff\xfe", b"\xfe\xff", b"ab"]
    found = [encoding_of(mark + b"x") for mark in marks]
    assert found == ["utf-8-sig", "utf-32", "utf-32", "utf-16", "utf-16", "utf-8"]


def test_the_place_in_a_file_with_a_mark_is_counted_from_its_first_byte(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfa\nb\xff"
    with pytest.raises(NotText, match=r"^is not UTF-8 text: line 2, byte 7 \(0xff\)$"):
        decode(data)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(NotText, match=r"^is not UTF-8 text: line 2, byte 7 \(0xff\)$"):
        check_encoding(tmp_path / "a")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"caf\xe9\xe8\xea s", "caf\xe9\xe8\xea s"),  # three accents in a row, three of seven letters
        (b"caf\xe9\xe8\xea\xeb several", None),  # four
        (b"a\xe9 b\xe8", "a\xe9 b\xe8"),  # half of the letters
        (b"a\xe9 \xe8", None),  # two thirds
        (b"caf\xe9\0", None),
        (b"caf\xe9 \x81", None),  # no character of Windows-1252
    ],
)
def test_bytes_are_read_as_western_where_accents_stand_between_other_letters(data: bytes, text: str | None) -> None:
    if text is not None:
        assert decode_lenient(data) == (text, "cp1252")
        return
    with pytest.raises(NotText, match=r"^is not UTF-8 text: line 1, byte "):
        decode_lenient(data)


def test_what_moves_a_cursor_or_turns_the_writing_is_an_escape_and_lines_and_tabs_stay() -> None:
    assert for_terminal("a\tb\nc\x1b[1m\x07\u202e\u2066\x85\udce9 \xe9") == (
        "a\tb\nc\\x1b[1m\\x07\\u202e\\u2066\\x85\\udce9 \xe9"
    )
    assert [has_control(name) for name in ("a b", "a\n", "a\t", "a\x7f", "a\u2028", "a\xa0")] == [
        *(False, True, True, True, True, False)
    ]


def test_things_are_counted_in_words() -> None:
    found = [
        count_text(1, "file"),
        count_text(0, "file"),
        count_text(1234, "entry", "entries"),
        count_text(1, "a", "b"),
    ]
    assert found == ["1 file", "0 files", "1,234 entries", "1 a"]


def test_what_a_user_wrote_breaks_no_page() -> None:
    assert inline("a `b`\n <c>  d") == "a 'b' &lt;c> d"
    assert [cell(value) for value in (True, 0.0001, 1e-7, 3, "a|b", None)] == [
        *("true", "0.0001", "1e-07", "3", "a\\|b", "None")
    ]
    assert to_bytes("caf\xe9 \udce9") == b"caf\xc3\xa9 \\udce9"
    page = environment().from_string("{{ a }}\n{% if b %}\n  {{ b }}\n{% endif %}\n")
    assert page.render(a="<x>", b=1) == "&lt;x&gt;\n  1\n"
    with pytest.raises(jinja2.UndefinedError):
        page.render(b=1)
    assert [environment().autoescape(name) for name in ("a.html", "a.svg", "a.md")] == [True, True, False]
