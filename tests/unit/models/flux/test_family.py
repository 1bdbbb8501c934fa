"""FLUX.1 for the shared trainer, against diffusers' own pipelines and conversion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from PIL import Image
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.flux.family import TRAINING_GUIDANCE, Flux
from simpletuner.models.patches import pack, position_ids, unpack
from tests.tiny_flux import tiny_flux_folder, tiny_flux_transformer

CPU = torch.device("cpu")
PROMPTS = ["a cat", "A green star, on white!"]
FLAVOURS = ("dev", "schnell", "kontext")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_flux_folder(tmp_path_factory.mktemp(name), name) for name in FLAVOURS}


def family_of(folder: Path) -> Flux:
    spec = get_spec("flux")
    return get_family_class(spec)(spec, ModelSource(str(folder)), CPU, torch.float32)


def stock_of(folder: Path, pipeline_class: type = FluxPipeline) -> FluxPipeline:
    pipeline = pipeline_class.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def batch_of(family: Flux, latents: Tensor | list[Tensor], references: list[list[Tensor]] = []) -> Batch:  # noqa: B006
    prompts = PROMPTS[: len(latents)]
    embeds, weights = family.encode_prompts(prompts), torch.ones(len(latents))
    return Batch(latents, embeds, range(len(latents)), "", weights, "", references=references)


def calls_of(denoiser: torch.nn.Module, draw) -> list[tuple[dict[str, Tensor], Tensor]]:
    """(arguments, output) of each call of the denoiser while a pipeline generates."""
    calls: list[tuple[dict[str, Tensor], Tensor]] = []

    def note(module, args, kwargs, output):
        calls.append((kwargs, output[0]))

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    try:
        draw()
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("flavour", ["dev", "schnell"])
def test_prompts_are_encoded_as_the_pipeline_does(folders, flavour):
    family, length = family_of(folders[flavour]), 256 if flavour == "schnell" else 512
    with torch.no_grad():
        embeds, pooled, _ = stock_of(folders[flavour]).encode_prompt(PROMPTS, None, max_sequence_length=length)
    for row, expected, pool in zip(family.encode_prompts(PROMPTS), embeds, pooled, strict=True):
        assert row.tensors["prompt_embeds"].shape == (length, 16)
        torch.testing.assert_close(row.tensors["prompt_embeds"], expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(row.tensors["pooled_prompt_embeds"], pool, rtol=0, atol=1e-5)
    assert family.prompt_facts()["max_prompt_tokens"] == length


@pytest.mark.parametrize("flavour", ["dev", "schnell"])
def test_predict_is_the_call_that_the_pipeline_makes(folders, flavour):
    stock, family = stock_of(folders[flavour]), family_of(folders[flavour])
    options = {"height": 64, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
    calls = calls_of(
        stock.transformer,
        lambda: stock(
            PROMPTS,
            guidance_scale=TRAINING_GUIDANCE,
            max_sequence_length=family.max_prompt_tokens,
            generator=torch.Generator().manual_seed(0),
            **options,
        ),
    )
    assert len(calls) == 3
    for given, output in calls:
        latents = unpack(given["hidden_states"], 8, 12)
        conditioning = family.collate(batch_of(family, latents))
        with torch.no_grad():
            ours = family.predict(stock.transformer, latents, given["timestep"], conditioning)
        torch.testing.assert_close(pack(ours), output, rtol=0, atol=1e-6)


def test_with_a_reference_predict_is_the_call_that_kontext_makes(folders):
    stock, family = stock_of(folders["kontext"], FluxKontextPipeline), family_of(folders["kontext"])
    reference = torch.randn(1, 16, 6, 10)
    calls = calls_of(
        stock.transformer,
        lambda: stock(
            image=reference, prompt=PROMPTS[0], height=64, width=96, max_area=64 * 96, num_inference_steps=2,
            guidance_scale=TRAINING_GUIDANCE, output_type="latent", generator=torch.Generator().manual_seed(0),
        ),
    )  # fmt: skip
    for given, output in calls:
        latents = unpack(given["hidden_states"][:, : 4 * 6], 8, 12)
        conditioning = family.collate(batch_of(family, latents, [[reference[0]]]))
        with torch.no_grad():
            ours = family.predict(stock.transformer, latents, given["timestep"], conditioning)
        torch.testing.assert_close(pack(ours), output[:, : 4 * 6], rtol=0, atol=1e-6)
    assert len(calls) == 2


def test_references_of_several_sizes_and_none_share_a_batch(folders):
    family = family_of(folders["kontext"])
    denoiser, sigmas = family.load_denoiser(), torch.tensor([0.3, 0.6])
    latents, reference = torch.randn(2, 16, 8, 8), torch.randn(16, 4, 6)
    batch = batch_of(family, latents, [[reference], []])
    with torch.no_grad():
        together = family.predict(denoiser, latents, sigmas, family.collate(batch))
        one = batch_of(family, latents[:1], [[reference]])
        alone = family.predict(denoiser, latents[:1], sigmas[:1], family.collate(one))
        without = family.predict(denoiser, latents[:1], sigmas[:1], family.collate(batch_of(family, latents[:1])))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)
    assert (alone - without).abs().max() > 1e-4


def test_packing_is_that_of_diffusers():
    latents = torch.randn(2, 16, 6, 8)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 6, 8)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 6, 8), latents)
    theirs = FluxPipeline._prepare_latent_image_ids(2, 3, 4, CPU, torch.float32)
    assert torch.equal(position_ids(latents), theirs)
    theirs[..., 0] = 1
    assert torch.equal(position_ids(latents, index=1), theirs)


def test_times_are_shifted_as_the_models_scheduler_shifts_them(folders):
    family = family_of(folders["dev"])
    # 256 patches: mu 0.5; 4096: 1.15. The logit-normal's median is 0.5, which the shift takes to e^mu / (1 + e^mu).
    for side, mu in ((32, 0.5), (128, 1.15)):
        sigma = family.sigmas_at(torch.tensor([0.5]), torch.zeros(1, 16, side, side)).item()
        assert sigma == pytest.approx(math.exp(mu) / (1 + math.exp(mu)), abs=1e-6)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config)
        assert sigma == pytest.approx(float(scheduler.time_shift(mu, 1.0, torch.tensor(0.5))), abs=1e-6)
    assert family_of(folders["schnell"]).sigmas_at(torch.tensor([0.5]), torch.zeros(1, 16, 8, 8)).item() == 0.5


def test_kontext_draws_an_edit_of_an_image_of_another_size(folders):
    family = family_of(folders["kontext"])
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    options = {"height": 64, "width": 48, "num_inference_steps": 2}

    def generated(color: str) -> Image.Image:
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPTS[0], references=[[Image.new("RGB", (500, 300), color)]], generator=generator, **options)

    red, blue = generated("red").images[0], generated("blue").images[0]
    assert red.size == (48, 64)
    assert red.tobytes() != blue.tobytes()


def test_the_key_table_is_that_of_diffusers_conversion():
    """Named by the table and converted by diffusers, every weight comes back under its own name.

    diffusers splits joined matrices at the real model's sizes; one column of each weight is enough to tell.
    """
    table = get_spec("flux").keys
    expected = {}
    for number, name in enumerate(tiny_flux_transformer().state_dict()):
        module, _, kind = name.rpartition(".")
        is_norm = module.rpartition(".")[2].startswith("norm_") and module != "norm_out"
        rows = 128 if is_norm else {"proj_mlp": 12288, "linear": 6144}.get(module.rpartition(".")[2], 3072)
        values = torch.arange(rows, dtype=torch.float64) + 1e5 * number
        expected[name] = values if kind == "bias" or is_norm else values[:, None]
    original: dict[str, Tensor] = {}
    for name in expected:
        module, _, kind = name.rpartition(".")
        found = table.original(module)
        tensor = torch.cat([expected[f"{part}.{kind}"] for part in found.parts])
        if found.swaps_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        is_norm = found.name.endswith(("query_norm", "key_norm"))
        original[f"{found.name}.{'scale' if is_norm else kind}"] = tensor
    converted = convert_flux_transformer_checkpoint_to_diffusers(original)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


def test_guidance_is_one_in_training(folders):
    """The distilled models are trained at a guidance of 1, whatever images are generated with."""
    family = family_of(folders["dev"])
    seen = []

    def denoiser(**given):
        seen.append(given["guidance"])
        return (given["hidden_states"],)

    latents = torch.randn(2, 16, 8, 8)
    family.predict(denoiser, latents, torch.tensor([0.3, 0.6]), family.collate(batch_of(family, latents)))
    assert seen[0].tolist() == [1.0, 1.0]
    family_of(folders["schnell"]).predict(
        denoiser, latents, torch.tensor([0.3, 0.6]), family.collate(batch_of(family, latents))
    )
    assert seen[1] is None
