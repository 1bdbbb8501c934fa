"""Krea 2 against what diffusers' pipeline and training script gave, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.families.registry import get_spec
from simpletuner.models.family import ModelFamily
from simpletuner.models.patches import unpack
from tests.golden_cases import GivenPrompts, assert_near, assert_trains_as, family_of
from tests.tiny_krea2 import GOLDEN, tiny_krea2_folder

PROMPTS = ["a red fox in the snow, at dusk", "two blue cups", ""]
CASES = {case["file"].removesuffix(".safetensors"): case for case in json.loads((GOLDEN / "cases.json").read_text())}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return family_of("krea2", tiny_krea2_folder(tmp_path_factory.mktemp("raw")))


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    folder = tiny_krea2_folder(tmp_path_factory.mktemp("turbo"))
    index = json.loads((folder / "model_index.json").read_text()) | {"is_distilled": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    return family_of("krea2", folder)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@pytest.mark.parametrize("number", [0, 2])
def test_the_states_are_those_of_the_pipeline_without_its_padding(raw: ModelFamily, number: int):
    """It pads between prompt and suffix; here nothing is padded."""
    expected = golden(f"prompt_{number}")
    [found] = raw.encode_prompts([PROMPTS[number]])
    assert_near(found.tensors["prompt_embeds"], expected["prompt_embeds"])


def test_a_long_prompt_loses_its_end_and_keeps_the_suffix(raw: ModelFamily):
    tokenizer = raw.encoders.tokenizer()
    num_suffix = len(tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids)
    before = raw.num_cut_prompts
    [rows] = raw.encode_prompts(["word " * 300])
    assert len(rows.tensors["prompt_embeds"]) == 512 - 5 + num_suffix
    assert raw.num_cut_prompts == before + 1


def test_latents_are_those_of_the_vae_of_qwen_image(raw: ModelFamily):
    case, vae = golden("vae_case"), raw.load_vae()
    moments = raw.encode_images(vae, case["pixels"])
    assert_near(torch.stack([each.mean for each in moments]), case["posterior_mean"])
    assert_near(torch.stack([each.std for each in moments]), case["posterior_std"])  # the public script draws from it
    assert_near(raw.decode_latents(vae, case["latents"]), case["decoded"])


@pytest.mark.parametrize("name", ["raw", "turbo"])
def test_the_pipeline_makes_the_calls_and_the_image_of_diffusers(
    raw: ModelFamily, turbo: ModelFamily, name: str, monkeypatch
):
    case, tensors = CASES[name], golden(name)
    family = turbo if case["is_distilled"] else raw
    texts = [*case["prompts"], case["negative_prompt"] or ""]
    states = [tensors[f"call_{call}.prompt_embeds_0"] for call in range(case["calls_per_step"])]
    given = {text: {"prompt_embeds": rows} for text, rows in zip(texts, states, strict=False)}
    monkeypatch.setattr(family, "prompts", GivenPrompts(given))
    denoiser = family.load_denoiser()
    calls: list[tuple[dict[str, Tensor], Tensor]] = []
    denoiser.register_forward_hook(lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True)
    seen: list[Tensor] = []

    def keep(pipeline, step, timestep, found):
        seen.append(found["latents"])
        return found

    pipeline = family.pipeline(denoiser, family.load_vae())
    image = pipeline(
        case["prompts"],
        case["negative_prompt"],
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance_scale"],
        latents=tensors["latents"],
        callback_on_step_end=keep,
        output_type="pt",
    ).images
    assert_near(pipeline.scheduler.sigmas, tensors["scheduler_sigmas"])
    assert len(calls) == case["steps"] * case["calls_per_step"]
    size = tensors["latents"].shape[-2:]
    for call in range(case["calls_recorded"]):
        arguments, output = calls[call]
        assert_near(unpack(arguments["hidden_states"], *size), tensors[f"call_{call}.latents"])
        assert_near(arguments["timestep"], tensors[f"call_{call}.timestep"])
        assert_near(unpack(output, *size), tensors[f"call_{call}.output"])
    assert_near(seen[-1], tensors["final_latents"])
    assert_near(image, tensors["image"])


@pytest.mark.slow
def test_a_step_of_training_has_the_loss_and_the_gradients_of_the_public_script(raw: ModelFamily):
    """Two prompts of different length in one batch."""
    tensors = golden("training")

    def conditioning() -> Conditioning:
        rows = [PromptEmbeds({"prompt_embeds": tensors[f"prompt_embeds_{row}"]}) for row in range(2)]
        return raw.condition_on(rows, ())

    assert_trains_as(raw, tensors, conditioning)


def test_a_batch_of_prompts_of_different_length_equals_its_rows_alone(raw: ModelFamily):
    embeds = raw.encode_prompts(PROMPTS)
    latents = torch.randn(3, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    sigmas, denoiser = torch.tensor([0.2, 0.5, 0.9]), raw.load_denoiser()
    with torch.no_grad():
        together = raw.predict(denoiser, latents, sigmas, raw.condition_on(embeds, ()))
        for i in range(3):
            one = slice(i, i + 1)
            alone = raw.predict(denoiser, latents[one], sigmas[one], raw.condition_on(embeds[one], ()))
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "mu"), [(512, 0.5812), (768, 0.7167), (1024, 0.9062), (1280, 1.1500)])
def test_raw_is_shifted_with_the_size_and_turbo_is_not(raw: ModelFamily, turbo: ModelFamily, side: int, mu: float):
    """mu worked out by hand: 0.5 at 256 patches, 1.15 at 6400; Turbo has 1.15 always."""
    latents = torch.zeros(1, 16, side // 8, side // 8)
    for family, expected in ((raw, mu), (turbo, 1.15)):
        [sigma] = family.sigmas_at(torch.tensor([0.5]), latents).tolist()
        assert math.log(sigma / (1 - sigma)) == pytest.approx(expected, abs=1e-4)
        assert family.pipeline(torch.nn.Identity()).sampling_mu((side // 16) ** 2, 8) == pytest.approx(
            expected, abs=1e-4
        )


def test_guidance_is_counted_from_zero(raw: ModelFamily):
    pipeline = raw.pipeline(torch.nn.Identity())
    asked, negative = torch.tensor([3.0]), torch.tensor([1.0])
    assert [pipeline.is_guided(scale) for scale in (0.0, 0.5, 1.0)] == [False, True, True]
    assert pipeline.guided(asked, negative, 4.5).item() == 3 + 4.5 * 2
    spec = get_spec("krea2")
    assert spec.defaults_for("turbo")["validation_guidance"] == 0.0


def test_the_gates_of_the_feed_forward_are_no_default_target_and_the_text_is_never_packed():
    """As in the public script; the projector of the text has twelve columns, which no number format packs."""
    spec = get_spec("krea2")
    assert not any("ff.gate" in pattern or "text" in pattern for pattern in spec.default_lora_targets)
    assert spec.block_classes == ("Krea2TransformerBlock",)
