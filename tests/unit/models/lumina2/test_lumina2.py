"""Lumina 2 beside diffusers' own pipeline, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file

from simpletuner.errors import DataError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.lumina2.family import SYSTEM_PROMPT
from simpletuner.models.lumina2.spec import LUMINA2_KEYS
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
from tests.tiny_folders import TINY_FOLDERS
from tests.tiny_lumina2 import TEXT_SIZE, tiny_lumina2_folder, tiny_lumina2_transformer
from tests.witnesses import original_weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lumina2_folder(tmp_path_factory.mktemp("lumina2"))


def test_prompts_are_read_behind_the_system_prompt_and_negative_ones_alone(tiny):
    """As the pipeline reads both: the states before the last layer of what is not padding."""
    family, stock = family_of("lumina2", tiny), stock_pipeline("lumina2", tiny)
    theirs, mask, negative, negative_mask = stock.encode_prompt(PROMPTS, negative_prompt=NEGATIVES)
    marked = [family.spec.negative_text(text) for text in NEGATIVES]
    rows = zip([*theirs, *negative], [*mask, *negative_mask], strict=True)
    for found, (row, kept) in zip(family.encode_prompts([*PROMPTS, *marked]), rows, strict=True):
        torch.testing.assert_close(found.tensors["prompt_embeds"], row[kept.bool()], rtol=0, atol=1e-6)
    [empty], empty_mask = (each[:1] for each in stock.encode_prompt(PROMPTS, negative_prompt=None)[2:])
    assert empty_mask.sum() == 1  # the beginning of a text alone
    [dropped] = family.encode_prompts([family.spec.negative_text(None)])
    torch.testing.assert_close(dropped.tensors["prompt_embeds"], empty[:1], rtol=0, atol=1e-6)


def test_a_prompt_with_a_system_prompt_of_its_own_stays_as_it_is(tiny):
    family = family_of("lumina2", tiny)
    own = "You are an assistant designed to generate anime images. <Prompt Start> a cat"
    assert family.encoded_text(own) == own
    assert family.encoded_text("a cat") == SYSTEM_PROMPT + "a cat"
    assert stock_pipeline("lumina2", tiny).system_prompt + " <Prompt Start> " == SYSTEM_PROMPT
    assert family.encoded_text(family.spec.negative_text("dark")) == "dark"
    assert family.encoded_text(family.spec.negative_text("")) == ""


def test_a_prompt_that_is_too_long_is_cut_and_counted(tiny):
    family = family_of("lumina2", tiny)
    [row] = family.encode_prompts(["a cat " * 300])
    assert row.tensors["prompt_embeds"].shape == (256, TEXT_SIZE)
    assert family.num_cut_prompts == 1
    tokenizer = family.encoders.tokenizer()
    assert family.count_prompt_tokens(["a cat"]) == [len(tokenizer(SYSTEM_PROMPT + "a cat").input_ids)]


@pytest.mark.slow
def test_images_and_calls_are_those_of_the_stock_pipeline(tiny):
    """Its guidance keeps the length of each row; time is 1 - sigma, and the answer is `data - noise`."""
    calls = require_the_images_of_the_stock_pipeline("lumina2", tiny, guidance_scale=4.0)
    assert len(calls) == 6  # prompts and negative prompts in calls of their own
    family = family_of("lumina2", tiny)
    denoiser, marked = family.load_denoiser(), [family.spec.negative_text(text) for text in NEGATIVES]
    for number, call in enumerate(calls):
        conditioning = family.collate(batch_of(family, call["hidden_states"], marked if number % 2 else PROMPTS))
        with torch.no_grad():
            velocity = family.predict(denoiser, call["hidden_states"], 1 - call["timestep"], conditioning)
        torch.testing.assert_close(velocity, -call["output"], rtol=0, atol=1e-5)
    levels = [6 * u / (1 + 5 * u) for u in (1, 2 / 3, 1 / 3)]
    assert [1 - call["timestep"][0].item() for call in calls[::2]] == pytest.approx(levels, abs=1e-6)


def test_a_training_step_is_that_of_diffusers_alone(tiny, monkeypatch):
    embeds, mask, *_ = stock_pipeline("lumina2", tiny).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    sigmas = torch.tensor([0.3, 0.8])
    inputs = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "timestep": 1 - sigmas}
    require_the_training_step_of_diffusers("lumina2", tiny, inputs, sigmas, -1.0, monkeypatch)


def test_a_batch_of_mixed_lengths_is_its_rows_alone(tiny):
    rows = [torch.randn(length, TEXT_SIZE, generator=torch.Generator().manual_seed(length)) for length in (3, 256, 40)]
    require_rows_alone(family_of("lumina2", tiny), rows)


def test_lengths_that_the_host_knows_give_the_tables_of_the_mask(tiny):
    tables = family_of("lumina2", tiny).load_denoiser().rope_embedder
    latents, mask = torch.zeros(2, 16, 4, 6), torch.arange(9) < torch.tensor([[4], [9]])
    expected = tables(latents, mask)
    wrong = torch.ones_like(mask)
    wrong.num_tokens = [4, 9]
    for found, each in zip(tables(latents, wrong), expected, strict=True):
        assert torch.equal(found, each) if isinstance(each, torch.Tensor) else found == each
    assert expected[4:] == ([4, 9], [10, 15])


@pytest.mark.parametrize("side", [512, 1024])
def test_training_has_the_fixed_shift_of_the_scheduler_at_every_size(tmp_path, side):
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(tmp_path / "scheduler")
    sigma = family_of("lumina2", tmp_path).sigmas_at(torch.tensor([0.5]), torch.zeros(1, 16, side // 8, side // 8))
    assert sigma.item() == pytest.approx(6 / 7, abs=1e-6)


def test_the_rotary_tables_limit_the_sides(tiny, monkeypatch):
    family = family_of("lumina2", tiny)
    assert family.largest_side() == 512 * 16
    monkeypatch.setitem(family.denoiser_config, "axes_lens", [1024, 512, 256])  # of the text, of rows, of columns
    assert family.largest_side() == 256 * 16


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_gives_the_same_denoiser(tiny, tmp_path, prefix):
    """Beside a norm that no network has, and the encoder that all-in-one files bring."""
    file = tmp_path / "lumina_2.safetensors"
    original = original_weights(tiny_lumina2_transformer(), LUMINA2_KEYS) | {"norm_final.weight": torch.ones(4)}
    assert {"cap_embedder.0.weight", "cap_embedder.1.weight", "layers.1.attention.qkv.weight"} <= original.keys()
    assert {"context_refiner.0.attention_norm1.weight", "noise_refiner.0.attention_norm1.weight"} <= original.keys()
    tensors = {f"{prefix}{name}": tensor.contiguous() for name, tensor in original.items()}
    save_file(tensors | ({"text_encoders.gemma2_2b.x": torch.ones(1)} if prefix else {}), file)
    found = family_of("lumina2", tiny, file).load_denoiser().state_dict()
    expected = family_of("lumina2", tiny).load_denoiser().state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_diffusers_refuses_a_file_in_comfyuis_form_of_which_a_block_is_not_whole():
    """Its converter asks for every layer of each block, from the first block on."""
    spec = get_spec("lumina2")
    layers = [
        f"{block}.{number}.{layer}"
        for block in ("layers", "noise_refiner")
        for number in (0, 1)
        for layer in (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "feed_forward.linear_1",
            "feed_forward.linear_2",
            "feed_forward.linear_3",
            "norm1.linear",
        )
    ]
    assert spec.read_by("comfyui", "lora", layers) == "read by diffusers and ComfyUI"
    text = spec.read_by("comfyui", "lora", [layer for layer in layers if layer != "layers.0.norm1.linear"])
    assert text == "read by ComfyUI; diffusers refuses it for 15 of 31 layers"
    outside = spec.read_by("comfyui", "lora", [*layers, "x_embedder"])
    assert outside == "read by ComfyUI; diffusers refuses it for 1 of 33 layers"
    assert spec.default_form("lora") == "comfyui"


@pytest.mark.parametrize(("name", "key"), [("lumina2", "axes_lens"), ("auraflow", "pos_embed_max_size")])
def test_a_folder_of_another_family_is_reported_by_what_its_configuration_lacks(tmp_path, name, key):
    spec, source = get_spec(name), ModelSource(str(TINY_FOLDERS["sana"](tmp_path / "sana")))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    with pytest.raises(DataError) as refusal:
        family.largest_side()
    [problem] = refusal.value.problems
    assert f"transformer/config.json has no {key}" in problem.message
    assert problem.key == "pretrained_model_name_or_path"
