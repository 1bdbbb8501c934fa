"""Captions that stand in for missing ones, and what is said of texts and names that nobody looked at."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.data.captioned import caption_warnings
from simpletuner.data.captions import is_camera_name
from simpletuner.data.dataset import Dataset
from simpletuner.data.report import Note
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import build_datasets, options, write_image

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two photographs with a text, one whose name a camera gave, one whose name says something."""
    root = tmp_path / "photographs"
    for seed, name in enumerate(("IMG_0001.png", "IMG_0002.png", "IMG_0003.png", "a_red_boat.png")):
        write_image(root / name, seed=seed)
    (root / "IMG_0001.txt").write_text("a dog\nthe dog\n")
    (root / "IMG_0002.txt").write_text("a cat")
    return root


def build(folder: Path, **keys: object) -> Dataset:
    entry = ImageDataset(id="things", instance_data_dir=folder, **keys)
    (dataset,) = build_datasets([entry], options(), OMNIGEN, folder.parent / "work", data_file="data.json")
    return dataset


def captions(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {sample.path: sample.captions for sample in dataset.samples}


def test_the_prompt_stands_in_where_there_is_no_text(folder: Path) -> None:
    dataset = build(
        folder, caption_strategy="textfile", caption_fallback="instanceprompt", instance_prompt=["my pet", "a pet"]
    )
    assert captions(dataset) == {
        "IMG_0001.png": ("a dog", "the dog"),
        "IMG_0002.png": ("a cat",),
        "IMG_0003.png": ("my pet", "a pet"),
        "a_red_boat.png": ("my pet", "a pet"),
    }
    assert dataset.filter_report.warnings == ()
    assert any(
        line.startswith("2 with no caption of their own, which caption_fallback")
        for line in dataset.filter_report.note_lines()
    )


def test_a_name_stands_in_unless_a_camera_gave_it(folder: Path) -> None:
    keys = {"caption_strategy": "textfile", "caption_fallback": "filename"}
    with pytest.raises(DataError) as caught:
        build(folder, **keys)
    assert "1 of 4 images have no text file" in str(caught.value)
    assert "IMG_0003.png" in str(caught.value)
    found = captions(build(folder, **keys, instance_prompt="my pet", prepend_instance_prompt=True))
    assert found["IMG_0003.png"] == ("my pet",)
    assert found["a_red_boat.png"] == ("my pet a red boat",)
    assert found["IMG_0002.png"] == ("my pet a cat",)


def test_with_a_fallback_the_number_of_a_camera_is_no_caption(folder: Path) -> None:
    found = captions(build(folder, caption_fallback="instanceprompt", instance_prompt="my pet"))
    assert found["IMG_0003.png"] == ("my pet",)
    assert found["a_red_boat.png"] == ("a red boat",)


def test_without_a_fallback_missing_texts_are_an_error_that_offers_it(folder: Path) -> None:
    with pytest.raises(DataError, match="set caption_fallback"):
        build(folder, caption_strategy="textfile")


def test_a_row_that_is_missing_has_its_stand_in(folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,text\nIMG_0001.png,of the table\n")
    keys = {"caption_strategy": "csv", "caption_fallback": "instanceprompt", "instance_prompt": "my pet"}
    found = captions(build(folder, **keys, metadata_file=folder / "metadata.csv"))
    assert [found["IMG_0001.png"], found["IMG_0002.png"]] == [("of the table",), ("my pet",)]


@pytest.mark.parametrize("keys", [{}, {"caption_strategy": "instanceprompt", "instance_prompt": "a thing"}])
def test_texts_that_a_strategy_does_not_read_are_a_warning(folder: Path, keys: dict) -> None:
    strategy = keys.get("caption_strategy", "filename")
    warnings = build(folder, **keys).filter_report.warnings
    assert warnings[0] == (
        f"things: 2 of 4 images have a text file that caption_strategy {strategy} does not read (IMG_0001.png, "
        f"IMG_0002.png): set caption_strategy textfile and caption_fallback {strategy}, or remove the files"
    )


def test_captions_that_are_names_of_a_camera_are_a_warning_that_names_them(folder: Path) -> None:
    warning = build(folder).filter_report.warnings[1]
    assert "3 of 4 captions are names that a camera or a program gave" in warning
    assert '"IMG 0001" (IMG_0001.png, IMG_0002.png, IMG_0003.png)' in warning


def test_two_images_of_one_name_share_their_text_with_a_warning(folder: Path) -> None:
    write_image(folder / "IMG_0001.jpg", seed=9)
    keys = {"caption_strategy": "textfile", "caption_fallback": "instanceprompt", "instance_prompt": "a"}
    dataset = build(folder, **keys)
    (warning,) = dataset.filter_report.warnings
    assert "2 images share their text file with another one of the same name (IMG_0001.jpg, IMG_0001.png)" in warning
    (folder / "IMG_0001.jpg.txt").write_text("its own")
    dataset = build(folder, **keys)
    assert dataset.filter_report.warnings == ()
    assert captions(dataset)["IMG_0001.jpg"] == ("its own",)


@pytest.mark.parametrize(("image", "text"), [(NFC, NFD), (NFD, NFC)])
@pytest.mark.parametrize("suffix", [".txt", ".png.txt"])
def test_an_accent_written_in_two_ways_is_one_name(tmp_path: Path, image: str, text: str, suffix: str) -> None:
    """Files that were packed on another system: both ways look the same to everybody."""
    write_image(tmp_path / "i" / f"{image}.png")
    (tmp_path / "i" / f"{text}{suffix}").write_text("a cup")
    assert list(captions(build(tmp_path / "i", caption_strategy="textfile")).values()) == [("a cup",)]


def test_a_mask_and_a_row_are_found_by_either_way_of_writing(tmp_path: Path) -> None:
    folder = tmp_path / "i"
    write_image(folder / f"{NFD}.png")
    write_image(tmp_path / "m" / f"{NFC}.png")
    (folder / "metadata.csv").write_text(f"file_name,text\n{NFC}.png,of the table\n", encoding="utf-8")
    entries = [
        ImageDataset(
            id="things",
            instance_data_dir=folder,
            conditioning_data="masks",
            caption_strategy="csv",
            metadata_file=folder / "metadata.csv",
        ),
        ConditioningDataset(id="masks", instance_data_dir=tmp_path / "m", conditioning_type="mask"),
    ]
    (dataset,) = build_datasets(entries, options(), OMNIGEN, tmp_path / "work")
    assert list(captions(dataset).values()) == [("of the table",)]
    assert dataset.masks is not None
    assert dataset.filter_report.skipped.counts == {}


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("WhatsApp Image 2024-05-01 at 10.00.01.jpeg", True),
        ("P1010203.JPG", True),
        ("ox.png", False),
        ("cup 3.png", False),
    ],
)
def test_the_names_of_cameras(name: str, is_one: bool) -> None:
    assert is_camera_name(name) is is_one


def test_of_four_names_three_are_listed(folder: Path) -> None:
    write_image(folder / "IMG_0004.png", seed=9)
    warning = build(folder).filter_report.warnings[1]
    assert "4 of 5 captions" in warning
    assert "(IMG_0001.png, IMG_0002.png, IMG_0003.png, ...)" in warning


def test_some_of_many_caption_files_are_shown_as_some() -> None:
    notes = {"letters": Note(3, ("a.txt", "b.txt")), "marks": Note(1200, ("c.txt",)), "signs": Note(1, ("d.txt",))}
    index: Any = SimpleNamespace(notes=lambda of_texts: notes if of_texts else {})
    assert [line.partition(": save")[0] for line in caption_warnings("things", index)] == [
        "things: 3 with letters (a.txt, b.txt, ...)",
        "things: 1,200 with marks (c.txt, ...)",
        "things: 1 with signs (d.txt)",
    ]
