"""Chroma for the shared trainer, against golden cases of diffusers' pipeline around random weights.

`output_masked` is the network's answer with a mask of booleans, which is what the original release computes; with the
pipeline's own mask, of numbers that are added to the scores, it is another one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import ChromaPipeline
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.diffusion.loss import sample_means
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.chroma.family import Chroma
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments
from simpletuner.models.patches import pack, unpack
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.losses.l2 import squared_error
from tests.tiny_chroma import CHROMA_GOLDEN, tiny_chroma_folder, tiny_chroma_transformer

CPU = torch.device("cpu")
CASES = {case["name"]: case for case in json.loads((CHROMA_GOLDEN / "cases.json").read_text())}
RECORDED = ("batch", "plain", "full_length")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Chroma:
    folder: Path = tiny_chroma_folder(tmp_path_factory.mktemp("chroma"))
    spec = get_spec("chroma")
    return get_family_class(spec)(spec, ModelSource(str(folder)), CPU, torch.float32)


def calls_of(name: str) -> list[dict[str, Tensor]]:
    recorded = load_file(CHROMA_GOLDEN / f"case_{name}.safetensors")
    found: list[dict[str, Tensor]] = [{} for _ in CASES[name]["calls"]]
    for key, tensor in recorded.items():
        if key.startswith("call."):
            _, number, part = key.split(".", 2)
            found[int(number)][part] = tensor
    return found


def batch_of(latents: Tensor, embeds: list[Tensor]) -> Batch:
    rows, count = [PromptEmbeds({"prompt_embeds": row}) for row in embeds], len(latents)
    return Batch(latents, rows, range(count), "", torch.ones(count), "")


def kept_rows(call: dict[str, Tensor]) -> list[Tensor]:
    """The text that the golden mask keeps: a prompt's tokens and one of padding."""
    masks = call["attention_mask"].bool()
    return [row[mask[: len(row)]] for row, mask in zip(call["prompt_embeds"], masks, strict=True)]


def assert_near(ours: Tensor, golden: Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()


@pytest.mark.parametrize("name", RECORDED)
def test_predict_is_the_network_with_its_padding_masked(family, name):
    """Also of two prompts of different lengths in one batch."""
    denoiser = family.load_denoiser()
    for call, facts in zip(calls_of(name), CASES[name]["calls"], strict=True):
        batch = batch_of(call["latents"], kept_rows(call))
        assert [len(row.tensors["prompt_embeds"]) for row in batch.prompt_embeds] == facts["kept_text_tokens"]
        with torch.no_grad():
            ours = family.predict(denoiser, call["latents"], call["sigma"], family.collate(batch))
        assert_near(ours, call["output_masked"])
        if name != "full_length":
            assert (ours - call["output_as_pipeline"]).abs().max() > 0.05 * ours.abs().max()


@pytest.mark.parametrize("name", ["batch", "plain"])
def test_prompts_are_encoded_to_their_tokens_and_one_of_padding(family, name):
    texts = {"prompt": CASES[name]["prompts"], "negative": CASES[name]["negative_prompts"]}
    for call, facts in zip(calls_of(name), CASES[name]["calls"], strict=True):
        ours = family.encode_prompts(texts[facts["text"]])
        for row, golden in zip(ours, kept_rows(call), strict=True):
            assert row.tensors["prompt_embeds"].shape == golden.shape
            assert_near(row.tensors["prompt_embeds"], golden)


def test_a_prompt_that_fills_all_tokens_has_none_of_padding(family, monkeypatch):
    monkeypatch.setattr(family, "prompt_length", 10)
    [call] = calls_of("full_length")
    [row] = family.encode_prompts(CASES["full_length"]["prompts"])
    assert_near(row.tensors["prompt_embeds"], call["prompt_embeds"][0])
    [empty] = family.encode_prompts([""])
    assert len(empty.tensors["prompt_embeds"]) == 2  # the end and one of padding


@pytest.mark.parametrize("uses_checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_masked_network_with_checkpointing_too(family, uses_checkpointing):
    golden = load_file(CHROMA_GOLDEN / "training.safetensors")
    denoiser = family.load_denoiser().train().requires_grad_(True)
    if uses_checkpointing:
        denoiser.enable_gradient_checkpointing(GradientCheckpointing(CPU))
    latents, noise, sigmas = golden["latents"], golden["noise"], golden["sigmas"]
    noisy = family.make_noisy(latents, noise, sigmas)
    assert_near(noisy, golden["noisy"])
    conditioning = family.collate(batch_of(latents, kept_rows(golden)))
    velocity = family.predict(denoiser, noisy, sigmas, conditioning)
    assert_near(velocity, golden["velocity_masked"])
    assert (velocity - golden["velocity_masked_checkpointed_0_42_1"]).abs().max() > 0.01 * velocity.abs().max()
    loss = sample_means(squared_error(velocity, family.make_target(latents, noise, sigmas))).mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss_masked"].item(), rel=1e-5)
    parameters = dict(denoiser.named_parameters())
    for key in [key for key in golden if key.startswith("grad_masked.")]:
        assert_near(parameters[key.removeprefix("grad_masked.")].grad, golden[key], 1e-4)


def test_generation_masks_what_the_network_does_not_see(family):
    """The first step from the golden noise: guidance of the two masked answers, by hand."""
    recorded, case = load_file(CHROMA_GOLDEN / "case_batch.safetensors"), CASES["batch"]
    positive, negative = calls_of("batch")[:2]
    steps: list[Tensor] = []

    def watch(pipeline, index, time, given):
        steps.append(given["latents"])
        return given

    options = {"height": case["height"], "width": case["width"], "num_inference_steps": case["steps"]}
    family.pipeline(family.load_denoiser())(
        case["prompts"], case["negative_prompts"], guidance_scale=3.0, latents=recorded["start_latents"],
        output_type="latent", callback_on_step_end=watch, **options,
    )  # fmt: skip
    velocity = negative["output_masked"] + 3.0 * (positive["output_masked"] - negative["output_masked"])
    sigmas = recorded["scheduler_sigmas"]
    expected = recorded["start_latents"] + (sigmas[1] - sigmas[0]) * velocity
    assert_near(family.unpack_latents(steps[0], case["height"], case["width"]), expected)


@pytest.mark.parametrize(("side", "shift"), [(512, 1.877611), (1024, 3.158193)])
def test_times_are_shifted_as_the_models_scheduler_shifts_them(family, side, shift):
    [sigma] = family.sigmas_at(torch.tensor([0.5]), torch.zeros(1, 16, side // 8, side // 8)).tolist()
    assert sigma == pytest.approx(shift / (1 + shift), abs=1e-6)


def test_latents_are_those_of_the_golden_vae(family):
    golden, vae = load_file(CHROMA_GOLDEN / "vae_case.safetensors"), family.load_vae()
    [moments] = family.encode_images(vae, golden["pixels"])
    assert_near(moments.mean, golden["posterior_mean"][0])
    assert_near(moments.std, golden["posterior_std"][0])
    latents = family.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), vae.config)
    assert_near(latents, golden["latents"][0])
    assert_near(family.decode_latents(vae, golden["latents"]), golden["decoded"])


def test_a_single_file_of_the_original_names_is_the_folder_that_it_was_written_from(family, tmp_path):
    from safetensors.torch import save_file

    from tests.single_files import original_denoiser

    original = original_denoiser(Path(family.source.model) / "transformer", family.spec.keys, norm_name="scale")
    assert "distilled_guidance_layer.norms.0.scale" in original
    assert "distilled_guidance_layer.layers.0.in_layer.weight" in original
    assert "single_blocks.1.linear1.bias" in original
    for prefix in ("", "model.diffusion_model."):
        file = tmp_path / f"{prefix or 'bare'}.safetensors"
        save_file({prefix + name: tensor for name, tensor in original.items()}, file)
        source = ModelSource(family.source.model, file=str(file))
        single = Chroma(family.spec, source, CPU, torch.float32).load_denoiser()
        expected = tiny_chroma_transformer().state_dict()
        assert single.state_dict().keys() == expected.keys()
        assert all(torch.equal(single.state_dict()[name], tensor) for name, tensor in expected.items())
        assert torch.equal(single.time_text_embed.mod_proj, tiny_chroma_transformer().time_text_embed.mod_proj)


def test_the_public_pipeline_generates_the_same_with_the_trained_lora(family, tmp_path):
    """Given masks of booleans, which it keeps; its own mask of numbers makes another image."""
    denoiser = family.load_denoiser()
    adapter = attach_lora(denoiser, LoraSettings(rank=2, alpha=3), family.spec, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    adapter.save(tmp_path / "lora.safetensors", {})
    noise = torch.randn(2, 16, 8, 8, generator=generator)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    pipeline, prompts = family.pipeline(denoiser), CASES["batch"]["prompts"]
    ours = pipeline(prompts, guidance_scale=3.0, latents=noise, **options).images
    stock = ChromaPipeline.from_pretrained(family.source.model)
    stock.set_progress_bar_config(disable=True)

    def theirs() -> Tensor:
        given = {**pipeline.prompt_arguments(prompts, None, 3.0), "latents": pack(noise.clone())}
        return unpack(stock(**given, **options).images, 8, 8)

    assert (theirs() - ours).abs().max() > 1e-2
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert_near(theirs(), ours)


def test_the_whole_model_is_written_for_the_public_pipeline(family, tmp_path):
    family.pipeline(family.load_denoiser(), family.load_vae()).save_pretrained(tmp_path / "written")
    stock = ChromaPipeline.from_pretrained(tmp_path / "written")
    assert stock.tokenizer("a house").input_ids == [3, 22, 1]
