"""Embeddings from files take the place of the encoders: the same bits, and nothing is encoded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.errors import DataError
from simpletuner.models.build import build_family
from tests.end_to_end.test_prompt_cache import COUNT, Encoded
from tests.end_to_end.test_prompt_cache import model as model  # a fixture
from tests.runs import dataset, load_here, train_here, write_images, write_run

ADAPTER = "pytorch_lora_weights.safetensors"
DROPPED = "dropped.safetensors"


def write(folder: Path, model: Path, **options) -> Path:
    """A run whose images have two captions each in a table, and the files of their embeddings beside the table."""
    images = write_images(folder / "images", COUNT, seed=1)
    entry = dataset("images", caption_strategy="csv", repeats=3)
    run = write_run(
        folder, model, [entry], model_family="auraflow", max_train_steps=4, caption_dropout_probability=0.4, **options
    )
    family = build_family(load_here(with_table(run)).config)
    for index in range(COUNT):
        for caption, name in zip(captions(index), files(index), strict=True):
            save_file(dict(family.encode_prompts([caption])[0].tensors), images / name)
    save_file(dict(family.encode_prompts([""])[0].tensors), images / DROPPED)
    return run


def captions(index: int) -> list[str]:
    return [f"box {index}", f"a drawing of box {index}"]


def files(index: int) -> list[str]:
    return [f"{index}_{place}.safetensors" for place in range(2)]


def with_table(run: Path, **changes) -> Path:
    rows = [
        {"file_name": f"{index:03d}.png", "text": captions(index), "embeds": files(index), "dropped": DROPPED} | changes
        for index in range(COUNT)
    ]
    (run / "images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def with_files(run: Path, **keys) -> Path:
    path = run / "multidatabackend.json"
    [entry] = json.loads(path.read_text())
    columns = {"prompt_embeds_column": "embeds", "dropped_prompt_embeds_column": "dropped"}
    path.write_text(json.dumps([entry | columns | keys]))
    return run


@pytest.fixture
def run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write(tmp_path / "run", model)


@pytest.mark.slow
def test_files_give_the_bits_of_the_encoders_and_no_caption_is_encoded(run: Path, monkeypatch) -> None:
    """Text encoders pad to one length and batches of eight differ in the last bits, so the losses are compared."""
    encoded = Encoded(monkeypatch)
    on_demand = load_file(train_here(run, "--output_dir=encoded", "--cache_dir=cache-encoded") / ADAPTER)
    assert len(encoded.prompts) == 2 * COUNT + 2
    encoded.prompts.clear()
    from_files = load_file(train_here(with_files(run)) / ADAPTER)
    assert encoded.prompts == ["", "a probe of the adapter"]
    assert on_demand.keys() == from_files.keys()
    for name, tensor in on_demand.items():
        torch.testing.assert_close(from_files[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_each_file_reaches_the_caption_that_it_belongs_to(run: Path, monkeypatch) -> None:
    """Every file holds its own number; the batch must have the number of the caption that it reports."""
    numbers = {caption: 2.0 * index + place for index in range(COUNT) for place, caption in enumerate(captions(index))}
    for index in range(COUNT):
        for caption, name in zip(captions(index), files(index), strict=True):
            path = run / "images" / name
            save_file({"prompt_embeds": torch.full_like(load_file(path)["prompt_embeds"], numbers[caption])}, path)
    save_file(
        {"prompt_embeds": torch.full((3, load_file(path)["prompt_embeds"].shape[1]), -1.0)}, run / "images" / DROPPED
    )
    seen: list[tuple[str, float]] = []
    from simpletuner.training.batches import BatchSource

    build = BatchSource.build_batch

    def note(source, *arguments):
        batch = build(source, *arguments)
        values = [float(each.tensors["prompt_embeds"].unique()) for each in batch.prompt_embeds]
        seen.extend(zip(batch.captions, values, strict=True))
        return batch

    monkeypatch.setattr(BatchSource, "build_batch", note)
    train_here(with_files(run), "--max_train_steps=12")
    assert {value for _, value in seen} > {-1.0, 0.0, 1.0}
    assert all(value == numbers.get(caption, -1.0) for caption, value in seen)


def test_full_training_from_files_alone_loads_no_encoder(run: Path, monkeypatch) -> None:
    encoded = Encoded(monkeypatch)
    config = json.loads((run / "config.json").read_text())
    del config["lycoris_config"]
    (run / "config.json").write_text(json.dumps(config | {"model_type": "full", "learning_rate": 1e-4}))
    train_here(with_files(run), "--max_train_steps=1")
    assert encoded.prompts == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embeds": ["gone.safetensors", "0_1.safetensors"]}, "are not there: .*gone.safetensors"),
        ({"embeds": ["0_0.pt", "0_1.pt"]}, r"simpletuner convert .*/images"),
        ({"embeds": ["0_0.safetensors"]}, "2 captions and 1 files"),
    ],
)
def test_files_that_cannot_be_used_are_found_before_training(run: Path, change, words: str) -> None:
    with pytest.raises(DataError) as caught:
        train_here(with_files(with_table(run, **change)))
    assert re.search(words, caught.value.render())
    assert not (run / "cache/vae").exists()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}, "holds a, b"),
        ({"prompt_embeds": torch.full((2, 4), torch.nan)}, "is not finite"),
        ({"prompt_embeds": torch.zeros(2, 4, dtype=torch.int32)}, "2 x 4 tensor of torch.int32"),
        ({"prompt_embeds": torch.zeros(1, 2, 4)}, "1 x 2 x 4 tensor"),
    ],
)
def test_what_a_file_holds_is_looked_at(tmp_path: Path, tensors, words: str) -> None:
    from simpletuner.data.prompt_files import PromptFiles

    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=re.escape(words)):
        PromptFiles(None, None, ("prompt_embeds",), "images").read(tmp_path / "x.safetensors")  # type: ignore[arg-type]


def test_a_single_tensor_needs_no_name(tmp_path: Path) -> None:
    from simpletuner.data.prompt_files import PromptFiles

    save_file({"tensor": torch.ones(2, 4)}, tmp_path / "x.safetensors")
    files = PromptFiles(None, None, ("prompt_embeds",), "images")  # type: ignore[arg-type]
    assert files.read(tmp_path / "x.safetensors").tensors["prompt_embeds"].shape == (2, 4)
