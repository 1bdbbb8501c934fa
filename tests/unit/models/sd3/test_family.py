"""SD3 for the shared trainer, against diffusers' own pipeline and conversion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.sd3.family import CLIPS, SD3
from tests.tiny_sd3 import tiny_sd3_folder, tiny_sd3_transformer

PROMPTS = ["a cat", "A green star, on white!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3_folder(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def family(folder: Path) -> SD3:
    spec = get_spec("sd3")
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompts_are_encoded_as_the_pipeline_does(family, stock):
    with torch.no_grad():
        embeds, _, pooled, _ = stock.encode_prompt(PROMPTS, None, None)
    for row, expected, pool in zip(family.encode_prompts(PROMPTS), embeds, pooled, strict=True):
        assert row.tensors["prompt_embeds"].shape == (77 + 256, 32)
        assert torch.equal(row.tensors["prompt_embeds"], expected)
        assert torch.equal(row.tensors["pooled_prompt_embeds"], pool)


def test_predict_is_the_call_that_the_pipeline_makes(family, stock):
    calls: list[tuple[dict[str, Tensor], Tensor]] = []
    hook = stock.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    options = {"height": 64, "width": 96, "num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "latent"}
    stock(PROMPTS, generator=torch.Generator().manual_seed(0), **options)
    hook.remove()
    assert len(calls) == 3
    for given, output in calls:
        latents = given["hidden_states"]
        batch = Batch(latents, family.encode_prompts(PROMPTS), range(2), "", torch.ones(2), "")
        with torch.no_grad():
            ours = family.predict(stock.transformer, latents, given["timestep"] / 1000, family.collate(batch))
        torch.testing.assert_close(ours, output, rtol=0, atol=1e-5)


def test_times_are_shifted_as_the_models_scheduler_shifts_them(family):
    quantiles = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config)
    plain = torch.sigmoid(torch.special.ndtri(quantiles)).tolist()
    scheduler.set_timesteps(sigmas=plain)
    theirs = scheduler.sigmas[:-1]
    ours = family.sigmas_at(quantiles, torch.zeros(3, 16, 8, 8))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_the_key_table_is_that_of_diffusers_conversion():
    """Also of the last block, whose context norm has its halves the other way round, since no gates come after them."""
    state = tiny_sd3_transformer().state_dict()
    keys = get_spec("sd3").keys.in_model(state)
    original = {"pos_embed": state["pos_embed.pos_embed"]}
    for name in state:
        module, _, kind = name.rpartition(".")
        if name == "pos_embed.pos_embed":
            continue
        found = keys.original(module)
        tensor = torch.cat([state[f"{part}.{kind}"] for part in found.parts])
        if found.swaps_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        original[f"{found.name}.{kind}"] = tensor
    converted = convert_sd3_transformer_checkpoint_to_diffusers(original)
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in state.items())


def test_prompts_of_77_tokens_and_prompts_without_t5_are_the_pipeline_s(folder, stock):
    source = ModelSource(str(folder))
    family = get_family_class(get_spec("sd3"))(get_spec("sd3"), source, torch.device("cpu"), torch.float32)
    family.prompt_length = 77
    with torch.no_grad():
        embeds = stock.encode_prompt(PROMPTS, None, None, max_sequence_length=77)[0]
    ours = torch.stack([each.tensors["prompt_embeds"] for each in family.encode_prompts(PROMPTS)])
    assert ours.shape[1] == 77 + 77
    assert torch.equal(ours, embeds)

    family.source = replace(source, encoders={"text_encoder_3": "none"})
    parts = {name: getattr(stock, name) for name in ("transformer", "vae", "scheduler")}
    clips = {name: getattr(stock, name) for pair in CLIPS for name in pair}
    without = StableDiffusion3Pipeline(**parts, **clips, text_encoder_3=None, tokenizer_3=None)
    with torch.no_grad():
        embeds, _, pooled, _ = without.encode_prompt(PROMPTS, None, None, max_sequence_length=77)
    for row, expected, pool in zip(family.encode_prompts(PROMPTS), embeds, pooled, strict=True):
        assert torch.equal(row.tensors["prompt_embeds"], expected)
        assert torch.equal(row.tensors["pooled_prompt_embeds"], pool)
    assert family.count_prompt_tokens(["a cat"]) == [6]  # CLIP's: four letters, start and end


def test_the_position_table_limits_the_sides(family):
    assert family.largest_side() == 256
