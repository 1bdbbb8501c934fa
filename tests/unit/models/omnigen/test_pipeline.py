"""Generating: against the stock transformer stepped by hand, and against what diffusers expects of a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel
from PIL import Image

from simpletuner.batch import PromptImage
from simpletuner.errors import DataError
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.pipeline import DEFAULT_NEGATIVE_PROMPT, OmniGenPipeline
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_folder
from tests.unit.models.omnigen.reference import stock_row

PROMPTS = ["a cat", "a green star on a white background"]


@pytest.fixture
def family(omnigen_folder: Path) -> OmniGen:
    return OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


@pytest.fixture
def pipeline(family: OmniGen) -> OmniGenPipeline:
    return family.pipeline(family.load_denoiser(), family.load_vae())


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made_by_hand(
    family: OmniGen, folder: Path, prompt: str, negative: str, noise: torch.Tensor, steps: int, scale: float
) -> torch.Tensor:
    """Euler steps from t = 0 (noise) to t = 1 (data) with the stock model, each row alone under a dense mask."""
    stock = OmniGenTransformer2DModel.from_pretrained(folder / "transformer")
    ids, negative_ids = (embeds.tensors["input_ids"] for embeds in family.encode_prompts([prompt, negative]))
    latents = noise
    with torch.no_grad():
        for step in range(steps):
            time = torch.tensor(step / steps)
            positive, without = (stock_row(stock, latents, time, row) for row in (ids, negative_ids))
            latents = latents + (without + scale * (positive - without)) / steps
    return latents


@pytest.mark.parametrize(("negative", "scale"), [(None, 2.5), ("<cfg>", 3.0), (None, 1.0)])
def test_images_are_those_of_the_stock_model_stepped_by_hand(
    family: OmniGen, pipeline: OmniGenPipeline, omnigen_folder: Path, negative: str | None, scale: float
):
    options = {"height": 64, "width": 96, "num_inference_steps": 5, "guidance_scale": scale, "output_type": "latent"}
    generated = pipeline(PROMPTS, negative_prompt=negative, generator=generators(3, 4), **options).images
    for index, (prompt, generator) in enumerate(zip(PROMPTS, generators(3, 4), strict=True)):
        noise = torch.randn(4, 8, 12, generator=generator)
        expected = made_by_hand(
            family, omnigen_folder, prompt, negative or DEFAULT_NEGATIVE_PROMPT, noise, steps=5, scale=scale
        )
        torch.testing.assert_close(generated[index], expected, rtol=0, atol=1e-5)


def test_edits_are_those_of_the_stock_model_stepped_by_hand(
    family: OmniGen, pipeline: OmniGenPipeline, omnigen_folder: Path
):
    """diffusers' guidance with input images, every row alone: none + 1.6 (images - none) + 2.5 (all - images)."""
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (32, 53, 3), np.uint8))  # cut to 32 x 48, two columns on the left
    options = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 2.5, "output_type": "latent"}
    prompts = ["make it green", "a cat"]
    generated = pipeline(prompts, generator=generators(3, 4), references=[[source], []], **options).images

    stock = OmniGenTransformer2DModel.from_pretrained(omnigen_folder / "transformer")
    pixels = torch.from_numpy(np.asarray(source)[:, 2:50] / 127.5 - 1).permute(2, 0, 1)[None].float()
    latents = torch.randn(4, 8, 8, generator=generators(3)[0])
    with torch.no_grad():
        reference = pipeline.vae.encode(pixels).latent_dist.mean[0] * 0.13025
        tag = "<img><|image_1|></img>"
        full, alone = family.encode_prompts([f"{tag} make it green", tag], [[PromptImage(32, 48)]] * 2)
        [negative] = family.encode_prompts([DEFAULT_NEGATIVE_PROMPT])
        for step in range(3):
            time = torch.tensor(step / 3)
            spans = [[tuple(span[:2]) for span in row.tensors["reference_spans"].tolist()] for row in (full, alone)]
            everything = stock_row(stock, latents, time, full.tensors["input_ids"], [reference], spans[0])
            images = stock_row(stock, latents, time, alone.tensors["input_ids"], [reference], spans[1])
            nothing = stock_row(stock, latents, time, negative.tensors["input_ids"])
            latents = latents + (nothing + 1.6 * (images - nothing) + 2.5 * (everything - images)) / 3
    torch.testing.assert_close(generated[0], latents, rtol=0, atol=1e-5)
    # A prompt without input images is generated as in a batch where nobody has any.
    plain = pipeline("a cat", generator=generators(4), **options).images
    torch.testing.assert_close(generated[1], plain[0], rtol=0, atol=1e-5)


def test_the_default_negative_prompt_is_the_one_of_the_public_processor():
    import inspect

    from diffusers.pipelines.omnigen.processor_omnigen import OmniGenMultiModalProcessor

    parameters = inspect.signature(OmniGenMultiModalProcessor.__call__).parameters
    assert parameters["negative_prompt"].default == DEFAULT_NEGATIVE_PROMPT


def test_images_are_pil_of_the_asked_size_and_the_same_again(pipeline: OmniGenPipeline):
    options = {"height": 64, "width": 96, "num_inference_steps": 2}
    one, again = (pipeline(PROMPTS, generator=generators(1, 2), **options).images for _ in range(2))
    alone = pipeline(PROMPTS[1], generator=generators(2), **options).images
    assert [image.size for image in one] == [(96, 64), (96, 64)]
    assert [image.tobytes() for image in one] == [image.tobytes() for image in again]
    difference = [abs(a - b) for a, b in zip(alone[0].tobytes(), one[1].tobytes(), strict=True)]
    assert max(difference) <= 1


def test_the_negative_prompt_matters(pipeline: OmniGenPipeline):
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    one = pipeline("a cat", negative_prompt="<cfg>", generator=generators(1), **options).images
    two = pipeline("a cat", negative_prompt=["blurry"], generator=generators(1), **options).images
    assert (one - two).abs().max() > 1e-3


def test_a_callback_sees_each_step_and_may_change_the_latents(pipeline: OmniGenPipeline):
    seen = []

    def blank(pipe: OmniGenPipeline, step: int, timestep: torch.Tensor, values: dict) -> dict:
        seen.append((step, round(float(timestep), 6), pipe is pipeline))
        return {"latents": torch.zeros_like(values["latents"])}

    generated = pipeline(
        "a cat", height=64, width=64, num_inference_steps=4, output_type="latent", callback_on_step_end=blank
    )
    assert seen == [(0, 0.0, True), (1, 0.25, True), (2, 0.5, True), (3, 0.75, True)]
    assert generated.images.abs().max() == 0


def test_generation_leaves_the_training_denoiser_as_it_was(family: OmniGen):
    denoiser = family.load_denoiser().train()
    denoiser.norm_out.eval()
    denoiser.enable_gradient_checkpointing()
    before = {name: module.training for name, module in denoiser.named_modules()}
    weights = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
    modes = []
    denoiser.layers[0].register_forward_hook(lambda *_: modes.append((denoiser.training, torch.is_grad_enabled())))
    family.pipeline(denoiser)("a cat", height=64, width=64, num_inference_steps=2, output_type="latent")
    assert set(modes) == {(False, False)}
    assert {name: module.training for name, module in denoiser.named_modules()} == before
    assert all(torch.equal(weight, weights[name]) for name, weight in denoiser.state_dict().items())
    assert denoiser.is_gradient_checkpointing


def test_a_bfloat16_denoiser_draws_nearly_the_same_and_keeps_float32_latents(omnigen_folder: Path):
    generated = {}
    for dtype in (torch.float32, torch.bfloat16):
        family = OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), dtype)
        options = {"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"}
        generated[dtype] = family.pipeline(family.load_denoiser())(
            PROMPTS, generator=generators(1, 2), **options
        ).images
    assert generated[torch.bfloat16].dtype == torch.float32
    torch.testing.assert_close(generated[torch.bfloat16], generated[torch.float32], rtol=0, atol=0.1)
    assert generated[torch.float32].std() > 0.5


def test_the_text_runs_once_for_an_image(family: OmniGen):
    denoiser = family.load_denoiser()
    lengths = []
    denoiser.layers[0].register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    family.pipeline(denoiser)("a cat", height=64, width=64, num_inference_steps=3, output_type="latent")
    num_text = max(len(e.tensors["input_ids"]) for e in family.encode_prompts(["a cat", DEFAULT_NEGATIVE_PROMPT]))
    assert lengths == [num_text, 17, 17, 17]


@pytest.mark.parametrize("size", [{"height": 72}, {"width": 100}])
def test_sizes_that_do_not_fit_the_patches_are_refused(pipeline: OmniGenPipeline, size: dict[str, int]):
    with pytest.raises(ValueError, match="multiples of 16"):
        pipeline("a cat", num_inference_steps=1, **{"height": 64, "width": 64, **size})


def test_images_without_a_vae_are_refused(family: OmniGen):
    with pytest.raises(ValueError, match="no VAE"):
        family.pipeline(family.load_denoiser())("a cat", height=64, width=64, num_inference_steps=1)


def test_a_scheduler_that_counts_the_other_way_is_refused(tmp_path: Path):
    folder = tiny_omnigen_folder(tmp_path)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invert_sigmas": False}))
    family = OmniGen(OMNIGEN, ModelSource(str(folder)), torch.device("cpu"), torch.float32)
    with pytest.raises(DataError, match="invert_sigmas"):
        family.pipeline(family.load_denoiser())


def test_a_saved_pipeline_is_the_public_class_with_all_parts(
    pipeline: OmniGenPipeline, omnigen_folder: Path, tmp_path: Path
):
    import diffusers
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    assert set(pipeline.components) == {"transformer", "scheduler", "vae", "tokenizer"}
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "OmniGenPipeline"
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    assert parts["transformer"] == ["diffusers", "OmniGenTransformer2DModel"]
    assert parts["vae"] == ["diffusers", "AutoencoderKL"]
    assert parts["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert parts["tokenizer"][0] == "transformers"
    transformer = diffusers.OmniGenTransformer2DModel.from_pretrained(tmp_path / "transformer")
    saved = load_file(omnigen_folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(weight, saved[name]) for name, weight in transformer.state_dict().items())
    ids = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("a cat").input_ids
    assert ids == AutoTokenizer.from_pretrained(omnigen_folder / "tokenizer")("a cat").input_ids
