"""Sheets of images: scaling, order, missing images, cut text."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFont

from simpletuner.validation.grids import SheetRow, comparison_sheet, elided, fit_cell, scaled_to_side


def checkerboard(side: int) -> Image.Image:
    pixels = np.indices((side, side)).sum(axis=0) % 2 * 255
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def test_small_images_are_enlarged_by_a_whole_factor_without_new_colors():
    shown = fit_cell(checkerboard(64))
    assert shown.size == (192, 192)
    assert set(np.unique(np.asarray(shown))) == {0, 255}
    assert np.array_equal(np.asarray(shown)[::3, ::3], np.asarray(checkerboard(64)))


def test_large_images_are_reduced_and_middle_ones_left_alone():
    for side in (192, 512):  # the limits themselves are left alone
        assert np.array_equal(np.asarray(fit_cell(checkerboard(side))), np.asarray(checkerboard(side)))
    assert fit_cell(Image.new("RGB", (127, 100))).size == (192, 151)
    assert fit_cell(Image.new("RGB", (513, 100))).size == (512, 100)
    assert fit_cell(Image.new("RGB", (1, 2000))).size == (1, 512)
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
    # By hand: 20 px margin, 40 for the title, 31 for the headings, 27 for a row's label; 12 between columns and rows.
    assert sheet.size == (20 + 192 + 12 + 192 + 12 + 192 + 20, 20 + 40 + 31 + (27 + 192 + 12) * 2 + 20)
    red = np.asarray(sheet)[..., 0]
    for value, left, top in ((10, 20, 118), (20, 224, 118), (0xF1, 428, 118), (30, 20, 349), (30, 428, 349)):
        assert (red[top : top + 192, left : left + 192] == value).all()


def test_the_words_of_a_sheet_stand_over_what_they_name(monkeypatch):
    written: list[tuple[object, ...]] = []
    monkeypatch.setattr("simpletuner.validation.grids.write", lambda draw, *given: written.append(given))
    row = [Image.new("RGB", (300, 128)), Image.new("RGB", (128, 256))]
    sheet = comparison_sheet(["base", "step 10"], [SheetRow("first", row), SheetRow("second", row)], cell=128)
    assert sheet.size == (20 + 128 + 12 + 128 + 20, 20 + 31 + (27 + 128 + 12) * 2 + 20)
    assert written == [
        ((20, 20), "base", "#1f2933", 17, 128),
        ((160, 20), "step 10", "#1f2933", 17, 128),
        ((20, 51), "first", "#6b7785", 15, 268),
        ((20, 218), "second", "#6b7785", 15, 268),
    ]
    wide = [Image.new("RGB", (300, 128)), Image.new("RGB", (128, 256))]  # as large as they are
    assert comparison_sheet(["base", "step 10"], [SheetRow("first", wide)]).size == (
        20 + 300 + 12 + 300 + 20,
        20 + 31 + 27 + 256 + 12 + 20,
    )
    del written[4:]
    comparison_sheet(["base"], [], "title")
    assert written[4:] == [((20, 20), "title", "#1f2933", 22, 192), ((20, 60), "base", "#1f2933", 17, 192)]


def test_an_image_is_enlarged_by_a_whole_factor_where_one_reaches_two_thirds_of_the_side():
    # 43 goes twice into 128, which makes 86, at least two thirds of it; 42 thrice, and 65 once, which makes too little.
    sizes = {(64, 32): (128, 64), (43, 20): (86, 40), (42, 20): (126, 60), (65, 32): (128, 63), (86, 40): (86, 40)}
    sizes |= {(85, 40): (128, 60), (256, 128): (128, 64), (20, 64): (40, 128)}
    for size, expected in sizes.items():
        assert scaled_to_side(Image.new("RGB", size), 128).size == expected, size
    edge = Image.fromarray(np.array([[0, 255]], np.uint8).repeat(70, axis=1).repeat(2, axis=0)).convert("RGB")
    assert len(np.unique(np.asarray(scaled_to_side(edge, 100)))) > 2  # reduced smoothly
    assert set(np.unique(np.asarray(scaled_to_side(edge, 200)))) == {0, 255}


def test_long_text_is_cut_to_the_width_and_short_text_is_kept():
    font = ImageFont.load_default(15)
    cut = elided("a very long prompt " * 20, 15, 200)
    assert cut.endswith("…")
    assert font.getlength(cut) <= 200 < font.getlength(cut[:-1] + "xx…")
    assert elided("short\ntext", 15, 200) == "short text"


def test_a_row_whose_images_are_all_missing_leaves_an_empty_place():
    for cell, side in ((None, 192), (64, 64)):
        sheet = comparison_sheet(["base"], [SheetRow("first", [None])], cell=cell)
        assert sheet.size == (20 + side + 20, 20 + 31 + 27 + side + 12 + 20)
        assert (np.asarray(sheet)[78 : 78 + side, 20 : 20 + side] == (0xF1, 0xF3, 0xF5)).all()
