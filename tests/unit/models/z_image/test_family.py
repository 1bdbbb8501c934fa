"""Z-Image for the shared trainer, against recorded calls of diffusers' pipeline, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.errors import DataError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments
from simpletuner.models.z_image.family import TEMPLATE, ZImage
from simpletuner.models.z_image.keys import Z_IMAGE_KEYS
from simpletuner.training.step import compute_losses
from tests.single_files import original_denoiser
from tests.tiny_z_image import tiny_z_image_folder

GOLDEN = Path(__file__).parents[3] / "golden" / "z_image"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


def family_of(folder: Path, file: Path | None = None) -> ZImage:
    spec = get_spec("z_image")
    source = ModelSource(str(folder), file=str(file) if file else None)
    return get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def golden() -> ZImage:
    return family_of(GOLDEN / "model")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_z_image_folder(tmp_path_factory.mktemp("z_image"))


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Within a share of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def batch_of(latents: Tensor, embeds: list[Tensor]) -> Batch:
    rows = [PromptEmbeds({"prompt_embeds": each}) for each in embeds]
    return Batch(latents, rows, range(len(rows)), [""] * len(rows), torch.ones(len(rows)), "")


def test_prompts_stand_in_the_chat_of_the_pipeline(golden):
    for layout in json.loads((GOLDEN / "token_layouts.json").read_text()):
        text = TEMPLATE.format(prompt=layout["prompt"])
        assert text == layout["text"]
        assert golden.encoders.tokenizer()(text).input_ids == layout["ids"]
        assert golden.count_prompt_tokens([layout["prompt"]]) == [len(layout["ids"])]


@pytest.mark.parametrize("name", CASES)
def test_recorded_prompt_embeds_calls_and_images_are_reproduced(golden, name):
    case, tensors = CASES[name], load_file(GOLDEN / CASES[name]["file"])
    texts = [*case["prompts"], *(case["negative_prompts"] or [])]
    recorded = [
        tensors[f"{kind}prompt_embeds.{i}"]
        for kind, of_kind in (("", case["prompts"]), ("negative_", case["negative_prompts"] or []))
        for i in range(len(of_kind))
    ]
    for found, expected in zip(golden.encode_prompts(texts), recorded, strict=True):
        assert_near(found.tensors["prompt_embeds"], expected)
    denoiser = golden.load_denoiser()
    for number, call in enumerate(case["calls"]):
        given = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"call.{number}.")}
        conditioning = golden.collate(batch_of(given["x"], recorded[: call["rows"]]))
        sigmas = tensors["scheduler_sigmas"][number].expand(call["rows"])
        with torch.no_grad():
            velocity = golden.predict(denoiser, given["x"], sigmas, conditioning)
        assert_near(velocity, given["velocity"])
        assert torch.equal(given["velocity"], -given["output"])
    images = golden.pipeline(denoiser)(
        case["prompts"],
        case["negative_prompts"],
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        latents=tensors["start_latents"],
        output_type="latent",
        **case["pipeline_arguments"],
    ).images
    assert_near(images, tensors["final_latents"])


def test_the_loss_and_gradients_of_a_recorded_training_step_are_reproduced(golden, monkeypatch):
    """Of weights, and of a LoRA, whose gradient is that of the weight times its other factor."""
    case = load_file(GOLDEN / "training.safetensors")
    batch = batch_of(case["latents"], [case["prompt_embeds.0"], case["prompt_embeds.1"]])
    monkeypatch.setattr(golden, "sigmas_at", lambda quantiles, latents: case["sigmas"])

    def step(denoiser: torch.nn.Module) -> float:
        losses = compute_losses(golden, denoiser, batch, case["noise"], torch.zeros(2, dtype=torch.float64))
        loss = losses.weighted_sum / 2
        loss.backward()
        return loss.item()

    denoiser = golden.load_denoiser().requires_grad_(True)
    assert step(denoiser) == pytest.approx(float(case["loss"]), rel=1e-5)
    for name in ("context_refiner.0.feed_forward.w1.weight", "layers.0.attention.to_q.weight"):
        assert_near(denoiser.get_parameter(name).grad, case[f"grad.{name}"], 1e-4)
    denoiser = golden.load_denoiser()
    adapter = attach_lora(denoiser, LoraSettings(rank=2, alpha=3), golden.spec, torch.float32, seed=0)
    parameters = adapter.trainable_parameters()
    assert step(denoiser) == pytest.approx(float(case["loss"]), rel=1e-5)
    down, up = (parameters[f"layers.0.attention.to_q.lora_{half}.weight"] for half in "AB")
    assert_near(up.grad, 1.5 * case["grad.layers.0.attention.to_q.weight"] @ down.detach().T, 1e-4)


def test_images_pass_the_vae_as_recorded(golden):
    case, vae = load_file(GOLDEN / "vae_case.safetensors"), golden.load_vae()
    [moments] = golden.encode_images(vae, case["pixels"])
    assert_near(moments.mean, case["posterior_mean"][0])
    assert_near(moments.std, case["posterior_std"][0])
    latents = golden.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), golden.vae_config)
    assert_near(latents, case["latents"][0])
    assert_near(golden.decode_latents(vae, case["latents"]), case["decoded"])


def test_a_batch_of_mixed_lengths_and_sizes_of_captions_is_its_rows_alone(tiny):
    """One caption fills its multiple of 32, the others do not."""
    family = family_of(tiny)
    denoiser, sigmas = family.load_denoiser(), torch.tensor([0.2, 0.6, 0.9])
    latents = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    embeds = [torch.randn(length, 16, generator=torch.Generator().manual_seed(length)) for length in (7, 32, 41)]
    with torch.no_grad():
        together = family.predict(denoiser, latents, sigmas, family.collate(batch_of(latents, embeds)))
        for i in range(3):
            one = slice(i, i + 1)
            alone = family.collate(batch_of(latents[one], embeds[one]))
            assert_near(together[one], family.predict(denoiser, latents[one], sigmas[one], alone))


@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize(("shift", "median"), [(3.0, 0.75), (6.0, 6 / 7)])
def test_training_has_the_fixed_shift_of_the_scheduler_at_every_size(tmp_path, side, shift, median):
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(tmp_path / "scheduler")
    latents = torch.zeros(1, 16, side // 8, side // 8)
    sigma = family_of(tmp_path).sigmas_at(torch.tensor([0.5]), latents).item()
    assert sigma == pytest.approx(median, abs=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (128, 128)])
def test_generating_has_the_noise_levels_of_the_release(tiny, size):
    """Of Turbo in 8 steps: 3u / (1 + 2u) for u = 1, 7/8, ..., 1/8; the network is given 1 - sigma."""
    family, seen = family_of(tiny), []
    denoiser = family.load_denoiser()
    denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[1].item()))
    family.pipeline(denoiser)(
        "a cat", height=size[0], width=size[1], num_inference_steps=8, guidance_scale=0.0, output_type="latent"
    )
    sigmas = [1, 0.95454545, 0.9, 0.83333333, 0.75, 0.64285714, 0.5, 0.3]
    assert seen == pytest.approx([1 - sigma for sigma in sigmas], abs=1e-6)


def test_guidance_of_zero_is_none_and_is_added_to_the_answer_for_the_prompt(tiny):
    """p + g (p - n), so that Turbo's default of 0 needs no negative answer."""
    family = family_of(tiny)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    denoiser = family.load_denoiser()

    def first_step(guidance: float) -> Tensor:
        options = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
        return noise - family.pipeline(denoiser)("a cat", latents=noise, guidance_scale=guidance, **options).images

    def answer(text: str) -> Tensor:
        with torch.no_grad():
            conditioning = family.collate(batch_of(noise, [family.encode_prompts([text])[0].tensors["prompt_embeds"]]))
            return family.predict(denoiser, noise, torch.ones(1), conditioning)

    prompt, negative = answer("a cat"), answer("")
    assert (prompt - negative).abs().max() > 1e-3
    assert_near(first_step(0.0), prompt)
    assert_near(first_step(2.0), prompt + 2 * (prompt - negative))
    assert family.spec.defaults_for("turbo")["validation_guidance"] == 0.0


def test_the_key_table_is_that_of_diffusers_conversion(tiny):
    """Also beside a tensor that no network has, and with and without the prefix of ComfyUI's files."""
    original = original_denoiser(tiny / "transformer", Z_IMAGE_KEYS)
    assert {"x_embedder.weight", "final_layer.linear.weight", "layers.1.attention.qkv.weight"} <= original.keys()
    assert {"context_refiner.0.attention.q_norm.weight", "noise_refiner.0.attention.out.weight"} <= original.keys()
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(original))
    state = ZImageTransformer2DModel.from_pretrained(tiny / "transformer").state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_gives_the_same_denoiser(tiny, tmp_path, prefix):
    file = tmp_path / "z_image_turbo_bf16.safetensors"
    tensors = original_denoiser(tiny / "transformer", Z_IMAGE_KEYS) | {"norm_final.weight": torch.ones(4)}
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, file)
    found, expected = family_of(tiny, file).load_denoiser().state_dict(), family_of(tiny).load_denoiser().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    save_file(
        {f"model.diffusion_model.{name}": t for name, t in (tensors | {"other.weight": torch.ones(1)}).items()}, file
    )
    with pytest.raises(
        DataError, match=r"1 tensors belong nowhere, the first is model\.diffusion_model\.other\.weight"
    ):
        family_of(tiny, file).load_denoiser()


def test_the_rotary_tables_limit_the_sides(golden):
    assert golden.largest_side() == 512 * 16
