"""Kolors for the shared trainer, against what diffusers' pipeline and its classes gave (`tests/golden/kolors`)."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import KolorsPipeline
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Batch, Conditioning, Crop, Sample
from simpletuner.errors import MissingDependency
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource, save_model_folder
from simpletuner.models.kolors.family import Kolors
from simpletuner.models.local_check import check_local_model
from tests.tiny import GOLDEN

FOLDER = GOLDEN / "kolors"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}


def kolors(folder: Path = FOLDER / "model") -> Kolors:
    return Kolors(get_spec("kolors"), ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def family() -> Kolors:
    return kolors()


def stacked(family: Kolors, prompts: list[str]) -> dict[str, Tensor]:
    rows = [embeds.tensors for embeds in family.encode_prompts(prompts)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_tokenized_and_encoded_as_the_pipeline_does(family: Kolors, name: str) -> None:
    """Chinese and English, padded on the left, the empty one too."""
    case, golden = CASES[name], load_file(FOLDER / f"case_{name}.safetensors")
    for kind in ("prompt", "negative"):
        if f"{kind}.input_ids" not in golden:
            continue
        ids, mask = family.encoders.tokenize("tokenizer", case[kind], 256)
        assert torch.equal(ids, golden[f"{kind}.input_ids"])
        assert torch.equal(mask, golden[f"{kind}.attention_mask"])
        assert mask[:, 0].sum() == 0 < mask[:, -1].sum()
        for tensor_name, tensor in stacked(family, case[kind]).items():
            torch.testing.assert_close(tensor, golden[f"{kind}.{tensor_name}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_generates_what_diffusers_does(family: Kolors, name: str) -> None:
    """On this machine to 1e-5; the machine of the golden latents rounds some products otherwise."""
    case, golden = CASES[name], load_file(FOLDER / f"case_{name}.safetensors")
    options = {key: tuple(case[key]) for key in ("original_size", "crops_coords_top_left") if key in case}
    options |= {"height": case["height"], "width": case["width"], "num_inference_steps": case["steps"]}
    options |= {"guidance_scale": case["guidance"], "latents": golden["initial_latents"], "output_type": "latent"}
    stock = KolorsPipeline.from_pretrained(FOLDER / "model")
    stock.set_progress_bar_config(disable=True)
    theirs = stock(case["prompt"], negative_prompt=case["negative"], **options).images
    ours = family.pipeline(family.load_denoiser())(case["prompt"], case["negative"], **options).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    largest = golden["final_latents"].abs().max()
    torch.testing.assert_close(ours / largest, golden["final_latents"] / largest, rtol=0, atol=5e-5)


@pytest.mark.parametrize("level", ["low", "middle", "high"])
def test_noise_prediction_and_loss_are_those_of_the_public_classes(family: Kolors, level: str) -> None:
    golden = load_file(FOLDER / "training.safetensors")
    latents, noise, sigmas = golden["latents"], golden["noise"], golden[f"{level}.sigmas"]
    assert family.schedule.timesteps(sigmas).tolist() == golden[f"{level}.timesteps"].tolist()
    noisy = family.make_noisy(latents, noise, sigmas)
    torch.testing.assert_close(noisy, golden[f"{level}.noisy"], rtol=0, atol=1e-5)
    target = family.make_target(latents, noise, sigmas)
    assert torch.equal(target, golden[f"{level}.target"])
    names = ("prompt_embeds", "pooled_prompt_embeds", "time_ids")
    conditioning = Conditioning({name: golden[name] for name in names}, [()] * len(latents))
    with torch.no_grad():
        prediction = family.predict(family.load_denoiser(), noisy, sigmas, conditioning)
    torch.testing.assert_close(prediction, golden[f"{level}.prediction"], rtol=0, atol=2e-4)
    loss = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, golden[f"{level}.loss"], rtol=0, atol=1e-5)


def test_sizes_and_crop_are_the_time_ids_of_the_golden_case(family: Kolors) -> None:
    golden = load_file(FOLDER / "case_wide.safetensors")
    sample = Sample("set", "a.png", "", 120, 100, ("a",), Crop(90, 108, 4, 12, 64, 96))
    latents = torch.zeros(1, 4, 8, 12)
    batch = Batch(latents, family.encode_prompts(["a"]), [0], "", torch.ones(1), "", samples=[sample])
    [ids] = family.collate(batch)["time_ids"].tolist()
    assert ids == golden["unet.time_ids"][-1].tolist()


def test_an_empty_prompt_is_encoded_whatever_the_old_index_says(family: Kolors, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "model", tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    old, new = stacked(kolors(folder), [""]), stacked(family, [""])
    assert all(torch.equal(old[name], new[name]) and old[name].any() for name in new)


def test_without_sentencepiece_the_package_is_named_before_anything_is_loaded(monkeypatch: Any) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sentencepiece" else find_spec(name))
    family = kolors()
    [problem] = check_local_model(family.source, family.spec)
    assert (problem.fix, problem.key) == ("pip install sentencepiece", "pretrained_model_name_or_path")
    with pytest.raises(MissingDependency, match="pip install sentencepiece"):
        family.encode_prompts(["a cat"])


def test_a_saved_model_without_an_index_of_its_own_loads_in_diffusers(family: Kolors, tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDER / "model", tmp_path / "model")
    (folder / "model_index.json").unlink()
    source = ModelSource(str(folder))
    save_model_folder(source, family.spec, family.load_denoiser(), family.scheduler_config, tmp_path / "saved")
    pipeline = KolorsPipeline.from_pretrained(tmp_path / "saved")
    assert type(pipeline.text_encoder).__name__ == "ChatGLMModel"
