"""Stable Diffusion 1.5 and 2.1 for the shared trainer, against golden cases of diffusers' pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.diffusion.loss import sample_means
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments
from simpletuner.models.sd15.family import SD15
from simpletuner.training.losses.l2 import squared_error
from tests.single_files import write_sd15_file
from tests.tiny_sd15 import SD15_GOLDEN, tiny_sd15_folder, tiny_sd15_unet

CPU = torch.device("cpu")
VERSIONS = ("v1_5", "v2_1")


def family_of(version: str) -> SD15:
    spec = get_spec("sd15")
    return get_family_class(spec)(spec, ModelSource(str(SD15_GOLDEN / version / "model")), CPU, torch.float32)


def case_of(version: str, name: str) -> dict[str, Any]:
    cases = json.loads((SD15_GOLDEN / version / "cases.json").read_text())
    return next(case for case in cases if case["name"] == name)


def golden(version: str, name: str) -> dict[str, Tensor]:
    return load_file(SD15_GOLDEN / version / f"{name}.safetensors")


def batch_of(latents: Tensor, embeds: Tensor) -> Batch:
    rows = [PromptEmbeds({"prompt_embeds": row}) for row in embeds]
    return Batch(latents, rows, range(len(latents)), "", torch.ones(len(latents)), "")


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("version", VERSIONS)
def test_predict_is_the_call_that_the_pipeline_makes(version: str) -> None:
    family, recorded = family_of(version), golden(version, "case_guided")
    denoiser = family.load_denoiser()
    for number, call in enumerate(case_of(version, "guided")["calls"]):
        sample, embeds = recorded[f"call.{number}.sample"], recorded[f"call.{number}.prompt_embeds"]
        sigmas = (recorded[f"call.{number}.timestep"] + 1) / 1000
        assert family.schedule.timesteps(sigmas).tolist() == [call["timestep"]] * call["rows"]
        with torch.no_grad():
            ours = family.predict(denoiser, sample, sigmas, family.collate(batch_of(sample, embeds)))
        assert_near(ours, recorded[f"call.{number}.output"])


@pytest.mark.parametrize("version", VERSIONS)
def test_prompts_are_tokenized_and_encoded_as_the_pipeline_does(version: str) -> None:
    family, case, recorded = family_of(version), case_of(version, "guided"), golden(version, "case_guided")
    for layout in json.loads((SD15_GOLDEN / version / "token_layouts.json").read_text()):
        ids, _ = family.encoders.tokenize("tokenizer", [layout["prompt"]], 77)
        assert ids[0].tolist() == layout["ids"]
    rows = family.encode_prompts([*case["negative_prompts"], *case["prompts"]])  # negatives come first
    for row, expected in zip(rows, recorded["call.0.prompt_embeds"], strict=True):
        assert_near(row.tensors["prompt_embeds"], expected)


def test_clip_skip_is_an_earlier_layer_after_the_final_norm() -> None:
    family, case, recorded = family_of("v1_5"), case_of("v1_5", "clip_skip"), golden("v1_5", "case_clip_skip")
    facts = family.prompt_facts()
    family.clip_skip = 2
    assert family.prompt_facts() != facts
    rows = family.encode_prompts([*case["negative_prompts"], *case["prompts"]])
    for row, expected in zip(rows, recorded["call.0.prompt_embeds"], strict=True):
        assert_near(row.tensors["prompt_embeds"], expected)


def test_a_prompt_of_two_chunks_is_their_states_one_behind_the_other() -> None:
    family = family_of("v1_5")
    words = ["a", "red", "fox", "in", "the", "snow,", "wide", "photo"]
    long, tokenizer = " ".join(words * 12), family.encoders.tokenizer()
    ids = tokenizer(long, add_special_tokens=False).input_ids
    assert 75 < len(ids) < 150
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    chunks = torch.tensor([[begin, *ids[:75], end], [begin, *ids[75:], *[end] * (76 - len(ids[75:]))]])
    encoder = family.encoders.encoder()
    with torch.no_grad():
        first, second = encoder(chunks).last_hidden_state
    family.prompt_length = 152
    [row] = family.encode_prompts([long])
    assert_near(row.tensors["prompt_embeds"], torch.cat([first[:-1], second[1:]]))


@pytest.mark.parametrize(("version", "name"), [("v1_5", "guided"), ("v2_1", "guided"), ("v1_5", "clip_skip")])
def test_the_pipeline_generates_the_golden_latents(version: str, name: str) -> None:
    """With the model's own sampler and guidance, from the golden noise."""
    family, case, recorded = family_of(version), case_of(version, name), golden(version, f"case_{name}")
    family.clip_skip = 2 if name == "clip_skip" else 1
    generated = family.pipeline(family.load_denoiser())(
        *(case["prompts"], case["negative_prompts"]),
        **{"height": case["height"], "width": case["width"], "num_inference_steps": case["steps"]},
        **{"guidance_scale": case["pipeline_arguments"]["guidance_scale"], "output_type": "latent"},
        latents=recorded["start_latents"],
    )
    assert_near(generated.images, recorded["final_latents"], 2e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_and_gradients_are_those_of_the_public_recipe(version: str) -> None:
    family, recorded = family_of(version), golden(version, "training")
    denoiser = family.load_denoiser().train().requires_grad_(True)
    latents, noise, sigmas = recorded["latents"], recorded["noise"], (recorded["timesteps"] + 1) / 1000
    noisy, target = (make(latents, noise, sigmas) for make in (family.make_noisy, family.make_target))
    assert_near(noisy, recorded["noisy"])
    assert_near(target, recorded["target"])
    conditioning = family.collate(batch_of(latents, recorded["prompt_embeds"]))
    prediction = family.predict(denoiser, noisy, sigmas, conditioning)
    assert_near(prediction, recorded["output"])
    loss = sample_means(squared_error(prediction, target)).mean()
    loss.backward()
    assert loss.item() == pytest.approx(recorded["loss"].item(), rel=1e-5)
    parameters = dict(denoiser.named_parameters())
    for key in [key for key in recorded if key.startswith("grad.")]:
        assert_near(parameters[key.removeprefix("grad.")].grad, recorded[key], 1e-4)


def test_latents_are_those_of_the_golden_vae() -> None:
    family, recorded = family_of("v1_5"), golden("v1_5", "vae_case")
    vae = family.load_vae()
    [moments] = family.encode_images(vae, recorded["pixels"])
    assert_near(moments.mean, recorded["posterior_mean"][0])
    assert_near(moments.std, recorded["posterior_std"][0])
    latents = family.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), vae.config)
    assert_near(latents, recorded["latents"][0])
    assert_near(family.decode_latents(vae, recorded["latents"]), recorded["decoded"])


def test_levels_hold_what_the_released_schedule_says() -> None:
    """abar of the levels 0, 499 and 999."""
    signal, _ = family_of("v1_5").signal_and_noise(torch.tensor([0.001, 0.5, 1.0]))
    expected = torch.tensor([0.9991499782, 0.2776694298, 0.0046600951])
    torch.testing.assert_close(signal.square(), expected, rtol=0, atol=1e-6)


def test_files_say_which_of_the_models_they_were_made_with() -> None:
    """As kohya's scripts and ModelSpec name them."""
    found = [family_of(version).spec_of_weights.keys for version in VERSIONS]
    assert [keys.architecture for keys in found] == ["stable-diffusion-v1", "stable-diffusion-v2-768-v"]
    assert [keys.base_model_version for keys in found] == ["sd_v1", "sd_v2_v"]


@pytest.mark.slow
@pytest.mark.parametrize("is_second", [False, True])
def test_a_whole_model_in_one_file_is_the_folder_that_it_was_written_from(is_second: bool, tmp_path: Path) -> None:
    """1.5 with projections that are convolutions, 2.1 with linear ones and OpenCLIP's encoder."""
    folder = tiny_sd15_folder(tmp_path / "model", is_second)
    spec = get_spec("sd15")
    file = write_sd15_file(folder, spec.keys, tmp_path / "sd.safetensors", is_second)
    whole, single = (SD15(spec, ModelSource(str(folder), file=each), CPU, torch.float32) for each in (None, str(file)))
    for load in (SD15.load_denoiser, SD15.load_vae, lambda family: family.encoders.encoder()):
        ours, theirs = load(single).state_dict(), load(whole).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    embeds = [each.encode_prompts(["a cat"])[0].tensors["prompt_embeds"] for each in (single, whole)]
    assert torch.equal(*embeds)


@pytest.mark.parametrize("is_second", [False, True])
def test_the_key_table_is_that_of_diffusers_conversion(is_second: bool) -> None:
    unet = tiny_sd15_unet(is_second=is_second)
    keys, original = get_spec("sd15").keys, {}
    for name, tensor in unet.state_dict().items():
        module, _, kind = name.rpartition(".")
        original[f"model.diffusion_model.{keys.original(module).name}.{kind}"] = tensor
    converted = convert_ldm_unet_checkpoint(original, dict(unet.config))
    assert converted.keys() == unet.state_dict().keys()
    assert all(converted[name].data_ptr() == tensor.data_ptr() for name, tensor in unet.state_dict().items())
