"""Sana against diffusers' pipeline and a training step written with diffusers alone."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.local_check import check_local_model
from simpletuner.models.sana.family import Sana
from tests.golden_cases import assert_near, family_of
from tests.tiny_sana import tiny_sana_folder, tiny_sana_transformer
from tests.witnesses import assert_same, original_weights

SPEC = get_spec("sana")
PROMPTS = ["A red fox in the Snow, at dusk ", "two cups"]
NEGATIVES = ["Blurry, dark", ""]
HEIGHT, WIDTH = 64, 96
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sana_folder(tmp_path_factory.mktemp("sana"))


@pytest.fixture(scope="module")
def family(folder: Path) -> ModelFamily:
    return family_of("sana", folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> SanaPipeline:
    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start_latents() -> Tensor:
    return randn(2, 32, HEIGHT // 32, WIDTH // 32)


def encoded(stock: SanaPipeline, prompts: list[str], negatives: list[str]) -> tuple[Tensor, ...]:
    """Embeddings and masks of prompts, then of negative prompts."""
    with torch.no_grad():
        return stock.encode_prompt(
            prompts, negative_prompt=negatives, complex_human_instruction=INSTRUCTION, max_sequence_length=300
        )


def stock_run(stock: SanaPipeline) -> tuple[list[tuple[Any, Any, Tensor]], Tensor]:
    """The calls of the denoiser, as (arguments, keywords, output), and the latents of two images in three steps."""
    calls: list[tuple[Any, Any, Tensor]] = []
    hook = stock.transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    latents = stock(
        PROMPTS,
        negative_prompt=NEGATIVES,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=3,
        guidance_scale=4.5,
        latents=start_latents(),
        use_resolution_binning=False,
        output_type="latent",
    ).images
    hook.remove()
    return calls, latents


@pytest.mark.slow
def test_prompts_stand_behind_the_instruction_and_negative_ones_alone(family: ModelFamily, stock: SanaPipeline):
    """Of the instruction two states are left. One prompt is too long: the pipeline has 300 states of it."""
    prompts = [*PROMPTS, "", "word " * 80]
    states, masks, negative_states, negative_masks = encoded(stock, prompts, [*NEGATIVES, "a", "b"])
    before = family.num_cut_prompts
    rows = family.encode_prompts(prompts)
    assert family.num_cut_prompts == before + 1
    assert [len(row.tensors["prompt_embeds"]) for row in rows][2:] == [2, 300]
    for row, state, mask in zip(rows, states, masks, strict=True):
        assert_near(row.tensors["prompt_embeds"], state[mask.bool()])
    negatives = family.encode_prompts([SPEC.negative_text(text) for text in NEGATIVES])
    for row, state, mask in zip(negatives, negative_states, negative_masks, strict=False):
        assert_near(row.tensors["prompt_embeds"], state[mask.bool()])
    assert family.count_prompt_tokens(prompts)[:3] == [len(row.tensors["prompt_embeds"]) for row in rows[:3]]


def test_the_encoded_dropped_caption_is_the_one_that_guidance_leads_away_from(family: ModelFamily):
    assert SPEC.negative_text(None) == SPEC.negative_text("") == SPEC.dropped_caption
    assert "instruction" in family.prompt_facts()
    [dropped, empty] = family.encode_prompts([SPEC.dropped_caption, ""])
    assert (len(dropped.tensors["prompt_embeds"]), len(empty.tensors["prompt_embeds"])) == (1, 2)


def test_predict_is_the_call_of_the_pipeline(family: ModelFamily, stock: SanaPipeline):
    """Of both predictions of guidance; the pipeline's prompts are padded to 300 tokens, which the mask hides."""
    [((sample,), call, output), *_], _ = stock_run(stock)
    assert call["encoder_hidden_states"].shape[1] == 300
    texts = [*map(SPEC.negative_text, NEGATIVES), *PROMPTS]
    conditioning = family.condition_on(family.encode_prompts(texts), ())
    with torch.no_grad():
        ours = family.predict(family.load_denoiser(), sample, call["timestep"] / 1000, conditioning)
    torch.testing.assert_close(ours, output, rtol=0, atol=2e-6)


def test_the_pipeline_generates_what_diffusers_does(family: ModelFamily, stock: SanaPipeline):
    """With the model's own sampler and guidance, at the size that is asked for."""
    _, expected = stock_run(stock)
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "guidance_scale": 4.5}
    ours = pipeline(PROMPTS, NEGATIVES, latents=start_latents(), output_type="latent", **options).images
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    image = pipeline(PROMPTS, NEGATIVES, latents=start_latents(), output_type="pt", **options).images
    with torch.no_grad():
        decoded = stock.vae.decode(expected / 0.41407).sample
    torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_newer", [False, True])
def test_a_step_has_the_loss_and_the_gradients_of_one_written_with_diffusers_alone(
    stock: SanaPipeline, tmp_path: Path, is_newer: bool
):
    """1.0 and 1.5. Prompts of different length in one batch, padded to 300 there."""
    family = family_of("sana", tiny_sana_folder(tmp_path / "model", is_newer))
    latents, noise, sigmas = randn(2, 32, 4, 6, seed=1), randn(2, 32, 4, 6, seed=2), torch.tensor([0.3, 0.9])
    states, masks, *_ = encoded(stock, PROMPTS, NEGATIVES)
    theirs = tiny_sana_transformer(is_newer=is_newer).train()
    levels = sigmas[:, None, None, None]
    output = theirs(
        (1 - levels) * latents + levels * noise,
        encoder_hidden_states=states,
        encoder_attention_mask=masks,
        timestep=sigmas * 1000,
    ).sample
    expected = torch.nn.functional.mse_loss(output, noise - latents)
    expected.backward()

    denoiser = family.load_denoiser().train().requires_grad_(True)
    conditioning = family.condition_on(family.encode_prompts(PROMPTS), ())
    prediction = family.predict(denoiser, family.make_noisy(latents, noise, sigmas), sigmas, conditioning)
    loss = (prediction - family.make_target(latents, noise, sigmas)).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), parameter in zip(denoiser.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_times_are_shifted_as_those_of_sampling(family: ModelFamily):
    """By 3 at every size: 3 * 0.5 / (1 + 2 * 0.5)."""
    for side in (16, 32):
        [sigma] = family.sigmas_at(torch.tensor([0.5]), torch.zeros(1, 32, side, side)).tolist()
        assert sigma == pytest.approx(0.75, abs=1e-6)


def test_a_transformer_with_a_scale_of_times_is_given_it(family: ModelFamily, monkeypatch: pytest.MonkeyPatch):
    seen: list[Tensor] = []

    def denoiser(latents: Tensor, **inputs: Any) -> tuple[Tensor]:
        seen.append(inputs["timestep"])
        return (latents,)

    conditioning = family.condition_on(family.encode_prompts(PROMPTS[:1]), ())
    monkeypatch.setitem(family.denoiser_config, "timestep_scale", 0.001)
    family.predict(denoiser, start_latents()[:1], torch.tensor([0.3]), conditioning)  # type: ignore[arg-type]
    assert seen[0].item() == pytest.approx(0.3)


def test_an_image_always_has_the_same_latents(family: ModelFamily, folder: Path):
    """The autoencoder gives no distribution to draw from."""
    vae, pixels = AutoencoderDC.from_pretrained(folder / "vae"), randn(2, 3, 64, 96).clamp(-1, 1)
    moments = family.encode_images(family.load_vae(), pixels)
    assert [each.std for each in moments] == [None, None]
    with torch.no_grad():
        expected = vae.encode(pixels).latent * 0.41407
    assert expected.shape == (2, 32, 2, 3)
    for seed in (0, 1):
        draw = torch.Generator().manual_seed(seed)
        found = [family.latents_from_moments(LatentMoments(each.mean), draw, family.vae_config) for each in moments]
        assert_near(torch.stack(found), expected)


def test_the_autoencoder_works_in_tiles_where_that_is_asked_for(folder: Path):
    family = family_of("sana", folder)
    family.vae_modes = ("tiling", "slicing")
    vae: Any = family.load_vae()
    assert vae.use_tiling
    assert vae.use_slicing
    with torch.no_grad():
        tiled = family.encode_images(vae, torch.zeros(1, 3, 544, 64))
    assert tiled[0].mean.shape == (32, 17, 2)
    assert family.decode_latents(vae, tiled[0].mean[None]).shape == (1, 3, 544, 64)


@pytest.mark.parametrize("pipeline", ["SanaSprintPipeline", "SanaControlNetPipeline"])
def test_other_networks_of_the_name_are_refused(pipeline: str, folder: Path, tmp_path: Path):
    other = tiny_sana_folder(tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text()) | {"_class_name": pipeline}
    (other / "model_index.json").write_text(json.dumps(index))
    assert check_local_model(ModelSource(str(folder)), SPEC) == []
    [problem] = check_local_model(ModelSource(str(other)), SPEC)
    assert SPEC.refused_models[pipeline] in problem.message


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_transformer_may_come_in_one_file_with_the_norms_of_1_5(folder: Path, tmp_path: Path, prefix: str):
    """Names of the release, with tensors that no network has; the norms as diffusers' conversion script has them."""
    whole = tiny_sana_transformer(is_newer=True)
    unused = {"y_embedder.y_embedding": torch.zeros(300, 16), "pos_embed": torch.zeros(1, 4, 16)}
    tensors = original_weights(whole, SPEC.keys) | unused | {"logvar_linear.weight": torch.zeros(1, 16)}
    for name in ("attn.q_norm", "attn.k_norm", "cross_attn.q_norm", "cross_attn.k_norm"):
        assert f"blocks.1.{name}.weight" in tensors
    file = tmp_path / "sana.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    single = Sana(SPEC, ModelSource(str(folder), file=str(file)), torch.device("cpu"), torch.float32)
    assert_same(single.load_denoiser().state_dict(), whole.state_dict())
