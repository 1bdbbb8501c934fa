"""AuraFlow beside diffusers' own pipeline, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer

from simpletuner.families.registry import get_spec
from simpletuner.models.auraflow.spec import AURAFLOW_KEYS
from tests.public_calls import (
    NEGATIVES,
    PROMPTS,
    batch_of,
    family_of,
    require_rows_alone,
    require_the_images_of_the_stock_pipeline,
    require_the_training_step_of_diffusers,
    stock_pipeline,
)
from tests.tiny_auraflow import TEXT_SIZE, tiny_auraflow_folder, tiny_auraflow_transformer
from tests.witnesses import original_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_auraflow_folder(tmp_path_factory.mktemp("auraflow"))


def test_the_network_reads_the_states_and_zeros_that_the_pipeline_gives_it(tiny):
    family = family_of("auraflow", tiny)
    theirs, _, negative, _ = stock_pipeline("auraflow", tiny).encode_prompt(PROMPTS, NEGATIVES)
    for texts, expected in ((PROMPTS, theirs), (NEGATIVES, negative)):
        found = family.collate(batch_of(family, torch.zeros(2, 4, 8, 8), texts))["prompt_embeds"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        assert found.shape == (2, 256, TEXT_SIZE)
    counts = [len(each.tensors["prompt_embeds"]) for each in family.encode_prompts(PROMPTS)]
    assert counts == family.count_prompt_tokens(PROMPTS)
    assert counts[0] < counts[1]
    assert (theirs[0, counts[0] :] == 0).all()


def test_a_prompt_that_is_too_long_is_cut_and_counted(tiny):
    family = family_of("auraflow", tiny)
    [row] = family.encode_prompts(["a cat " * 300])
    assert row.tensors["prompt_embeds"].shape == (256, TEXT_SIZE)
    assert family.num_cut_prompts == 1


def test_the_tokenizer_is_the_file_of_the_release(tiny):
    """transformers rebuilds tokenizers that call themselves Llama's, which gives other ids."""
    library = Tokenizer.from_file(str(tiny / "tokenizer" / "tokenizer.json"))
    assert family_of("auraflow", tiny).encoders.tokenizer()(PROMPTS).input_ids == [
        encoding.ids for encoding in library.encode_batch(PROMPTS)
    ]


def test_images_and_calls_are_those_of_the_stock_pipeline(tiny):
    """Time is sigma, 1 on noise: 1.73u / (1 + 0.73u) for u = 1, 2/3, 1/3, as the scheduler has them."""
    calls = require_the_images_of_the_stock_pipeline("auraflow", tiny, guidance_scale=3.5)
    assert [len(call["hidden_states"]) for call in calls] == [4, 4, 4]
    assert calls[0]["timestep"].tolist() == [1.0] * 4
    family = family_of("auraflow", tiny)
    denoiser = family.load_denoiser()
    for call in calls:
        conditioning = family.collate(batch_of(family, call["hidden_states"], [*NEGATIVES, *PROMPTS]))
        with torch.no_grad():
            velocity = family.predict(denoiser, call["hidden_states"], call["timestep"], conditioning)
        torch.testing.assert_close(velocity, call["output"], rtol=0, atol=1e-6)


def test_a_training_step_is_that_of_diffusers_alone(tiny, monkeypatch):
    embeds, *_ = stock_pipeline("auraflow", tiny).encode_prompt(PROMPTS, None, do_classifier_free_guidance=False)
    sigmas = torch.tensor([0.3, 0.8])
    inputs = {"encoder_hidden_states": embeds, "timestep": sigmas}
    require_the_training_step_of_diffusers("auraflow", tiny, inputs, sigmas, 1.0, monkeypatch)


def test_a_batch_of_mixed_lengths_is_its_rows_alone(tiny):
    rows = [torch.randn(length, TEXT_SIZE, generator=torch.Generator().manual_seed(length)) for length in (3, 256, 40)]
    require_rows_alone(family_of("auraflow", tiny), rows)


@pytest.mark.parametrize("side", [512, 1024])
def test_training_has_the_fixed_shift_of_the_scheduler_at_every_size(tmp_path, side):
    FlowMatchEulerDiscreteScheduler(shift=1.73).save_pretrained(tmp_path / "scheduler")
    sigma = family_of("auraflow", tmp_path).sigmas_at(torch.tensor([0.5]), torch.zeros(1, 4, side // 8, side // 8))
    assert sigma.item() == pytest.approx(1.73 / 2.73, abs=1e-6)


def test_the_table_of_positions_limits_the_sides(tiny):
    """16 x 16 patches of 16 pixels here, 96 x 96 in v0.3."""
    assert family_of("auraflow", tiny).largest_side() == 256
    assert get_spec("auraflow").max_size == 96 * 16


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_gives_the_same_denoiser(tiny, tmp_path, prefix):
    """Of the original's names, as `aura_flow_0.3.safetensors` has them, and those that ComfyUI writes."""
    file = tmp_path / "aura_flow.safetensors"
    original = original_weights(tiny_auraflow_transformer(), AURAFLOW_KEYS)
    assert {"positional_encoding", "register_tokens", "modF.1.weight"} <= original.keys()
    assert {"double_layers.0.attn.w1q.weight", "single_layers.0.modCX.1.weight"} <= original.keys()
    save_file({f"{prefix}{name}": tensor.contiguous() for name, tensor in original.items()}, file)
    found = family_of("auraflow", tiny, file).load_denoiser().state_dict()
    expected = family_of("auraflow", tiny).load_denoiser().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
