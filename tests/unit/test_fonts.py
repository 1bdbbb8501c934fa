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


def test_a_machine_without_fonts_draws_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_installed", lambda size: ())
    assert font_for("红色的星星", 15).getname() == ImageFont.load_default(15).getname()
