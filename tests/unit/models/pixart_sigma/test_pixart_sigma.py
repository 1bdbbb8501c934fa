"""PixArt-Sigma against diffusers' pipeline and a training step written with diffusers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, PixArtSigmaPipeline
from diffusers.models.embeddings import PatchEmbed
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.local_check import check_local_model
from simpletuner.models.pixart_sigma.family import PixArtSigma
from tests.golden_cases import assert_near, family_of
from tests.tiny_pixart_sigma import tiny_pixart_sigma_folder, tiny_pixart_transformer
from tests.witnesses import answers, assert_same, original_weights, patched

SPEC = get_spec("pixart_sigma")
PROMPTS = ["A red fox in the Snow, at dusk ", "two cups"]
NEGATIVES = ["blurry, dark", ""]
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pixart_sigma_folder(tmp_path_factory.mktemp("pixart"))


@pytest.fixture(scope="module")
def family(folder: Path) -> ModelFamily:
    return family_of("pixart_sigma", folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> PixArtSigmaPipeline:
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start_latents() -> Tensor:
    return randn(2, 4, HEIGHT // 8, WIDTH // 8)


def stock_run(stock: PixArtSigmaPipeline) -> tuple[list[tuple[Any, Any, Tensor]], Tensor]:
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
        clean_caption=False,
        use_resolution_binning=False,
        output_type="latent",
    ).images
    hook.remove()
    return calls, latents


def test_prompts_are_the_states_of_the_pipeline_without_its_padding(family: ModelFamily, stock: PixArtSigmaPipeline):
    """Also of one that is too long: the pipeline has 300 tokens, the last of them the end."""
    prompts = [*PROMPTS, "", "word " * 400]
    states, masks, *_ = stock.encode_prompt(prompts, do_classifier_free_guidance=False)
    before = family.num_cut_prompts
    for row, state, mask in zip(family.encode_prompts(prompts), states, masks, strict=True):
        assert_near(row.tensors["prompt_embeds"], state[mask.bool()])
    assert family.num_cut_prompts == before + 1
    assert [len(row.tensors["prompt_embeds"]) for row in family.encode_prompts(prompts)][2:] == [1, 300]


def test_predict_is_the_call_of_the_pipeline(family: ModelFamily, stock: PixArtSigmaPipeline):
    """Of both predictions of guidance; the pipeline's prompts are padded to 300 tokens, which the mask hides."""
    [((sample,), call, output), *_], _ = stock_run(stock)
    assert call["encoder_hidden_states"].shape[1] == 300
    conditioning = family.condition_on(family.encode_prompts([*NEGATIVES, *PROMPTS]), ())
    with torch.no_grad():
        ours = family.predict(family.load_denoiser(), sample, (call["timestep"] + 1) / 1000, conditioning)
    assert output.shape[1] == 8
    torch.testing.assert_close(ours, output[:, :4], rtol=0, atol=1e-6)


def test_the_pipeline_generates_what_diffusers_does(family: ModelFamily, stock: PixArtSigmaPipeline):
    """With the model's own sampler and guidance, at the size that is asked for."""
    _, expected = stock_run(stock)
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "guidance_scale": 4.5}
    ours = pipeline(PROMPTS, NEGATIVES, latents=start_latents(), output_type="latent", **options).images
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    image = pipeline(PROMPTS, NEGATIVES, latents=start_latents(), output_type="pt", **options).images
    with torch.no_grad():
        decoded = stock.vae.decode(expected / 0.13025).sample
    torch.testing.assert_close(image, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_what_a_callback_puts_in_place_of_the_latents_counts(family: ModelFamily):
    """diffusers' pipeline has the callback of older ones, whose answer it does not look at."""
    seen: list[int] = []

    def zeros(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        return {"latents": torch.zeros_like(tensors["latents"])}

    pipeline = family.pipeline(family.load_denoiser())
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 3, "output_type": "latent"}
    ours = pipeline("a cat", latents=start_latents()[:1], callback_on_step_end=zeros, **options).images
    assert seen == [0, 1, 2]
    assert not ours.any()


def test_a_step_has_the_loss_and_the_gradients_of_one_written_with_diffusers_alone(
    family: ModelFamily, stock: PixArtSigmaPipeline
):
    """Prompts of different length in one batch, padded to 300 there; early, middle and last level."""
    latents, noise, timesteps = randn(3, 4, 8, 12, seed=1), randn(3, 4, 8, 12, seed=2), torch.tensor([0, 499, 999])
    prompts = [*PROMPTS, ""]
    states, masks, *_ = stock.encode_prompt(prompts, do_classifier_free_guidance=False)
    theirs = tiny_pixart_transformer().train()
    levels = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    output = theirs(
        levels.add_noise(latents, noise, timesteps),
        encoder_hidden_states=states.detach(),
        encoder_attention_mask=masks,
        timestep=timesteps,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    expected = torch.nn.functional.mse_loss(output.chunk(2, dim=1)[0], noise)
    expected.backward()

    denoiser = family.load_denoiser().train().requires_grad_(True)
    sigmas = (timesteps + 1) / 1000
    conditioning = family.condition_on(family.encode_prompts(prompts), ())
    prediction = family.predict(denoiser, family.make_noisy(latents, noise, sigmas), sigmas, conditioning)
    loss = (prediction - family.make_target(latents, noise, sigmas)).square().mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, ours), parameter in zip(denoiser.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_levels_hold_what_the_released_schedule_says(family: PixArtSigma):
    """abar of a linear schedule from 0.0001 to 0.02, of the levels 0 and 999 (arXiv 2006.11239, section 4)."""
    signal, _ = family.signal_and_noise(torch.tensor([0.001, 1.0]))
    torch.testing.assert_close(signal.square(), torch.tensor([0.9999, 4.0358e-05]), rtol=1e-4, atol=0)


def test_a_transformer_of_another_size_has_the_places_of_1024():
    """So the file of the 512 or 2K release is used beside the folder of 1024: a place is relative to the size."""
    latents, places = torch.zeros(1, 4, 64, 96), []
    for side, scale in ((64, 1), (128, 2), (256, 4)):
        torch.manual_seed(0)
        places.append(PatchEmbed(side, side, 2, 4, 16, interpolation_scale=scale)(latents))
    assert torch.equal(places[0], places[1])
    assert torch.equal(places[0], places[2])


def test_pixart_alpha_is_refused(folder: Path, tmp_path: Path):
    other = tiny_pixart_sigma_folder(tmp_path / "alpha")
    index = json.loads((other / "model_index.json").read_text()) | {"_class_name": "PixArtAlphaPipeline"}
    (other / "model_index.json").write_text(json.dumps(index))
    assert check_local_model(ModelSource(str(folder)), SPEC) == []
    [problem] = check_local_model(ModelSource(str(other)), SPEC)
    assert "is given the sizes of images" in problem.message


# ---- files ---------------------------------------------------------------------------------------------------------


def trained(path: Path, file_format: str, **settings: Any) -> dict[str, Tensor]:
    """Write a LoRA in a format; what each layer answers with it."""
    denoiser = tiny_pixart_transformer()
    chosen = LoraSettings(rank=2, alpha=3, file_format=file_format, **settings)
    adapter = attach_lora(denoiser, chosen, SPEC, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save(path, {})
    return answers(denoiser.eval())


def diffusers_from(original: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Weights of the release in diffusers' layout, as `scripts/convert_pixart_sigma_to_diffusers.py` has it."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "caption_projection.linear_1": "y_embedder.y_proj.fc1",
        "caption_projection.linear_2": "y_embedder.y_proj.fc2",
        "adaln_single.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "adaln_single.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "adaln_single.linear": "t_block.1",
        "proj_out": "final_layer.linear",
    }
    state = {"scale_shift_table": original["final_layer.scale_shift_table"]}
    for n in range(num_blocks):
        ours, theirs = f"transformer_blocks.{n}", f"blocks.{n}"
        names |= {
            f"{ours}.attn1.to_out.0": f"{theirs}.attn.proj",
            f"{ours}.attn2.to_out.0": f"{theirs}.cross_attn.proj",
            f"{ours}.attn2.to_q": f"{theirs}.cross_attn.q_linear",
            f"{ours}.ff.net.0.proj": f"{theirs}.mlp.fc1",
            f"{ours}.ff.net.2": f"{theirs}.mlp.fc2",
        }
        state[f"{ours}.scale_shift_table"] = original[f"{theirs}.scale_shift_table"]
        for kind in ("weight", "bias"):
            joined = original[f"{theirs}.attn.qkv.{kind}"], original[f"{theirs}.cross_attn.kv_linear.{kind}"]
            for number, parts in enumerate(("qkv", "kv")):
                for part, rows in zip(parts, joined[number].chunk(len(parts)), strict=True):
                    state[f"{ours}.attn{number + 1}.to_{part}.{kind}"] = rows
    for ours, theirs in names.items():
        state |= {f"{ours}.{kind}": original[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return state


@pytest.mark.parametrize("file_format", ["kohya", "comfyui"])
def test_added_to_the_original_weights_a_file_changes_each_layer_as_it_was_trained(file_format: str, tmp_path: Path):
    """Queries, keys and values are joined there; programs find a layer by its name."""
    ours = trained(tmp_path / "a.safetensors", file_format, targets=("all-linear",))
    denoiser = tiny_pixart_transformer()
    original = original_weights(denoiser, SPEC.keys)
    assert_same(diffusers_from(original, 2), denoiser.state_dict())
    denoiser.load_state_dict(diffusers_from(patched(original, load_file(tmp_path / "a.safetensors")), 2))
    assert_same(answers(denoiser), ours, 1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_reads_the_default_form(use_dora: bool, tmp_path: Path):
    """diffusers' pipeline has no loader for PixArt."""
    assert not hasattr(PixArtSigmaPipeline, "load_lora_weights")
    form = SPEC.default_form("dora" if use_dora else "lora")
    ours = trained(tmp_path / "a.safetensors", form, use_dora=use_dora)
    weights = {key.removeprefix("transformer."): each for key, each in load_file(tmp_path / "a.safetensors").items()}
    layers = sorted({key.partition(".lora_")[0] for key in weights})
    assert len(layers) == 2 * 8  # both attentions of each block
    denoiser = tiny_pixart_transformer()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers, use_dora=use_dora), denoiser)
    assert not set_peft_model_state_dict(denoiser, weights).unexpected_keys
    assert_same(answers(denoiser.eval()), ours, 1e-5)
    assert SPEC.read_by(form, "lora", layers) == "read by PEFT and ComfyUI"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_original", [True, False])
def test_the_transformer_may_come_in_one_file(folder: Path, tmp_path: Path, prefix: str, is_original: bool):
    """In the layout of the release, with the states of no caption and the table of places, or of diffusers."""
    whole = tiny_pixart_transformer()
    tensors = whole.state_dict()
    if is_original:
        unused = {"y_embedder.y_embedding": torch.zeros(120, 16), "pos_embed": torch.zeros(1, 16, 16)}
        tensors = original_weights(whole, SPEC.keys) | unused
    file = tmp_path / "pixart.safetensors"
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    single = PixArtSigma(SPEC, ModelSource(str(folder), file=str(file)), torch.device("cpu"), torch.float32)
    assert_same(single.load_denoiser().state_dict(), whole.state_dict())
