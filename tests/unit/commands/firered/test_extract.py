"""Stage one on a tiny edit model: files, rows, and that a command which was killed goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.batch import Crop, PromptImage
from simpletuner.commands.firered import extract as extracting
from simpletuner.commands.firered.extract import extract
from simpletuner.commands.firered.extract_flags import parse_extract
from simpletuner.data.reading import to_image
from simpletuner.data.transforms import load_image, to_pixels
from simpletuner.errors import ConfigError, DataError
from simpletuner.launch import family_of_model
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder
from tests.unit.commands.firered.edits import write_images, write_table

EDITS = ("en", "cn", "droptext")
INVERSE = ("en_inv", "cn_inv", "droptext_inv")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen_image_edit_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def families(model: Path) -> dict[str, Any]:
    """The model as each of the two families, loaded once."""
    return {name: family_of_model(str(model), name) for name in ("qwen_image_edit", "qwen_image")}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """The rows of the page, and one that says nothing."""
    images = [str(path) for path in write_images(tmp_path / "img")]
    return write_table(
        tmp_path / "data.jsonl",
        [
            {
                **{"source_image": images[0], "target_image": images[1]},
                **{"instruction": "Change the sky.", "instruction_cn": "改变天空。"},
                **{"inverse_instruction": "A blue sky.", "inverse_instruction_cn": "蓝天。"},
                "id": 7,
            },
            {
                "source_image": images[:2],
                "target_image": images[2],
                "instruction": "Merge.",
                "instruction_cn": "合成。",
            },
            {"source_image": None, "target_image": images[3], "instruction": "A cat."},
        ],
    )


def run(table: Path, families: dict[str, Any], *more: str, rank: int = 0, size: int = 1) -> list[dict[str, Any]]:
    """The rows that one process writes."""
    folder = table.parent
    words = [str(table), f"--output_jsonl_dir={folder}/rows", f"--embeddings_save_dir={folder}/embeds"]
    flags = parse_extract([*words, "--model_path=unused", "--image_sample_size=64", "--num_workers=2", *more])
    family = families["qwen_image" if flags.t2i_mode else "qwen_image_edit"]
    written = extract(flags, folder, rank, size, lambda: family, lambda line: None)
    return [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]


def test_a_row_gets_a_file_for_each_variant_and_the_names_that_training_reads(table: Path, families) -> None:
    rows = run(table, families)
    given = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    assert [row["instruction"] for row in rows] == ["Change the sky.", "Merge.", "A cat."]
    for number, (row, before) in enumerate(zip(rows, given, strict=True)):
        assert row.items() >= {key: value for key, value in before.items()}.items()
        assert row["edit_image"] == row["target_image"] == before["target_image"]
        for name in (*EDITS, *INVERSE):
            path = Path(row[f"embeddings_tensor_{name}"])
            assert path == table.parent / "embeds/data" / f"{number}_{name}.safetensors"
            [tensor] = load_file(path).values()
            assert tensor.ndim == 2
    assert rows[0]["source_image_size"] == [{"width": 64, "height": 64}]
    assert rows[0]["edit_image_size"] == {"width": 96, "height": 64}
    assert (rows[2]["source_image_size"], rows[2]["instruction_cn"]) == ([], "")
    assert (table.parent / "rows/data_rank_000.jsonl").is_file()


def test_embeddings_are_those_of_the_family_behind_the_images_that_training_cuts(table: Path, families) -> None:
    """64 x 96 pixels are reduced to an area of 64 squared, in multiples of 32: 32 x 64, cut from the middle."""
    [row, two, none] = run(table, families)
    family = families["qwen_image_edit"]

    def shown(name: str, crop: Crop) -> PromptImage:
        return PromptImage.of(to_image(to_pixels(load_image((table.parent / "img" / name).read_bytes()), crop)))

    square, wide = Crop(64, 64, 0, 0, 64, 64), Crop(43, 64, 5, 0, 32, 64)
    expected = {
        row["embeddings_tensor_en"]: ("Change the sky.", [shown("0.png", square)]),
        row["embeddings_tensor_cn_inv"]: ("蓝天。", [shown("1.png", wide)]),
        row["embeddings_tensor_droptext"]: ("", [shown("0.png", square)]),
        two["embeddings_tensor_en"]: ("Merge.", [shown("0.png", square), shown("1.png", wide)]),
        none["embeddings_tensor_en"]: ("A cat.", []),
        none["embeddings_tensor_cn"]: ("", []),
    }
    for path, (text, images) in expected.items():
        [embeds] = family.encode_prompts([text], [images])
        [tensor] = load_file(path).values()
        torch.testing.assert_close(tensor, embeds.tensors["prompt_embeds"], rtol=0, atol=1e-6)


def test_text_to_image_sees_no_image_and_forces_that_there_is_no_way_back(table: Path, families) -> None:
    rows = run(table, families, "--t2i_mode")
    assert [sorted(key[18:] for key in row if key.startswith("embeddings_tensor")) for row in rows] == [
        sorted(EDITS)
    ] * 3
    assert {row["embeddings_tensor_droptext"] for row in rows} == {
        (table.parent / "embeds/data/null_text_embedding.safetensors").as_posix()
    }
    [embeds] = families["qwen_image"].encode_prompts(["Merge."])
    [tensor] = load_file(rows[1]["embeddings_tensor_en"]).values()
    assert torch.equal(tensor, embeds.tensors["prompt_embeds"])


def test_without_the_way_back_there_are_three_files(table: Path, families) -> None:
    rows = run(table, families, "--disable_inverse")
    assert len(list((table.parent / "embeds/data").glob("*.safetensors"))) == 9
    assert not any(key.endswith("_inv") for key in rows[0])


def test_the_original_s_files_are_one_tensor_each(table: Path, families) -> None:
    rows = run(table, families, "--disable_inverse", "--format=pt")
    again = run(table, families, "--disable_inverse")
    tensor = torch.load(rows[1]["embeddings_tensor_cn"], weights_only=True)
    [same] = load_file(again[1]["embeddings_tensor_cn"]).values()
    assert torch.equal(tensor, same)


def test_columns_may_have_other_names(tmp_path: Path, families) -> None:
    images = [str(path) for path in write_images(tmp_path / "img")]
    names = {"source": images[0], "out": images[1], "text": "a", "text_zh": "b", "back": "c", "back_zh": "d"}
    table = write_table(tmp_path / "data.jsonl", [names])
    fields = ("source", "target", "instruction", "instruction_cn", "inverse_instruction", "inverse_instruction_cn")
    words = [f"--{field}_field={name}" for field, name in zip(fields, names, strict=True)]
    [row] = run(table, families, *words)
    assert [row[field] for field in fields[2:]] == ["a", "b", "c", "d"]
    assert (row["source_image"], row["target_image"], row["edit_image"]) == (images[0], images[1], images[1])
    assert row["text"] == "a"


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


def count_encodings(monkeypatch, dies_at: int | None = None) -> list[str]:
    """The texts that are encoded; the process ends at one of them."""
    texts: list[str] = []
    encode = extracting.encode

    def note(family, requests):
        if dies_at is not None and len(texts) == dies_at:
            raise Killed
        texts.extend(request.text for request in requests)
        return encode(family, requests)

    monkeypatch.setattr(extracting, "encode", note)
    return texts


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_a_killed_command_goes_on_and_leaves_the_same_files(table: Path, families, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        count_encodings(patched, dies_at=4)
        with pytest.raises(Killed):
            run(table, families)
    folder = table.parent / "embeds/data"
    journal = folder / "made_rank_000.log"
    done = len(files_in(folder))
    assert 0 < done < 18
    journal.write_text(journal.read_text() + '\n[17, "0_e')  # a line that the kill has cut short
    texts = count_encodings(monkeypatch)
    rows = run(table, families)
    stopped = files_in(folder)
    count = len(texts)
    assert run(table, families) == rows
    assert len(texts) == count  # all was there
    other = table.rename(table.parent / "other.jsonl")
    run(other, families)
    assert files_in(table.parent / "embeds/other") == stopped
    assert len(stopped) == 18


@pytest.mark.slow
def test_only_what_has_changed_is_made_again(table: Path, families, monkeypatch) -> None:
    run(table, families, "--disable_inverse")
    texts = count_encodings(monkeypatch)
    lines = table.read_text(encoding="utf-8").replace("Merge.", "Join.")
    table.write_text(lines, encoding="utf-8")
    run(table, families, "--disable_inverse")
    assert texts == ["Join."]
    texts.clear()
    (table.parent / "img/0.png").write_bytes((table.parent / "img/3.png").read_bytes())
    run(table, families, "--disable_inverse")
    assert texts == ["Change the sky.", "改变天空。", "", "Join.", "合成。", ""]
    texts.clear()
    run(table, families, "--disable_inverse", "--image_sample_size=96")
    assert len(texts) == 8  # the row without image and Chinese text has two different ones


def test_processes_share_the_lines_and_make_nothing_twice(table: Path, families, monkeypatch) -> None:
    first, second = (run(table, families, "--disable_inverse", rank=rank, size=2) for rank in range(2))
    assert [row["instruction"] for row in first] == ["Change the sky.", "A cat."]
    assert [row["instruction"] for row in second] == ["Merge."]
    assert (table.parent / "rows/data_rank_001.jsonl").is_file()
    texts = count_encodings(monkeypatch)
    assert run(table, families, "--disable_inverse") == [first[0], second[0], first[1]]
    assert texts == []


def test_rows_that_cannot_be_used_are_named_and_can_be_left_out(table: Path, families) -> None:
    rows = [
        {"target_image": str(table.parent / "img/0.png"), "source_image": "gone.png"},
        {"source_image": None},
        {"target_image": str(table.parent / "img/0.png"), "source_image": 5},
        {"target_image": str(table.parent / "img/0.png"), "instruction": ["a"]},
        {"target_image": "https://example.org/a.png"},
    ]
    with table.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(ConfigError) as caught:
        run(table, families)
    said = caught.value.render()
    for line, words in enumerate(
        (
            'there is no image "gone.png"',
            '"target_image" is missing',
            "neither a path",
            '"instruction" is not text',
            "--allow_urls",
        ),
        start=4,
    ):
        assert f"data.jsonl:{line}" in said
        assert words in said
    assert len(run(table, families, "--skip_bad_rows", "--disable_inverse")) == 3


def test_an_image_that_is_none_is_named_with_its_row(table: Path, families) -> None:
    (table.parent / "img/3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"data\.jsonl:3"):
        run(table, families)
    assert len(run(table, families, "--skip_bad_rows", "--disable_inverse")) == 2


def test_images_are_fetched_once_and_rows_name_the_copies(table: Path, families, monkeypatch) -> None:
    fetched: list[str] = []

    def fetch(url: str, path: Path) -> None:
        fetched.append(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((table.parent / "img/0.png").read_bytes())

    monkeypatch.setattr(extracting, "fetch", fetch)
    row = {"source_image": "https://example.org/a.png?x=1", "target_image": str(table.parent / "img/1.png")}
    write_table(table, [row])
    [written] = run(table, families, "--allow_urls", "--disable_inverse")
    copied = Path(written["source_image"])
    assert copied.parent == table.parent / "embeds/data/images"
    assert (copied.suffix, written["source_image_size"]) == (".png", [{"width": 64, "height": 64}])
    assert run(table, families, "--allow_urls", "--disable_inverse") == [written]
    assert fetched == ["https://example.org/a.png?x=1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size=0"], "--batch_size: 0 cannot be used"),
        (["--image_sample_size=8"], "64 or more"),
        (["--format=bin"], "invalid choice"),
        (["--lables"], "unrecognized arguments: --lables"),
    ],
)
def test_flags_that_cannot_be_used(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_extract(["rows.jsonl", "--output_jsonl_dir=a", "--embeddings_save_dir=b", *words])
    assert said in caught.value.render()


def test_every_flag_of_the_original_and_of_its_page_is_known() -> None:
    """With the defaults of `train/src/extract_vlm_embeds.py`; the columns are what the page promises."""
    flags = parse_extract(["rows.jsonl", "--output_jsonl_dir=a", "--embeddings_save_dir=b"])
    assert (flags.model_path, flags.batch_size, flags.image_sample_size) == ("/dev/shm/Qwen-Image", 4, 512)
    assert (flags.num_workers, flags.disable_inverse, flags.t2i_mode) == (16, False, False)
    columns = ["source", "target", *(f"{way}instruction{cn}" for way in ("", "inverse_") for cn in ("", "_cn"))]
    words = [f"--{column}_field=other_{column}" for column in columns]
    named = parse_extract(["rows.jsonl", "--output_jsonl_dir=a", "--embeddings_save_dir=b", *words]).fields
    assert dataclasses.asdict(named) == {column: f"other_{column}" for column in columns}
