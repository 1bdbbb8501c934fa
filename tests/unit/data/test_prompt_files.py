"""Files of embeddings that stand for captions: which belong to an image, which is taken, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.batch import Crop, Sample
from simpletuner.config.datasets import ImageDataset
from simpletuner.data.datasets import prompt_files
from simpletuner.data.prompt_files import PromptFileRow, PromptFiles
from simpletuner.errors import DataError, Problem
from simpletuner.models.sdxl.spec import SDXL
from simpletuner.randomness import keyed_seed


class Named:
    """What a table says: files of each image in one text."""

    def __init__(self, folder: Path, files: dict[str, str], digest: str = "digest"):
        self.table, self.digest, self._files = folder / "rows.csv", digest, files

    def take(self, paths):
        return [self._files.get(path) for path in paths]


def sample(name: str, *captions: str) -> Sample:
    return Sample("d", name, f"digest of {name}", 8, 8, captions, Crop(8, 8, 0, 0, 8, 8))


def files_of(folder: Path, named: dict[str, str], dropped: dict[str, str] | None = None) -> PromptFiles:
    second = Named(folder, dropped, "other") if dropped is not None else None
    return PromptFiles(Named(folder, named), second, ("embeds", "pooled"), "things")


def test_each_caption_has_its_file_beside_the_table_and_its_draw_is_that_of_the_caption(tmp_path: Path) -> None:
    files = files_of(tmp_path, {"a.png": "x.safetensors\x1e/y.safetensors"}, {"a.png": "d.safetensors"})
    pair, single = sample("a.png", "one", "two"), sample("b.png")
    assert files.take([pair, single]) == [
        PromptFileRow((tmp_path / "x.safetensors", Path("/y.safetensors")), tmp_path / "d.safetensors"),
        PromptFileRow((), None),
    ]
    assert (files.has_dropped, files.fingerprint) == (True, ["digest", "other"])
    plain = files_of(tmp_path, {"a.png": "x.safetensors\x1e/y.safetensors"})
    assert (plain.has_dropped, plain.fingerprint, plain.take([pair])[0].dropped) == (False, ["digest"], None)
    with pytest.raises(DataError) as caught:
        files.take([sample("a.png", "one")])
    message = "a.png has 1 captions and 2 files of embeddings"
    assert caught.value.problems == [Problem(message, "things.prompt_embeds_column", str(tmp_path / "rows.csv"))]
    read = []
    reading = SimpleNamespace(read=lambda file: read.append(file.name))
    [row] = plain.take([pair])
    for step in range(6):
        PromptFiles.embeds(reading, row, pair, 1, step, 0)
    names = ("x.safetensors", "y.safetensors")
    assert read == [names[keyed_seed(1, step, 0, "caption", pair.digest) % 2] for step in range(6)]


def test_files_that_are_missing_or_pickles_are_listed_before_anything_is_loaded(tmp_path: Path) -> None:
    named = {f"{number:02d}.png": f"{number:02d}.safetensors" for number in range(12)}
    for number in range(12):
        named[f"p{number:02d}.png"] = f"p{number:02d}.pt"
    files = files_of(tmp_path, named, {"00.png": "d.safetensors"})
    (tmp_path / "00.safetensors").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        files.require_files([sample(name, "one") for name in named])
    missing = ["d", *(f"{number:02d}" for number in range(1, 10))]
    shown = ", ".join(str(tmp_path / f"{name}.safetensors") for name in missing)
    pickles = ", ".join(str(tmp_path / f"p{number:02d}.pt") for number in range(10))
    place = ("things.prompt_embeds_column", str(tmp_path / "rows.csv"))
    assert caught.value.problems == [
        Problem(
            f"12 files of embeddings are not there: {shown}, ...", *place, fix="make them again, or correct the table"
        ),
        Problem(
            f"12 files of embeddings are no .safetensors files: {pickles}, ...",
            *place,
            fix=f"turn them into .safetensors: simpletuner convert {tmp_path}; then name those in the table",
        ),
    ]
    files_of(tmp_path, {"a.png": "00.safetensors"}).require_files([sample("a.png", "one")])


@pytest.mark.parametrize(
    ("tensors", "message", "allowed"),
    [
        ({"embeds": torch.ones(2, 3)}, "holds embeds", "tensors with the names embeds, pooled"),
        ({"embeds": torch.ones(2, 3), "x": torch.ones(3)}, "holds embeds, x", "tensors with the names embeds, pooled"),
        (
            {"embeds": torch.ones(1, 2, 3), "pooled": torch.ones(3)},
            "embeds is a 1 x 2 x 3 tensor of torch.float32",
            "tokens x features, floats",
        ),
        (
            {"embeds": torch.ones(2, 3), "pooled": torch.ones(3, dtype=torch.int64)},
            "pooled is a 3 tensor of torch.int64",
            "tokens x features, floats",
        ),
        (
            {"embeds": torch.ones(2, 3), "pooled": torch.tensor(1.0)},
            "pooled is a single number tensor of torch.float32",
            "tokens x features, floats",
        ),
        ({"embeds": torch.full((2, 3), torch.nan), "pooled": torch.ones(3)}, "embeds is not finite", None),
        ({"embeds": torch.ones(2, 3), "pooled": torch.tensor([1.0, torch.inf])}, "pooled is not finite", None),
    ],
)
def test_a_file_that_is_not_what_the_family_has_for_a_prompt_is_named(tmp_path, tensors, message, allowed) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(DataError) as caught:
        files_of(tmp_path, {}).read(path)
    [problem] = caught.value.problems
    assert (problem.key, problem.file) == ("things.prompt_embeds_column", str(path))
    assert (problem.message, problem.allowed, problem.fix) == (message, allowed, "make the file again")


def test_what_a_file_holds_is_given_and_a_single_tensor_may_have_any_name(tmp_path: Path) -> None:
    save_file({"embeds": torch.eye(2), "pooled": torch.arange(3.0)}, tmp_path / "a.safetensors")
    found = files_of(tmp_path, {}).read(tmp_path / "a.safetensors").tensors
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        **{"embeds": [[1.0, 0.0], [0.0, 1.0]], "pooled": [0.0, 1.0, 2.0]}
    }
    save_file({"any": torch.eye(2)}, tmp_path / "b.safetensors")
    one = PromptFiles(Named(tmp_path, {}), None, ("embeds",), "things")
    assert list(one.read(tmp_path / "b.safetensors").tensors) == ["embeds"]
    (tmp_path / "c.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot be read"):
        one.read(tmp_path / "c.safetensors")


def test_the_columns_of_an_entry_name_the_files(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("file_name,text,e,d\na.png,one,x.safetensors,y.safetensors\n")
    keys = {"instance_data_dir": tmp_path, "caption_strategy": "csv"}
    entry = ImageDataset(id="things", **keys, prompt_embeds_column="e", dropped_prompt_embeds_column="d")
    files = prompt_files(entry, SDXL, tmp_path / "work", "data.json")
    assert files.take([sample("a.png", "one")]) == [
        PromptFileRow((tmp_path / "x.safetensors",), tmp_path / "y.safetensors")
    ]
    assert files._names == SDXL.prompt_tensors
    for changed, key in (({"prompt_embeds_column": "gone"}, "prompt_embeds_column"), (
        {"prompt_embeds_column": "e", "dropped_prompt_embeds_column": "gone"}, "dropped_prompt_embeds_column"
    )):  # fmt: skip
        with pytest.raises(DataError) as caught:
            prompt_files(ImageDataset(id="things", **keys, **changed), SDXL, tmp_path / "work", "data.json")
        [problem] = caught.value.problems
        assert (problem.key, problem.file) == (f"things.{key}", "data.json")
        assert problem.message == f"{tmp_path / 'metadata.csv'} has no column gone"
        assert problem.allowed == "one of its columns: file_name, text, e, d"
    assert prompt_files(ImageDataset(id="things", **keys), SDXL, tmp_path / "work", None) is None
