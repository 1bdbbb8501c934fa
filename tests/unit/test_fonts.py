"""Words in images are legible in whatever language somebody prompts."""

from __future__ import annotations

import pytest
from PIL import ImageFont

from simpletuner import fonts
from simpletuner.fonts import font_for


def test_latin_text_has_pillow_s_own_font() -> None:
    assert font_for("a red star", 15).getname() == ImageFont.load_default(15).getname()


def test_a_character_that_pillow_s_font_lacks_is_looked_for_in_the_system_s() -> None:
    try:
        ImageFont.truetype("DejaVuSans.ttf", 15)
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    assert font_for("Grüße, Ελλάδα, Москва", 15).getname()[0] == "DejaVu Sans"


def test_of_fonts_the_one_that_lacks_least_is_taken_and_of_equals_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other, third = (ImageFont.load_default(size) for size in (15, 16, 17))
    asked: list[int] = []
    monkeypatch.setattr(fonts, "_installed", lambda size: asked.append(size) or (other, third))
    for lacking, chosen in (((3, 2, 1), third), ((3, 1, 1), other), ((1, 1, 1), 15)):
        counts = iter(lacking)
        monkeypatch.setattr(fonts, "_lacking", lambda font, text, counts=counts: next(counts))
        found = font_for("ö", 15)
        assert found is chosen if chosen != 15 else found.size == 15
    assert asked == [15] * 3
    monkeypatch.undo()
    assert fonts._lacking(own, "ab 红 色红") == 2  # each once, and no blank
    assert fonts.NAMES[:5] == (
        *("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "arial.ttf", "segoeui.ttf"),
    )


def test_a_machine_without_fonts_draws_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda size: ())
    assert font_for("红色的星星", 15).getname() == ImageFont.load_default(15).getname()
