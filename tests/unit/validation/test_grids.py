"""Sheets of images: scaling, order, missing images, cut text."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFont

from simpletuner.validation.grids import SheetRow, comparison_sheet, elided, fit_cell


def checkerboard(side: int) -> Image.Image:
    pixels = np.indices((side, side)).sum(axis=0) % 2 * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def test_small_images_are_enlarged_by_a_whole_factor_without_new_colors():
    shown = fit_cell(checkerboard(64))
    assert shown.size == (192, 192)
    assert set(np.unique(np.asarray(shown))) == {0, 255}
    assert np.array_equal(np.asarray(shown)[::3, ::3], np.asarray(checkerboard(64)))


def test_large_images_are_reduced_and_middle_ones_left_alone():
    assert fit_cell(Image.new("RGB", (1024, 512))).size == (512, 256)
    assert fit_cell(Image.new("RGB", (256, 200))).size == (256, 200)


def test_a_comparison_holds_every_image_and_leaves_missing_places_empty():
    sheet = comparison_sheet(
        ["base", "step 10", "EMA"],
        [
            SheetRow(
                "first", [Image.new("RGB", (192, 192), (10, 0, 0)), Image.new("RGB", (192, 192), (20, 0, 0)), None]
            ),
            SheetRow("second", [Image.new("RGB", (192, 192), (30, 0, 0))] * 3),
        ],
        "title",
    )
    counts = {color: count for count, color in sheet.getcolors(maxcolors=100000) or []}
    assert counts[(10, 0, 0)] == counts[(20, 0, 0)] == 192 * 192
    assert counts[(30, 0, 0)] == 3 * 192 * 192
    assert counts[(0xF1, 0xF3, 0xF5)] == 192 * 192


def test_long_text_is_cut_to_the_width_and_short_text_is_kept():
    font = ImageFont.load_default(15)
    cut = elided("a very long prompt " * 20, 15, 200)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 200 < font.getlength(cut[:-1] + "xx…")
    assert elided("short\ntext", 15, 200) == "short text"
