"""Hunyuan-DiT for the shared trainer, against what diffusers' pipeline and its classes gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel, HunyuanDiTPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.batch import Batch, Conditioning, Crop, Sample
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.hunyuan_dit.family import HunyuanDiT, meta_size, prepare
from tests.tiny import GOLDEN
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_transformer

FOLDER = GOLDEN / "hunyuan_dit"
VERSIONS = ("v1_1", "v1_2")
CASES = [
    (version, case["name"])
    for version in VERSIONS
    for case in json.loads((FOLDER / version / "cases.json").read_text())
    if (FOLDER / version / f"case_{case['name']}.safetensors").is_file()
]
# Names of the golden tensors -> those of the family.
NAMES = {
    "encoder_hidden_states": "prompt_embeds",
    "text_embedding_mask": "prompt_attention_mask",
    "encoder_hidden_states_t5": "prompt_embeds_2",
    "text_embedding_mask_t5": "prompt_attention_mask_2",
    "image_meta_size": "image_meta_size",
}


def hunyuan(folder: Path, dtype: torch.dtype = torch.float32) -> HunyuanDiT:
    return HunyuanDiT(get_spec("hunyuan_dit"), ModelSource(str(folder)), torch.device("cpu"), dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """1.2 with the encoders of 1.1, which are the same."""
    newer = shutil.copytree(FOLDER / "v1_1" / "model", tmp_path_factory.mktemp("hunyuan") / "v1_2")
    shutil.copytree(FOLDER / "v1_2" / "model", newer, dirs_exist_ok=True)
    return {"v1_1": FOLDER / "v1_1" / "model", "v1_2": newer}


def case_of(version: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    [case] = [case for case in json.loads((FOLDER / version / "cases.json").read_text()) if case["name"] == name]
    return case, load_file(FOLDER / version / f"case_{name}.safetensors")


@pytest.mark.parametrize("name", ["guided", "plain", "wide"])
def test_prompts_are_tokenized_and_encoded_as_the_pipeline_does(folders: dict[str, Path], name: str) -> None:
    """Chinese and English; padded to 77 and 256, with both masks."""
    family, (case, golden) = hunyuan(folders["v1_1"]), case_of("v1_1", name)
    for kind in ("prompt", "negative"):
        if f"{kind}.clip.input_ids" not in golden:
            continue
        embeds = [row.tensors for row in family.encode_prompts(case[kind])]
        for encoder, suffix, length in (("clip", "", 77), ("t5", "_2", 256)):
            ids, mask = family.encoders.tokenize(f"tokenizer{suffix}", case[kind], length)
            assert torch.equal(ids, golden[f"{kind}.{encoder}.input_ids"])
            assert torch.equal(mask, golden[f"{kind}.{encoder}.attention_mask"])
            states = torch.stack([row[f"prompt_embeds{suffix}"] for row in embeds])
            torch.testing.assert_close(states, golden[f"{kind}.{encoder}.embeds"], rtol=0, atol=1e-5)
            masks = torch.stack([row[f"prompt_attention_mask{suffix}"] for row in embeds])
            assert masks.dtype == torch.int64
            assert torch.equal(masks, mask)


def test_a_t5_tokenizer_without_its_fast_file_gives_the_same_ids(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["v1_1"], tmp_path / "model")
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    case, golden = case_of("v1_1", "wide")
    ids, _ = hunyuan(folder).encoders.tokenize("tokenizer_2", case["prompt"], 256)
    assert torch.equal(ids, golden["prompt.t5.input_ids"])


def test_a_bert_with_or_without_its_pooler_serves(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["v1_1"], tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    has_pooler = any(name.startswith("pooler.") for name in weights)
    pooler = {"pooler.dense.weight": torch.zeros(16, 16), "pooler.dense.bias": torch.zeros(16)}
    other = {name: each for name, each in weights.items() if "pooler." not in name} if has_pooler else weights | pooler
    save_file(other, file, {"format": "pt"})
    [ours], [expected] = (hunyuan(each).encode_prompts(["a dog"]) for each in (folder, folders["v1_1"]))
    assert torch.equal(ours.tensors["prompt_embeds"], expected.tensors["prompt_embeds"])


@pytest.mark.parametrize(("version", "name"), CASES)
def test_the_pipeline_generates_what_diffusers_does(folders: dict[str, Path], version: str, name: str) -> None:
    """On this machine to 1e-5; the machine of the golden latents rounds some products otherwise."""
    case, golden = case_of(version, name)
    options = {key: tuple(case[key]) for key in ("original_size", "crops_coords_top_left") if key in case}
    options |= {"guidance_rescale": case["guidance_rescale"]} if "guidance_rescale" in case else {}
    options |= {"height": case["height"], "width": case["width"], "num_inference_steps": case["steps"]}
    options |= {"guidance_scale": case["guidance"], "latents": golden["initial_latents"], "output_type": "latent"}
    stock = HunyuanDiTPipeline.from_pretrained(folders[version])
    stock.set_progress_bar_config(disable=True)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(case["generator_seed"])

    theirs = stock(
        case["prompt"], negative_prompt=case["negative"], use_resolution_binning=False, generator=generator(), **options
    ).images
    family = hunyuan(folders[version])
    # diffusers' own order of the target's sides.
    options["target_size"] = (case["height"], case["width"])
    pipeline = family.pipeline(family.load_denoiser())
    ours = pipeline(case["prompt"], case["negative"], generator=generator(), **options).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    largest = golden["final_latents"].abs().max()
    torch.testing.assert_close(ours / largest, golden["final_latents"] / largest, rtol=0, atol=5e-5)


@pytest.mark.parametrize("level", ["low", "middle", "high"])
@pytest.mark.parametrize("version", VERSIONS)
def test_noise_prediction_and_loss_are_those_of_the_public_classes(
    folders: dict[str, Path], version: str, level: str
) -> None:
    family, golden = hunyuan(folders[version]), load_file(FOLDER / version / "training.safetensors")
    latents, noise, sigmas = golden["latents"], golden["noise"], golden[f"{level}.sigmas"]
    assert family.schedule.timesteps(sigmas).tolist() == golden[f"{level}.timesteps"].tolist()
    noisy, target = family.make_noisy(latents, noise, sigmas), family.make_target(latents, noise, sigmas)
    torch.testing.assert_close(noisy, golden[f"{level}.noisy"], rtol=0, atol=1e-5)
    torch.testing.assert_close(target, golden[f"{level}.target"], rtol=0, atol=1e-5)
    tensors = {ours: golden[theirs] for theirs, ours in NAMES.items() if theirs in golden}
    conditioning = Conditioning(tensors, [()] * len(latents))
    with torch.no_grad():
        prediction = family.predict(family.load_denoiser(), noisy, sigmas, conditioning)
    assert prediction.shape == latents.shape
    torch.testing.assert_close(prediction, golden[f"{level}.prediction"], rtol=0, atol=2e-4)
    loss = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss, golden[f"{level}.loss"], rtol=1e-5, atol=1e-5)


def test_the_rotary_table_is_that_of_the_image_that_is_trained(folders: dict[str, Path]) -> None:
    family = hunyuan(folders["v1_1"])
    for name, sides in (("wide", (8, 12)), ("guided", (8, 8))):
        _, golden = case_of("v1_1", name)
        for ours, theirs in zip(family.rotary_table(*sides), ("cos", "sin"), strict=True):
            torch.testing.assert_close(ours, golden[f"dit.rope_{theirs}"], rtol=0, atol=1e-6)


SAMPLE = Sample("set", "a.png", "", 800, 600, ("a",), Crop(64, 86, 5, 10, 64, 64))


def test_sizes_are_across_then_down_as_the_weights_were_trained(folders: dict[str, Path]) -> None:
    assert meta_size(SAMPLE) == (800, 600, 64, 64, 10, 5)
    family, latents = hunyuan(folders["v1_1"]), torch.zeros(1, 4, 8, 12)
    batch = Batch(latents, family.encode_prompts(["a"]), [0], "", torch.ones(1), "")
    assert family.collate(batch)["image_meta_size"].tolist() == [[96, 64, 96, 64, 0, 0]]
    assert family.collate(batch)["image_meta_size"].dtype == torch.float32
    given: list[Tensor] = []
    denoiser = family.load_denoiser()
    denoiser.register_forward_pre_hook(lambda _, __, named: given.append(named["image_meta_size"]), with_kwargs=True)
    family.pipeline(denoiser)("a", height=64, width=96, num_inference_steps=1, guidance_scale=1, output_type="latent")
    assert given[0].tolist() == [[1024, 1024, 96, 64, 0, 0]]


def test_images_have_the_size_that_is_asked_for(folders: dict[str, Path]) -> None:
    family = hunyuan(folders["v1_1"])
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    [image] = pipeline("a", height=48, width=80, num_inference_steps=1).images
    assert image.size == (80, 48)


def test_blocks_are_recomputed_by_position_each_with_the_same_answer() -> None:
    """diffusers' own class refuses gradient checkpointing."""
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        tiny_hunyuan_dit_transformer().enable_gradient_checkpointing()
    denoiser: Any = prepare(tiny_hunyuan_dit_transformer())
    recomputed: list[object] = []

    def recompute(block: Any, *inputs: Any) -> Tensor:
        recomputed.append(block)
        return checkpoint(block, *inputs, use_reentrant=False)

    denoiser.enable_gradient_checkpointing(recompute)
    assert denoiser.is_gradient_checkpointing
    output = denoiser(**inputs_of(denoiser), return_dict=False)[0]
    assert recomputed == list(denoiser.blocks)
    assert {type(block).__name__ for block in recomputed} == {"HunyuanDiTBlock"}
    plain = tiny_hunyuan_dit_transformer()(**inputs_of(denoiser), return_dict=False)[0]
    assert torch.equal(output, plain)
    denoiser.disable_gradient_checkpointing()
    denoiser(**inputs_of(denoiser))
    assert len(recomputed) == len(denoiser.blocks)


def inputs_of(denoiser: HunyuanDiT2DModel, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    return {
        "hidden_states": randn(1, 4, 8, 8),
        "timestep": torch.tensor([999.0]),
        "encoder_hidden_states": randn(1, 77, 16),
        "text_embedding_mask": torch.ones(1, 77, dtype=torch.long),
        "encoder_hidden_states_t5": randn(1, 256, 16),
        "text_embedding_mask_t5": torch.ones(1, 256, dtype=torch.long),
        "image_meta_size": torch.tensor([[1023.0, 1023, 1023, 1023, 0, 0]]),
        "style": torch.zeros(1, dtype=torch.long),
        "image_rotary_emb": (torch.ones(16, 8), torch.zeros(16, 8)),
    }


def test_bfloat16_does_not_round_times_and_sizes() -> None:
    """999 is 1000 there; diffusers' class takes its time in the dtype of its weights alone."""
    denoiser: Any = tiny_hunyuan_dit_transformer().to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="same dtype"):
        denoiser(**inputs_of(denoiser, torch.bfloat16))
    embedded: dict[str, Tensor] = {}
    for name in ("time_proj", "size_proj"):
        projection = getattr(denoiser.time_extra_emb, name)
        projection.register_forward_hook(lambda _, inputs, __, name=name: embedded.update({name: inputs[0]}))
    prepare(denoiser)(**inputs_of(denoiser, torch.bfloat16))
    assert embedded["time_proj"].tolist() == [999.0]
    assert embedded["size_proj"].tolist()[:2] == [1023.0, 1023.0]


def test_a_half_precision_pipeline_gives_exact_times(folders: dict[str, Path]) -> None:
    family = hunyuan(folders["v1_1"], torch.bfloat16)
    denoiser: Any = family.load_denoiser()
    seen: list[Tensor] = []
    denoiser.time_extra_emb.time_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    latents = family.pipeline(denoiser)("a", height=64, width=64, num_inference_steps=3, output_type="latent").images
    scheduler = family.make_scheduler()
    scheduler.set_timesteps(3)
    assert [times[0].item() for times in seen] == scheduler.timesteps.tolist()
    assert latents.dtype == torch.float32


def test_no_adapter_sits_on_the_text_pooler() -> None:
    spec = get_spec("hunyuan_dit")
    for settings in (LoraSettings(rank=2, targets=("all-linear",)), {"algo": "lokr", "linear_dim": 2}):
        denoiser = prepare(tiny_hunyuan_dit_transformer())
        attach: Any = attach_lora if isinstance(settings, LoraSettings) else attach_lycoris
        trained = attach(denoiser, settings, spec, torch.float32, seed=0).trainable_parameters()
        assert any("timestep_embedder" in name for name in trained)
        assert not any("pooler" in name for name in trained)
    with pytest.raises(ConfigError, match="adapts no layer"):
        attach_lora(denoiser, LoraSettings(rank=2, targets=("*.pooler.q_proj",)), spec, torch.float32, seed=0)
