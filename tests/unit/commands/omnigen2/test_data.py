"""OmniGen2's data files: mixes of mixes, rows, and the datasets that become of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.commands.omnigen2.data import caption_variants, read_mix, read_source, write_datasets
from simpletuner.commands.omnigen2.keys import Translation
from simpletuner.errors import ConfigError

TRANSLATION = Translation("mine", {}, "mix.yml", 1048576, (1048576, 589824), 2048, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abcd":
        Image.new("RGB", (32, 48), "red").save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write_rows(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(target: str, *inputs: str, task: str = "edit", instruction: str = "add a hat") -> dict[str, Any]:
    found = {"task_type": task, "instruction": instruction, "output_image": target}
    return found | ({"input_images": list(inputs)} if inputs else {})


def mix(path: Path, *entries: tuple[str, float]) -> Path:
    path.write_text("data:\n" + "".join(f"- {{path: {name}, type: x, ratio: {ratio}}}\n" for name, ratio in entries))
    return path


def entries_of(folder: Path, path: Path) -> list[dict[str, Any]]:
    sources = read_mix(path, folder)
    rows = [read_source(source, folder, False, []) for source in sources]
    return write_datasets(TRANSLATION, sources, rows, folder / "out")


def test_ratios_are_shares_of_an_epoch_that_has_all_rows(folder: Path) -> None:
    """0.5, 0.3 and 0.2 of 2 + 6 + 12 rows are 10, 6 and 4 rows: 5 times, once and a third of each file."""
    for name, count in (("one", 2), ("two", 6), ("three", 12)):
        write_rows(folder / f"{name}.jsonl", *[row("images/a.png", task="t2i")] * count)
    found = entries_of(folder, mix(folder / "mix.yml", ("one.jsonl", 0.5), ("two.jsonl", 0.3), ("three.jsonl", 0.2)))
    assert {entry["id"]: entry["probability"] for entry in found} == pytest.approx({"one": 5, "two": 1, "three": 1 / 3})


def test_ratios_of_a_mix_in_a_mix_divide_its_own(folder: Path) -> None:
    for name in ("one", "two", "three"):
        write_rows(folder / f"{name}.jsonl", *[row("images/a.png", task="t2i")] * 3)
    mix(folder / "inner.yml", ("two.jsonl", 0.33), ("three.jsonl", 0.33))
    sources = read_mix(mix(folder / "mix.yml", ("one.jsonl", 1), ("inner.yml", 3)), folder)
    assert [(source.name, source.weight) for source in sources] == [("one", 0.25), ("two", 0.375), ("three", 0.375)]


def test_rows_with_different_numbers_of_references_are_datasets_of_their_own(folder: Path) -> None:
    rows = [
        row("images/a.png"),
        row("images/b.png", "images/a.png"),
        row("images/b.png", "images/c.png", "images/d.png"),
    ]
    write_rows(folder / "edit.jsonl", *rows, row("images/b.png", "images/d.png"))
    found = {entry["id"]: entry for entry in entries_of(folder, mix(folder / "mix.yml", ("edit.jsonl", 1)))}
    assert list(found) == ["edit", "edit-1", "edit-1-image-1", "edit-2", "edit-2-image-1", "edit-2-image-2"]
    assert found["edit-2"]["conditioning_data"] == ["edit-2-image-1", "edit-2-image-2"]
    assert found["edit-1-image-1"]["resolution"] == 1024
    assert found["edit-2-image-1"]["resolution"] == 768  # 589824 pixels for two and more
    assert {found[name]["probability"] for name in ("edit", "edit-1", "edit-2")} == {1}
    place = Path(found["edit-2"]["instance_data_dir"]).parent
    assert (place / "target" / "1.png").resolve() == (folder / "images" / "b.png").resolve()
    assert (place / "image-2" / "1.png").resolve() == (folder / "images" / "d.png").resolve()
    # The image b.png is the target of two rows of one dataset.
    assert len(list(Path(found["edit-1"]["instance_data_dir"]).glob("*.png"))) == 2


def test_what_was_written_is_taken_again(folder: Path) -> None:
    write_rows(folder / "edit.jsonl", row("images/a.png"))
    path = mix(folder / "mix.yml", ("edit.jsonl", 1))
    first, again = entries_of(folder, path), entries_of(folder, path)
    assert first == again
    write_rows(folder / "edit.jsonl", row("images/b.png"))
    assert entries_of(folder, path) != first


def test_folders_and_lists_of_rows_are_read(folder: Path) -> None:
    write_rows(folder / "rows" / "deep" / "1.jsonl", row("images/a.png"))
    (folder / "rows" / "2.json").write_text(json.dumps([row("images/b.png"), row("images/c.png")]))
    [source] = read_mix(mix(folder / "mix.yml", ("rows", 1)), folder)
    assert [each.target.name for each in read_source(source, folder, False, [])] == ["b.png", "c.png", "a.png"]


def test_paths_are_looked_for_in_the_working_folder_then_beside_the_file(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "images" / "near.png")
    write_rows(folder / "images" / "rows.jsonl", row("near.png"), row("images/a.png"))
    [source] = read_mix(mix(folder / "images" / "mix.yml", ("rows.jsonl", 1)), folder)
    assert len(read_source(source, folder, False, [])) == 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (row("images/none.png"), 'there is no image "images/none.png"'),
        (row("images/a.png", "images/none.png"), 'there is no image "images/none.png"'),
        ({"task_type": "edit", "output_image": "images/a.png"}, '"instruction" is missing'),
        (row("images/a.png") | {"input_images": "images/b.png"}, '"input_images" is no list of paths'),
        (row("images/a.png") | {"task_type": 3}, '"task_type" is no text'),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(folder: Path, bad: dict[str, Any], words: str) -> None:
    write_rows(folder / "rows.jsonl", row("images/a.png"), bad)
    [source] = read_mix(mix(folder / "mix.yml", ("rows.jsonl", 1)), folder)
    with pytest.raises(ConfigError) as error:
        read_source(source, folder, False, [])
    assert f"{folder / 'rows.jsonl'}:2: {words}" in error.value.render()
    notes: list[str] = []
    assert len(read_source(source, folder, True, notes)) == 1
    assert "1 rows of rows are left out" in notes[0]
    assert words in notes[0]


def test_what_cannot_be_met_is_refused_at_the_start(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "rows.jsonl", row("images/a.png"))
    sources = read_mix(mix(folder / "mix.yml", ("rows.jsonl", 1), ("empty.jsonl", 0.1)), folder)
    with pytest.raises(ConfigError, match=r'"empty.jsonl" holds no usable row, and its ratio is above 0'):
        read_source(sources[1], folder, False, [])
    assert [s.name for s in read_mix(mix(folder / "mix.yml", ("rows.jsonl", 1), ("empty.jsonl", 0)), folder)] == [
        "rows"
    ]
    for entry, words in (
        (("none.jsonl", 1), "there is nothing of this name"),
        (("rows.jsonl", -1), "-1 is no ratio"),
        (("rows.jsonl", "much"), "much is no ratio"),
        (("rows.jsonl", 0), "no entry has a ratio above 0"),
        (("mix.yml", 1), "this mix is part of itself"),
        (("images/a.png", 1), "is of another kind"),
        (("images", 1), "holds no .jsonl or .json file"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_mix(mix(folder / "mix.yml", entry), folder)  # type: ignore[arg-type]


def test_an_opener_is_left_out_of_half_of_the_text_to_image_rows_only() -> None:
    text = "The image shows a cat. The image shows a dog. The image depicts a bird."
    assert caption_variants(text, "t2i") == (text, text.replace("The image depicts ", ""))
    assert caption_variants("a cat", "text_to_image_v2") == ("a cat",)
    assert caption_variants("The image shows a cat", "edit") == ("The image shows a cat",)
    assert caption_variants("这张图片展示了一只猫", "t2i") == ("这张图片展示了一只猫", "一只猫")
    assert caption_variants("The image shows ", "t2i") == ("The image shows ",)
