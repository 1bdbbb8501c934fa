from __future__ import annotations

from simpletuner.data.captions import CaptionRules, caption_variants, captions_of, decode_caption, printable


def test_a_file_name_becomes_a_caption() -> None:
    rules = CaptionRules("filename")
    assert captions_of("red things/a_red__square_01.final.png", None, rules) == ("a red square 01.final",)
    assert captions_of("___.png", None, rules) == ()


def test_undecodable_bytes_in_a_name_do_not_reach_the_caption() -> None:
    (caption,) = captions_of("caf\udce9_noir.png", None, CaptionRules("filename"))
    assert caption == "caf? noir"


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
    assert decode_caption("Häuser".encode("utf-8-sig")) == "Häuser"
    assert decode_caption("Häuser".encode("utf-16")) == "Häuser"
    assert decode_caption("Häuser".encode("latin-1")) == "H\ufffduser"


def test_terminal_codes_are_shown_not_sent() -> None:
    assert printable("a\x1b[31m\n\udcff 😀 %s") == "a\\x1b[31m\\n\\udcff 😀 %s"
