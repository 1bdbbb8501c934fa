"""How file names, text files and instance prompts become captions, in every encoding that is accepted."""

from __future__ import annotations

import os

from simpletuner.data.caption_edits import CaptionEdits
from simpletuner.data.captions import CaptionRules, caption_variants, captions_of, decode_caption, name_note


def test_a_file_name_becomes_a_caption() -> None:
    rules = CaptionRules("filename")
    assert captions_of("red things/a_red__square_01.final.png", None, rules) == ("a red square 01.final",)
    assert captions_of("___.png", None, rules) == ()


def test_a_name_that_is_not_utf_8_keeps_its_letters_and_is_noted() -> None:
    name = "café_noir.png".encode("latin-1")
    assert captions_of(os.fsdecode(name), None, CaptionRules("filename")) == ("café noir",)
    assert name_note(b"d/" + name) == "a name that is not UTF-8, read as cp1252"
    assert name_note("d/café.png".encode()) is None
    cyrillic = "собака_на_траве.png".encode("koi8-r")
    assert captions_of(os.fsdecode(cyrillic), None, CaptionRules("filename")) == ()
    assert name_note(cyrillic) == "a name that is not UTF-8"


def test_lines_of_a_text_file_are_variants() -> None:
    rules = CaptionRules("textfile")
    assert captions_of("a.png", "first\n\n  second \r\n", rules) == ("first", "second")
    assert captions_of("a.png", " \n", rules) == ()
    assert captions_of("a.png", None, rules) == ()


def test_lines_can_stay_together() -> None:
    assert caption_variants(" first\nsecond \n", splits_lines=False) == ["first\nsecond"]
    assert caption_variants(" \n ", splits_lines=False) == []


def test_an_instance_prompt_needs_no_file() -> None:
    assert captions_of("x.png", None, CaptionRules("instanceprompt", ("a dog", "my dog"))) == ("a dog", "my dog")


def test_an_instance_prompt_can_replace_or_precede_what_is_found() -> None:
    only = CaptionRules("textfile", ("a dog",), only_instance_prompt=True)
    assert captions_of("x.png", "running", only) == ("a dog",)
    assert not only.reads_text_files
    both = CaptionRules("textfile", ("a dog", "my dog"), prepend_instance_prompt=True)
    assert captions_of("x.png", "running\nasleep", both) == (
        "a dog running",
        "a dog asleep",
        "my dog running",
        "my dog asleep",
    )


def test_caption_files_in_other_encodings() -> None:
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert decode_caption("Häuser am “See”".encode(encoding)) == ("Häuser am “See”", None)
    text, note = decode_caption("Häuser am “See”".encode("cp1252"))
    assert (text, note) == ("Häuser am “See”", "a caption file that is not UTF-8, read as cp1252")
    _, note = decode_caption("H\ufffduser".encode())
    assert "U+FFFD" in str(note)


def test_separators_of_other_systems_are_blanks_and_do_not_split_a_caption() -> None:
    for separator in "\x0b\x0c\x1c\x1d\x1e\x1f\x85\u2028\u2029":
        assert caption_variants(f"a dog{separator}on grass\nsecond", splits_lines=True) == ["a dog on grass", "second"]
        assert caption_variants(f"a dog{separator}on grass", splits_lines=False) == ["a dog on grass"]
        assert captions_of(f"a_dog{separator}runs.png", None, CaptionRules("filename")) == ("a dog runs",)


def test_a_caption_that_is_only_its_opener_stays() -> None:
    edits = CaptionEdits(openers=("a photo of",))
    assert edits.apply(("a photo of",)) == ("a photo of",)
    assert edits.apply(("a photo of a cat",)) == ("a photo of a cat", "a cat")
