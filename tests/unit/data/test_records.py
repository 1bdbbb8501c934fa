"""Rows of edits: what a row may say, which files are read, and that a bad row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.data.records import Record, RecordRules, read_records
from simpletuner.errors import DataError, Problem


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in "abcd":
        Image.new("RGB", (32, 48), "red").save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, root: Path, **rules: Any) -> list[Record]:
    return read_records(path, RecordRules(root, **rules), "edits.records_file", [])


def only(folder: Path, row: dict[str, Any], **rules: Any) -> Record:
    [record] = read(write_rows(folder / "rows.jsonl", row), folder, **rules)
    return record


OMNIGEN2 = {"task_type": "edit", "instruction": "add", "input_images": ["images/b.png"], "output_image": "images/a.png"}
FIRERED = {"source_image": "images/b.png", "edit_image": "images/a.png", "instruction": "add", "instruction_cn": "加"}
OWN = {"target": "images/a.png", "references": ["images/b.png"], "instruction": "add", "task": "edit"}


@pytest.mark.parametrize("row", [OMNIGEN2, FIRERED, OWN, FIRERED | {"target_image": "images/a.png"}])
def test_the_same_row_has_several_forms(folder: Path, row: dict[str, Any]) -> None:
    record = only(folder, row, languages=("en",))
    assert (record.target.name, [each.name for each in record.references]) == ("a.png", ["b.png"])
    assert record.captions == ("add",)
    assert (record.name, record.line) == ("1-a", 1)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "parquet"])
def test_tables_of_every_kind_hold_rows(folder: Path, suffix: str) -> None:
    path = folder / f"rows.{suffix}"
    rows = [OWN, {"target": "images/c.png", "references": None, "instruction": "plain", "task": "t2i"}]
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        mark = "\t" if suffix == "tsv" else ","
        lines = [mark.join(("target", "reference_1", "reference_2", "instruction"))]
        lines += [mark.join(("images/a.png", "images/b.png", "", "add")), mark.join(("images/c.png", "", "", "plain"))]
        path.write_text("\n".join(lines) + "\n")
    found = read(path, folder)
    assert [(each.target.name, len(each.references), each.captions) for each in found] == [
        ("a.png", 1, ("add",)),
        ("c.png", 0, ("plain",)),
    ]
    first = 2 if suffix in ("csv", "tsv") else 1  # behind the header
    assert [(each.line, each.name) for each in found] == [(first, f"{first}-a"), (first + 1, f"{first + 1}-c")]


def test_a_cell_of_a_csv_file_may_hold_a_list(folder: Path) -> None:
    (folder / "rows.csv").write_text(
        'target,references,instruction\nimages/a.png,"[""images/b.png"", ""images/c.png""]",join them\n'
    )
    [record] = read(folder / "rows.csv", folder)
    assert [each.name for each in record.references] == ["b.png", "c.png"]


def test_languages_are_variants_of_which_some_may_be_chosen(folder: Path) -> None:
    by_column = {
        "target": "images/a.png",
        "instruction": "add",
        "instruction_zh": "加",
        "instruction_de": ["zu", "dazu"],
    }
    by_object = {"target": "images/a.png", "instruction": {"en": "add", "zh": "加", "de": ["zu", "dazu"]}}
    for row in (by_column, by_object):
        assert only(folder, row).captions == ("add", "加", "zu", "dazu")
        assert only(folder, row, languages=("de", "en")).captions == ("add", "zu", "dazu")
    with pytest.raises(DataError, match='"instruction" is missing in fr'):
        only(folder, by_column, languages=("fr",))


def test_an_inverse_instruction_is_a_row_the_other_way_round(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", OWN | {"inverse_instruction": "remove"})
    assert len(read(path, folder)) == 1
    forward, backward = read(path, folder, takes_inverse=True)
    assert (backward.target, backward.references, backward.captions) == (
        *forward.references,
        (forward.target,),
        ("remove",),
    )
    assert (forward.name, backward.name) == ("1-a", "1-a-inverse")
    two = OWN | {"references": ["images/b.png", "images/c.png"], "inverse_instruction": "remove"}
    assert len(read(write_rows(folder / "two.jsonl", two), folder, takes_inverse=True)) == 1


def test_rows_of_some_tasks_only(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", OWN, OWN | {"task": "t2i"}, OMNIGEN2)
    assert [each.line for each in read(path, folder, tasks=("edit",))] == [1, 3]
    with pytest.raises(DataError, match="holds no usable row of the tasks ic"):
        read(path, folder, tasks=("ic",))


def test_a_plain_folder_pairs_by_name(folder: Path) -> None:
    """The reference of b has another extension; c has two, d none. Folders of other names are none of references."""
    root = folder / "plain"
    for path in (
        "target/.hidden.png",
        "reference_old/b.png",
        "reference_/b.png",
        "target/b.png",
        "reference_1/b.jpg",
        "target/c.png",
        "reference_1/c.png",
        "reference_2/c.png",
        "target/d.png",
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(root / path)
    (root / "reference_3").write_text("no folder")
    for name in "bcd":
        (root / f"target/{name}.txt").write_text(f"make {name}\nor so\n")
    found = read(root, folder)
    assert [(each.name, [path.name for path in each.references]) for each in found] == [
        ("b", ["b.jpg"]),
        ("c", ["c.png", "c.png"]),
        ("d", []),
    ]
    assert found[0].captions == ("make b", "or so")
    (root / "target/d.txt").unlink()
    with pytest.raises(DataError, match=r'plain/d: "instruction" is missing'):
        read(root, folder)


def test_a_plain_folder_may_have_one_folder_for_each_sample(folder: Path) -> None:
    for sample, names in (("one", ("target", "reference_1")), ("two", ("target", "reference_1", "reference_2"))):
        (folder / "plain" / sample).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (16, 16)).save(folder / "plain" / sample / f"{name}.png")
        (folder / "plain" / sample / "instruction.txt").write_text(f"do {sample}")
    found = read(folder / "plain", folder)
    assert [(each.name, len(each.references), each.captions) for each in found] == [
        ("one", 1, ("do one",)),
        ("two", 2, ("do two",)),
    ]


def test_tables_in_a_folder_and_lists_of_rows_are_read(folder: Path) -> None:
    write_rows(folder / "rows" / "deep" / "1.jsonl", OWN)
    (folder / "rows" / "2.JSON").write_text(json.dumps([OWN, OMNIGEN2]))
    (folder / "rows" / "3.json").write_text(json.dumps(OWN))
    (folder / "rows" / "notes.txt").write_text("no table")
    names = [each.file.name for each in read(folder / "rows", folder)]
    assert names == ["2.JSON", "2.JSON", "3.json", "1.jsonl"]


def test_paths_are_looked_for_in_the_root_then_beside_the_file(folder: Path) -> None:
    Image.new("RGB", (16, 16)).save(folder / "images" / "near.png")
    path = write_rows(folder / "images" / "rows.jsonl", OWN | {"target": "near.png"}, OWN)
    assert [each.target.name for each in read(path, folder)] == ["near.png", "a.png"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"target": "images/none.png"}, 'there is no image "images/none.png"'),
        ({"references": ["images/none.png"]}, 'there is no image "images/none.png"'),
        ({"references": {"1": "images/b.png"}}, '"references" is not a list of paths'),
        ({"references": None, "reference_2": "images/b.png"}, '"reference_1" is missing, and a later one is given'),
        ({"reference_1": "images/b.png"}, '"references" and "reference_1" both name references'),
        ({"instruction": " "}, '"instruction" is missing'),
        ({"instruction": 3}, '"instruction" is not text'),
        ({"target": None}, '"target" is missing'),
        ({"output_image": "images/b.png"}, '"target" and "output_image" differ'),
        ({"reference": ["images/b.png"]}, 'there is no column "reference" in rows; did you mean "references"?'),
        ({"instructions": "more"}, 'there is no column "instructions" in rows; did you mean "instruction"?'),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(folder: Path, bad: dict[str, Any], words: str) -> None:
    path = write_rows(folder / "rows.jsonl", OWN, OWN | bad)
    with pytest.raises(DataError) as error:
        read(path, folder)
    assert f"{path}:2: {words}" in error.value.render()
    notes: list[str] = []
    records = read_records(path, RecordRules(folder, skips_bad_rows=True), "edits.records_file", notes)
    assert len(records) == 1
    assert "1 rows of" in notes[0]
    assert words in notes[0]


def test_of_many_bad_rows_twenty_are_shown_and_the_others_counted(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", *[OWN | {"target": f"{number}.png"} for number in range(23)])
    with pytest.raises(DataError) as error:
        read(path, folder)
    problems = error.value.problems
    assert [problem.line for problem in problems[:20]] == list(range(1, 21))
    assert problems[20:] == [
        Problem("and 3 more rows"),
        Problem("rows cannot be used", "edits.records_file", fix="correct them, or leave them out with skip_bad_rows"),
    ]
    path = write_rows(folder / "rows.jsonl", *[OWN | {"target": f"{number}.png"} for number in range(20)])
    with pytest.raises(DataError) as error:
        read(path, folder)
    assert len(error.value.problems) == 21


def test_samples_of_a_plain_folder_are_called_by_their_folders(folder: Path) -> None:
    """A sample may lie in the folder itself; hidden files and other images are no references."""
    for place in ("plain", "plain/b/c"):
        (folder / place).mkdir(parents=True)
        for name in ("target.png", ".reference_2.png", "reference_1.webp", "reference_1.png", "other.png"):
            Image.new("RGB", (16, 16)).save(folder / place / name)
        (folder / place / "b.caption").write_text("second")
        (folder / place / "a.TXT").write_text("first\nor so\n")
    found = read(folder / "plain", folder)
    assert [(each.name, [path.name for path in each.references], each.captions) for each in found] == [
        ("sample", ["reference_1.png"], ("first", "or so")),
        ("b-c", ["reference_1.png"], ("first", "or so")),
    ]


def test_the_text_beside_a_target_is_txt_before_caption_and_without_the_extension_before_with_it(folder: Path) -> None:
    root = folder / "plain"
    (root / "target").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(root / "target" / "a.png")
    for name in ("a.png.caption", "a.png.txt", "a.caption", "a.txt"):
        (root / "target" / name).write_text(name)
        assert read(root, folder)[0].captions == (name,)


def test_a_table_that_is_none_is_named(folder: Path) -> None:
    (folder / "rows.jsonl").write_text('{"target": \n')
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read(folder / "rows.jsonl", folder)


EMBEDS = {"prompt_column": "embeddings_tensor", "dropped_column": "embeddings_tensor_droptext"}


def embedded(folder: Path, row: dict[str, Any], *names: str, suffix: str = ".safetensors") -> dict[str, Any]:
    """The row with columns of embeddings, whose files are there."""
    for name in names:
        (folder / f"0_{name}{suffix}").write_bytes(b"")
    return row | {f"embeddings_tensor_{name}": f"0_{name}{suffix}" for name in names}


def test_embeddings_belong_to_the_texts_of_their_languages(folder: Path) -> None:
    """A text that is empty takes no part; the file of the dropped caption is none of the variants."""
    both = embedded(folder, FIRERED, "en", "cn", "droptext")
    record = only(folder, both, **EMBEDS)
    assert record.captions == ("add", "加")
    assert [path.name for path in record.prompt_files] == ["0_en.safetensors", "0_cn.safetensors"]
    assert record.dropped_prompt_file == folder / "0_droptext.safetensors"
    assert only(folder, both | {"instruction": ""}, **EMBEDS).captions == ("加",)
    assert only(folder, both, languages=("cn",), **EMBEDS).prompt_files == (folder / "0_cn.safetensors",)
    same = only(folder, both | {"instruction_cn": "add"}, **EMBEDS)
    assert (same.captions, [path.name for path in same.prompt_files]) == (("add",), ["0_en.safetensors"])


def test_a_row_whose_embeddings_are_read_needs_no_text(folder: Path) -> None:
    row = embedded(folder, FIRERED | {"instruction": None, "instruction_cn": ""}, "en", "cn")
    record = only(folder, row, **EMBEDS)
    assert record.captions == ("(no instruction)",)
    assert [path.name for path in record.prompt_files] == ["0_en.safetensors"]
    assert record.dropped_prompt_file is None


def test_the_way_back_has_embeddings_of_its_own(folder: Path) -> None:
    names = ("en", "cn", "droptext", "en_inv", "cn_inv", "droptext_inv")
    row = embedded(folder, FIRERED | {"inverse_instruction": "remove", "inverse_instruction_cn": ""}, *names)
    there, back = read(write_rows(folder / "rows.jsonl", row), folder, takes_inverse=True, **EMBEDS)
    assert (there.target.name, back.target.name, back.captions) == ("a.png", "b.png", ("remove",))
    assert [path.name for path in (*back.prompt_files, back.dropped_prompt_file)] == [
        *("0_en_inv.safetensors", "0_droptext_inv.safetensors")
    ]


@pytest.mark.parametrize(
    ("names", "suffix", "words"),
    [
        (("en",), ".safetensors", '"embeddings_tensor_cn" is missing'),
        (("en", "cn"), ".pt", "simpletuner convert"),
    ],
)
def test_embeddings_that_cannot_be_read_name_their_row(folder: Path, names, suffix: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        only(folder, embedded(folder, FIRERED, *names, suffix=suffix), **EMBEDS)
    assert words in caught.value.render()
    assert "rows.jsonl" in caught.value.render()


def test_a_pickle_that_was_converted_is_read_in_its_new_form(folder: Path) -> None:
    row = embedded(folder, FIRERED, "en", "cn", suffix=".pt")
    for name in ("en", "cn"):
        (folder / f"0_{name}.safetensors").write_bytes(b"")
    assert [path.suffix for path in only(folder, row, **EMBEDS).prompt_files] == [".safetensors"] * 2
