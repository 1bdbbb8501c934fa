"""SDXL for the shared trainer, against diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from simpletuner.batch import Batch, Crop, Sample
from simpletuner.cache.prompts import PromptsAhead
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.sdxl.family import SDXL
from simpletuner.models.size_conditioned_unet import time_ids
from tests.tiny_sdxl import tiny_sdxl_folder, tiny_unet

CPU = torch.device("cpu")
PROMPTS = ["a cat", "A green star, on white!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("sdxl"))


def family_of(folder: Path) -> SDXL:
    spec = get_spec("sdxl")
    return get_family_class(spec)(spec, ModelSource(str(folder)), CPU, torch.float32)


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_of(family: SDXL, latents: Tensor, prompts: list[str], samples: list[Sample] = []) -> Batch:  # noqa: B006
    return Batch(
        latents, family.encode_prompts(prompts), range(len(latents)), "", torch.ones(len(latents)), "", samples=samples
    )


def test_prompts_are_encoded_as_the_pipeline_does(folder, stock):
    embeds, empty, pooled, empty_pooled = stock.encode_prompt(PROMPTS)
    ours = family_of(folder).encode_prompts([*PROMPTS, ""])
    for row, expected, pool in zip(ours, embeds, pooled, strict=False):
        assert torch.equal(row.tensors["prompt_embeds"], expected)
        assert torch.equal(row.tensors["pooled_prompt_embeds"], pool)
    assert torch.equal(ours[2].tensors["prompt_embeds"], empty[0])
    assert torch.equal(ours[2].tensors["pooled_prompt_embeds"], empty_pooled[0])


def test_a_model_that_does_not_zero_empty_prompts_is_believed(folder, stock, tmp_path):
    import json
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"force_zeros_for_empty_prompt": False}))
    [empty] = family_of(other).encode_prompts([""])
    expected, *_ = stock.encode_prompt([""])
    assert torch.equal(empty.tensors["prompt_embeds"], expected[0])
    assert family_of(other).prompt_facts() != family_of(folder).prompt_facts()


def test_an_empty_negative_prompt_is_encoded_and_only_a_missing_one_is_zeros(folder, stock):
    """diffusers: zeros where no negative prompt is given, the encoders' answer to an empty text where one is."""
    family = family_of(folder)
    family.prompts = PromptsAhead(family, ["a cat", "", " "])
    pipeline = family.pipeline(tiny_unet())
    for negative in (None, ""):
        _, expected, _, expected_pooled = stock.encode_prompt("a cat", negative_prompt=negative)
        ours = pipeline.prompt_arguments(["a cat"], None if negative is None else [negative], 5.0)
        torch.testing.assert_close(ours["negative_prompt_embeds"], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours["negative_pooled_prompt_embeds"], expected_pooled, rtol=0, atol=1e-5)
        assert bool(expected.any()) == (negative is not None)


def test_predict_is_the_call_that_the_pipeline_makes(folder, stock):
    calls: list[tuple[tuple[Tensor, ...], dict[str, Tensor], Tensor]] = []

    def note(module, args, kwargs, output):
        calls.append((args, kwargs, output[0]))

    hook = stock.unet.register_forward_hook(note, with_kwargs=True)
    try:
        stock(
            PROMPTS, height=64, width=96, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    finally:
        hook.remove()
    family = family_of(folder)
    denoiser = family.load_denoiser()
    for (sample, timestep), _, output in calls:
        conditioning = family.collate(batch_of(family, sample, PROMPTS))
        with torch.no_grad():
            ours = family.predict(denoiser, sample, (timestep.reshape(1) + 1) / 1000, conditioning)
        torch.testing.assert_close(ours, output, rtol=0, atol=1e-6)
    assert len(calls) == 3


SAMPLE = Sample("set", "a.png", "", 800, 600, ("a",), Crop(64, 86, 0, 10, 64, 64))


def test_sizes_and_crop_reach_the_denoiser(folder):
    assert time_ids(SAMPLE) == (600, 800, 0, 10, 64, 64)
    # Cut 10 from the left of 86 leaves 12 on the right, which is the left of the mirror image.
    assert time_ids(dataclasses.replace(SAMPLE, is_flipped=True)) == (600, 800, 0, 12, 64, 64)
    family = family_of(folder)
    latents = torch.randn(1, 4, 8, 8)
    assert family.collate(batch_of(family, latents, PROMPTS[:1], [SAMPLE]))["time_ids"].tolist() == [
        [600, 800, 0, 10, 64, 64]
    ]
    denoiser, sigma = family.load_denoiser(), torch.tensor([0.5])
    with torch.no_grad():
        whole = family.predict(denoiser, latents, sigma, family.collate(batch_of(family, latents, PROMPTS[:1])))
        cut = family.predict(denoiser, latents, sigma, family.collate(batch_of(family, latents, PROMPTS[:1], [SAMPLE])))
    assert (whole - cut).abs().max() > 1e-5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_target_is_what_the_models_scheduler_says(tmp_path, kind):
    family = family_of(tiny_sdxl_folder(tmp_path / "model", prediction_type=kind, rescale_betas_zero_snr=True))
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    theirs = DDPMScheduler.from_config(family.scheduler_config)
    expected = noise if kind == "epsilon" else theirs.get_velocity(latents, noise, torch.tensor([300]))
    torch.testing.assert_close(family.make_target(latents, noise, torch.tensor([0.301])), expected, rtol=0, atol=1e-4)


def test_the_key_table_is_that_of_diffusers_conversion():
    """Named by the table and converted by diffusers, every weight of the UNet comes back under its own name."""
    unet = tiny_unet()
    keys = get_spec("sdxl").keys
    original = {}
    for name, tensor in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        original[f"model.diffusion_model.{keys.original(module).name}.{kind}"] = tensor
    assert len(original) == len(unet.state_dict())
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted.keys() == unet.state_dict().keys()
    assert all(converted[name].data_ptr() == tensor.data_ptr() for name, tensor in unet.state_dict().items())


def by_hand(family: SDXL, chunks: list[str]) -> tuple[Tensor, Tensor]:
    """(77, D) states of each chunk as the pipeline encodes a prompt, one behind the other, and all pooled vectors."""
    states, pooled = [], []
    for name in ("", "_2"):
        tokenizer, encoder = (
            family.encoders.tokenizer(f"tokenizer{name}"),
            family.encoders.encoder(f"text_encoder{name}"),
        )
        ids = tokenizer(chunks, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled


def test_a_prompt_of_several_chunks_is_their_states_one_behind_the_other(folder):
    """Each between a begin and an end, of which the first begin and the last end stay; pooled is the first chunk."""
    family = family_of(folder)
    first, second = " ".join("a" * 75), " ".join("b" * 9)  # the tiny tokenizer has a token for each letter
    family.prompt_length = 227
    [row] = family.encode_prompts([f"{first} {second}"])
    states, pooled = by_hand(family, [first, second, ""])
    expected = torch.cat([states[0, :1], *(chunk[1:-1] for chunk in states), states[2, -1:]])
    assert expected.shape[0] == 3 * 75 + 2
    torch.testing.assert_close(row.tensors["prompt_embeds"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(row.tensors["pooled_prompt_embeds"], pooled[0], rtol=0, atol=1e-5)
    assert family.num_cut_prompts == 0
    assert family.prompt_facts() != family_of(folder).prompt_facts()


def test_a_prompt_of_two_chunks_reaches_the_denoiser_whole_in_training_and_in_images(folder):
    family = family_of(folder)
    family.prompt_length = 152
    denoiser, latents, sigma = family.load_denoiser(), torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    answers, images = [], []
    for end in ("cat", "dog"):  # beyond the 77 tokens
        prompt = "z" * 80 + end
        with torch.no_grad():
            conditioning = family.collate(batch_of(family, latents, [prompt]))
            answers.append(family.predict(denoiser, latents, sigma, conditioning))
            options = {"num_inference_steps": 1, "output_type": "latent", "latents": latents, "guidance_scale": 3.0}
            images.append(family.pipeline(denoiser)(prompt, "a short negative", height=64, width=64, **options).images)
    assert (answers[0] - answers[1]).abs().max() > 1e-5
    assert (images[0] - images[1]).abs().max() > 1e-5


@pytest.mark.parametrize("is_forced", [True, False])
def test_the_option_decides_whether_an_empty_prompt_is_zeros(folder, is_forced):
    family = family_of(folder)
    family.force_zeros_for_empty_prompt = is_forced
    [empty] = family.encode_prompts([""])
    states, pooled = by_hand(family, [""])
    expected = torch.zeros_like(states[0]) if is_forced else states[0]
    torch.testing.assert_close(empty.tensors["prompt_embeds"], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(empty.tensors["pooled_prompt_embeds"], pooled[0] * (not is_forced), rtol=0, atol=1e-5)
    given = family.pipeline(family.load_denoiser()).prompt_arguments(["a cat"], None, 5.0)
    torch.testing.assert_close(given["negative_prompt_embeds"][0], expected, rtol=0, atol=1e-5)


def test_a_model_with_a_scheduler_of_edm_is_refused(tmp_path):
    """Its configuration holds no betas; those of diffusers' defaults would train it to pieces."""
    import json

    folder = tiny_sdxl_folder(tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_max": 80.0}))
    with pytest.raises(ConfigError, match="noise levels of EDM"):
        family_of(folder).sigmas_at(torch.tensor([0.5]), torch.zeros(1, 4, 8, 8))


def test_a_model_without_data_at_its_last_level_has_the_public_numbers(tmp_path):
    """Euler with trailing steps, as diffusers computes it: levels, their sigmas, and the scale of the first noise."""
    model = tiny_sdxl_folder(
        *(tmp_path / "model",), prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    family = family_of(model)
    signal, _ = family.signal_and_noise(torch.tensor([0.001, 0.5, 0.999, 1.0]))
    expected = torch.tensor([0.99915, 0.242359, 1.968e-7, 0.0])
    torch.testing.assert_close(signal.square(), expected, rtol=1e-3, atol=1e-9)
    scheduler = family.pipeline(tiny_unet()).scheduler
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.sigmas.tolist() == pytest.approx([4096, 5.3987, 1.7681, 0.72706, 0], rel=1e-4)
    assert float(scheduler.init_noise_sigma) == pytest.approx(4096, rel=1e-3)
