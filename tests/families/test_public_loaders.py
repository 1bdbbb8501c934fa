"""A LoRA of a family, in each form that diffusers reads, gives diffusers' stock pipeline the trainer's own image."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from simpletuner.adapters.lora import LoraAdapter, LoraSettings, attach_lora
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments
from simpletuner.models.patches import unpack
from simpletuner.validation.generate import apply_adapter_file
from tests.tiny_folders import TINY_FOLDERS

PROMPT = "a cat"
SIDE = 64
# Family -> the forms that its stock pipeline reads.
READ_BY_DIFFUSERS = {
    "flux": ("diffusers", "kohya"),
    "kolors": ("diffusers", "kohya"),
    "flux2": ("diffusers", "kohya", "comfyui"),
    "sd15": ("diffusers", "kohya"),
    "krea2": ("diffusers", "comfyui"),
    "sana": ("diffusers",),
    "auraflow": ("diffusers",),
    "lumina2": ("diffusers",),  # of the release also ComfyUI's form, which diffusers knows by the sizes of its matrices
    "sd3": ("diffusers",),
    "sdxl": ("diffusers", "kohya"),
    "qwen_image": ("diffusers", "kohya", "comfyui"),
    "z_image": ("diffusers", "kohya", "comfyui"),
}
# What a stock pipeline is called with, where it is not `guidance_scale` alone.
GUIDANCE = {
    "qwen_image": {"true_cfg_scale": 3.0, "negative_prompt": " "},
    "sana": {"guidance_scale": 3.0, "use_resolution_binning": False},
}
# diffusers takes the joined matrix of FLUX.1's single blocks for one of 3072 rows a part; its own tests look at it.
TARGETS = {("flux", "kohya"): ("transformer_blocks.*.attn.*to_?", "transformer_blocks.*.ff.net.*", "*.0.proj_out")}


def randomized(adapter: LoraAdapter) -> LoraAdapter:
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize("name", READ_BY_DIFFUSERS)
def test_the_stock_pipeline_generates_the_trainers_own_image(tmp_path: Path, name: str, file_format: str):
    spec = get_spec(name)
    folder = TINY_FOLDERS[name](tmp_path / "model")
    family = get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent"}

    def generated(pipeline: object, **guidance: object) -> torch.Tensor:
        guidance = guidance or {"guidance_scale": 3.0}
        return pipeline(prompt=PROMPT, generator=torch.Generator().manual_seed(1), **guidance, **options).images

    denoiser = family.load_denoiser()
    before = generated(family.pipeline(denoiser))
    targets = TARGETS.get((name, file_format), ("attention", "feed-forward"))
    settings = LoraSettings(rank=2, alpha=3, targets=targets, file_format=file_format)
    adapter = randomized(attach_lora(denoiser, settings, spec, torch.float32, seed=0))
    ours = generated(family.pipeline(denoiser))
    assert (ours - before).abs().max() > 1e-2
    path = tmp_path / "lora.safetensors"
    adapter.save(path, {})

    again = family.load_denoiser()
    apply_adapter_file(again, path, spec)
    torch.testing.assert_close(generated(family.pipeline(again)), ours, rtol=0, atol=1e-4)
    if file_format not in READ_BY_DIFFUSERS[name]:
        return
    stock = getattr(diffusers, json.loads((folder / "model_index.json").read_text())["_class_name"])
    pipeline = stock.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    theirs = generated(pipeline, **GUIDANCE.get(name, {}))
    if theirs.ndim == 3:
        theirs = unpack(theirs, *ours.shape[-2:])
    if theirs.shape != ours.shape:  # FLUX.2 gives them unscaled and out of their patches
        [moments] = [LatentMoments(torch.nn.functional.pixel_unshuffle(row, 2)) for row in theirs]
        theirs = family.latents_from_moments(moments, torch.Generator(), family.vae_config)[None]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
