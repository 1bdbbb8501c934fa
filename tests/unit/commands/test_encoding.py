"""What check and plan say of captions before anything is encoded, against what a run then writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simpletuner.batch import PromptEmbeds
from simpletuner.commands.check import check
from simpletuner.commands.plan import make_plan
from simpletuner.commands.plan import plan as print_plan
from simpletuner.models.build import build_family
from simpletuner.models.layer_offload import repeated_layers
from simpletuner.models.text_encoders import TextEncoders
from simpletuner.training.planning.encoding import EmptyEncoders, EncodingCost, TextCost, encoder_bytes, text_cost
from simpletuner.training.planning.memory import Row
from simpletuner.training.planning.shapes import num_bytes
from simpletuner.training.prepare import read_datasets
from simpletuner.training.prompts import open_prompt_cache, prompts_folder, run_prompts
from tests.runs import dataset, load_here, train_here, write_images, write_run
from tests.tiny_z_image import tiny_z_image_folder

# Tiny Z-Image: 16 numbers of float32 a token; the template has 30 tokens here, where words are their bytes.
BYTES_A_TOKEN = 16 * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "run" / "images", 3, seed=1)
    (tmp_path / "run" / "images" / "000.txt").write_text("word " * 20)
    options = {"model_family": "z_image", "lora_type": "standard", "lycoris_config": None, "max_train_steps": 1}
    return write_run(tmp_path / "run", tiny_z_image_folder(tmp_path / "model"), [dataset("images")], **options)


@pytest.mark.slow
def test_nothing_is_loaded_or_encoded_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoders, "encoder", lambda self, name="text_encoder": pytest.fail("loaded"))
    said: list[str] = []
    check(load_here(folder), said.append, folder / "check", images=1)
    print_plan(load_here(folder), said.append, probe=False)
    found = json.loads((folder / "check" / "check.json").read_text())["captions"]
    # Three captions, the empty one, and the prompt that proves adapters.
    assert (found["texts"], found["missing"]) == (5, 5)
    family = build_family(load_here(folder).config)
    [tokens] = family.count_prompt_tokens([("word " * 20).strip()])
    assert found["bytes_each"] == tokens * BYTES_A_TOKEN
    assert found["bytes_on_disk"] == 5 * tokens * BYTES_A_TOKEN
    assert found["peak_bytes"] > found["encoder_bytes"] > 0
    assert sum("5 of 5 texts to encode, up to" in line for line in said) == 2
    assert any("before the denoiser is loaded" in line for line in said)


@pytest.mark.slow
def test_what_is_cached_is_no_more_to_come_and_no_text_takes_more_than_was_said(folder: Path) -> None:
    loaded = load_here(folder)
    family = build_family(loaded.config)
    datasets = read_datasets(loaded, family)
    before = text_cost(loaded, family, datasets)
    train_here(folder)
    after = text_cost(loaded, family, datasets)
    assert before is not None
    assert after is not None
    assert (before.num_missing, after.num_missing, after.disk_bytes) == (5, 0, 0)
    assert before.cost is not None
    cache = open_prompt_cache(loaded, family)
    entries = [cache.store.get(cache.key(each)) for each in run_prompts(loaded, family, datasets)]
    sizes = [sum(tensor.nbytes for tensor in entry.values()) for entry in entries]
    assert max(sizes) == before.cost.caption_bytes
    assert prompts_folder(loaded, family.spec) == before.folder


@pytest.mark.slow
def test_on_demand_the_encoders_are_counted_beside_the_denoiser_and_without_a_cache_no_disk(folder: Path) -> None:
    found = make_plan(load_here(folder, "--text_cache_disable=true"), probe=False)
    encoder = build_family(load_here(folder).config).encoders.encoder()
    size = sum(each.numel() * each.element_size() for each in (*encoder.parameters(), *encoder.buffers()))
    assert Row("text encoders, kept to encode on demand", size) in found.memory
    assert not any("caption" in row.name for row in found.disk)
    assert any("none of it is written" in note for note in found.notes)
    assert any("they stay in memory" in note for note in found.notes)


def test_what_cannot_be_known_from_shapes_is_said_and_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_here(folder)
    family = build_family(loaded.config)
    monkeypatch.setattr(
        EmptyEncoders, "encoder", lambda self, name="text_encoder": torch.empty(1, device="meta").item()
    )
    found = text_cost(loaded, family, read_datasets(loaded, family))
    assert found is not None
    assert (found.cost, found.disk_bytes) == (None, 0)
    assert found.lines() == ["5 of 5 texts to encode; what that takes is not known for this model before it is done"]


def test_the_disk_gets_what_is_missing_and_kept() -> None:
    """Two of five texts, 12 bytes each."""
    cost = EncodingCost([PromptEmbeds({"prompt_embeds": torch.zeros(3)})], 0, 0)
    assert TextCost(5, 2, cost, stays=False, is_kept=True, folder=Path()).disk_bytes == 2 * 12
    assert TextCost(5, 2, cost, stays=False, is_kept=False, folder=Path()).disk_bytes == 0
    assert TextCost(5, 2, None, stays=False, is_kept=True, folder=Path()).disk_bytes == 0


def test_of_encoders_that_are_offloaded_one_layer_is_on_the_device(folder: Path) -> None:
    encoder = build_family(load_here(folder).config).encoders.encoder()
    layers = [num_bytes((*layer.parameters(), *layer.buffers())) for layer in repeated_layers(encoder)]
    assert len(layers) > 1
    [whole] = encoder_bytes(build_family(load_here(folder).config), ["text_encoder"])
    [offloaded] = encoder_bytes(build_family(load_here(folder, "--text_encoder_offload=true").config), ["text_encoder"])
    assert whole - offloaded == sum(layers) - max(layers)
