"""Qwen-Image 2.1 against what diffusers' pipeline and training script gave, and against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Conditioning, PromptEmbeds, PromptImage
from simpletuner.errors import DataError
from simpletuner.models.family import ModelFamily
from simpletuner.models.patches import flatten
from simpletuner.models.qwen_image_21.family import QwenImage21
from tests.end_to_end.test_edit_pairs import entries, write_pairs
from tests.golden_cases import assert_near, assert_trains_as, family_of
from tests.runs import metrics, train_here, write_run
from tests.tiny_qwen_image_21 import GOLDEN, tiny_qwen_image_21_folder

# How far the recorded images are from what diffusers' own decoder makes of the golden latents on other processors:
# 1.3e-5 to 2.3e-5 of the largest value; double precision 1.5e-5. Ours is compared with diffusers' here.
DECODED = 5e-5
PROMPTS = ["a red fox in the snow, at dusk", "two blue cups", ""]
CASES = {
    case["file"].removesuffix(".safetensors"): case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return family_of("qwen_image_21", tiny_qwen_image_21_folder(tmp_path_factory.mktemp("model")))


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def references_of(tensors: dict[str, Tensor], kind: str) -> list[Tensor]:
    return [tensors[f"reference_{k}{kind}"] for k in range(9) if f"reference_{k}{kind}" in tensors]


@pytest.mark.parametrize("number", [0, 2])
def test_the_states_are_the_last_ones_before_the_final_norm(family: ModelFamily, number: int):
    expected = golden(f"prompt_{number}")
    [found] = family.encode_prompts([PROMPTS[number]])
    assert_near(found.tensors["prompt_embeds"], expected["prompt_embeds"])
    difference = (found.tensors["prompt_embeds"] - expected["prompt_embeds_after_norm"]).abs().max()
    assert difference > 0.1
    assert not found.tensors["image_slots"].any()


def test_a_long_prompt_loses_its_end_and_keeps_the_template(family: ModelFamily, monkeypatch):
    monkeypatch.setattr(type(family), "max_prompt_tokens", 60)
    tokenizer, before = family.encoders.tokenizer("processor"), family.num_cut_prompts
    read: list[Tensor] = []
    encoder = family.encoders.encoder()
    hook = encoder.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    [rows] = family.encode_prompts(["word " * 30])
    hook.remove()
    assert len(rows.tensors["prompt_embeds"]) == 60
    assert tokenizer.decode(read[0][0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert family.num_cut_prompts == before + 1


def test_latents_have_an_opaque_alpha_and_images_lose_it(family: ModelFamily):
    case, vae = golden("vae_case"), family.load_vae()
    moments = family.encode_images(vae, case["pixels"])  # with an alpha of their own
    assert_near(torch.stack([each.mean for each in moments]), case["posterior_mean"])
    assert_near(torch.stack([each.std for each in moments]), case["posterior_std"])
    decoded = family.decode_latents(vae, case["latents"])
    assert_near(decoded, diffusers_decoding(family, case["latents"]), 1e-6)
    assert_near(decoded, case["decoded"][:, :3], DECODED)
    opaque = torch.cat([case["pixels"][:, :3], torch.ones(2, 1, 64, 96)], dim=1)
    three, four = (family.encode_images(vae, each)[0].mean for each in (opaque[:, :3], opaque))
    assert torch.equal(three, four)


def diffusers_decoding(family: ModelFamily, latents: Tensor) -> Tensor:
    """(B, 3, H, W): latents as `pipeline_qwenimage21.py` decodes them, without their alpha."""
    vae = AutoencoderKLQwenImage21.from_pretrained(Path(family.source.model) / "vae").eval()
    mean, deviation = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    with torch.no_grad():
        return vae.decode(latents[:, :, None] / (1 / deviation) + mean).sample[:, :3, 0]


@pytest.mark.parametrize("name", ["t2i", "guided", "reference", "references"])
def test_the_pipeline_makes_the_calls_and_the_image_of_diffusers(family: QwenImage21, name: str, monkeypatch):
    """From text and images on: states, places of references, latents, guidance, steps."""
    case, tensors = CASES[name], golden(name)
    images = [Image.fromarray(each.numpy()) for each in references_of(tensors, ".picture")]
    denoiser = family.load_denoiser()
    calls: list[tuple[dict[str, Any], Tensor]] = []
    denoiser.register_forward_hook(lambda _, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True)
    seen: list[Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(found["latents"])
        return found

    pipeline = family.pipeline(denoiser, family.load_vae())
    monkeypatch.setattr(family, "reference_area", case["output_resolution"] ** 2, raising=False)
    for image, expected in zip(images, references_of(tensors, ".latents"), strict=True):
        assert_near(pipeline.encode_fitted(family.fit_reference(image))[None], expected)
    images = pipeline(
        case["prompts"],
        case["negative_prompt"],
        height=case["height"],
        width=case["width"],
        num_inference_steps=case["steps"],
        guidance_scale=case["true_cfg_scale"],
        latents=tensors["latents"],
        references=[images],
        callback_on_step_end=keep,
        output_type="pt",
    ).images
    assert_near(pipeline.scheduler.sigmas, tensors["scheduler_sigmas"])
    assert len(calls) == case["steps"] * case["calls_per_step"]
    for call in range(case["calls_recorded"]):
        arguments, output = calls[call]
        for part in ("hidden_states", "timestep"):
            assert_near(arguments[part], tensors[f"call_{call}.{part}"])
        if f"call_{call}.encoder_hidden_states" in tensors:
            assert_near(arguments["encoder_hidden_states"], tensors[f"call_{call}.encoder_hidden_states"])
        assert_near(output, flatten(tensors[f"call_{call}.output"]))
    assert_near(seen[-1], tensors["final_latents"])
    assert_near(images, diffusers_decoding(family, seen[-1]) / 2 + 0.5, 1e-6)
    assert_near(images, tensors["image"][:, :3], 5 * DECODED)


def test_rows_of_a_batch_are_as_each_alone(family: ModelFamily):
    """The public pipeline pads them, and counts the padding as places: its shorter row is wrong."""
    tensors = golden("batch")
    embeds = family.encode_prompts(CASES["batch"]["prompts"])
    denoiser, sigmas = family.load_denoiser(), tensors["call_0.timestep"]
    with torch.no_grad():
        found = family.predict(denoiser, tensors["latents"], sigmas, family.condition_on(embeds, ()))
    for row in range(2):
        assert_near(embeds[row].tensors["prompt_embeds"], tensors[f"alone_{row}.encoder_hidden_states"][0])
        assert_near(found[row], tensors[f"alone_{row}.output"][0])
    theirs = tensors["call_0.output"]
    assert (found[1] - theirs[1]).abs().max() > 0.03 * theirs.abs().max()


def test_a_step_of_training_has_the_loss_and_the_gradients_of_the_public_script(family: ModelFamily):
    tensors = golden("training")
    length = tensors["prompt_embeds"].shape[1]

    def conditioning() -> Conditioning:
        row = {"prompt_embeds": tensors["prompt_embeds"][0], "image_slots": tensors["img_mask"][0, :length]}
        return family.condition_on([PromptEmbeds(row)], [[each[0] for each in references_of(tensors, "")]])

    assert_trains_as(family, tensors, conditioning)


def test_the_way_through_the_network_is_that_of_diffusers(family: ModelFamily):
    """Also with two references side by side in the text, and for a batch."""
    generator = torch.Generator().manual_seed(0)
    ours = family.load_denoiser()
    theirs = QwenImage21Transformer2DModel.from_pretrained(Path(family.source.model) / "transformer").eval()
    shapes = ((1, 2, 4), (1, 4, 2), (1, 6, 4))
    length = 12
    mask = torch.zeros(length + 6, dtype=torch.bool)
    mask[3:7] = mask[length:] = True
    tokens = torch.randn(2, sum(math.prod(shape) for shape in shapes), 64, generator=generator)
    text, sigmas = torch.randn(2, length, 16, generator=generator), torch.tensor([0.3, 0.8])
    options = {"hidden_states": tokens, "encoder_hidden_states": text, "timestep": sigmas}
    with torch.no_grad():
        [found] = ours(img_shapes=shapes, image_slots=tuple(mask[:length].tolist()), **options)
        [expected] = theirs(img_shapes=[list(shapes)] * 2, img_mask=mask.expand(2, -1), return_dict=False, **options)
    assert torch.equal(found, expected[:, -24:])


@pytest.mark.parametrize(("side", "mu"), [(512, 0.5387), (768, 0.6032), (1024, 0.6935), (1280, 0.8097)])
def test_times_are_shifted_by_the_number_of_latents(family: ModelFamily, side: int, mu: float):
    """mu worked out by hand: 0.5 at 256 latents, 0.9 at 8192."""
    [sigma] = family.sigmas_at(torch.tensor([0.5]), torch.zeros(1, 64, side // 16, side // 16)).tolist()
    assert math.log(sigma / (1 - sigma)) == pytest.approx(mu, abs=1e-4)


def test_forty_steps_at_1024_end_at_the_scheduler_s_last_level(family: ModelFamily):
    pipeline = family.pipeline(torch.nn.Identity())
    levels = pipeline.set_sigmas(40, torch.zeros(1, 64, 64, 64))
    assert [*levels[:3], *levels[-2:]] == pytest.approx([1, 0.98696, 0.97359, 0.06788, 0.02], abs=1e-5)
    assert pipeline.set_sigmas(1, torch.zeros(1, 64, 64, 64)) == [1.0]  # nothing to stretch


def test_turbo_steps_along_its_own_levels(tmp_path: Path):
    folder = tiny_qwen_image_21_folder(tmp_path / "turbo")
    own = [1, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568]
    index = json.loads((folder / "model_index.json").read_text()) | {"sample_sigmas": own}
    (folder / "model_index.json").write_text(json.dumps(index))
    pipeline = family_of("qwen_image_21", folder).pipeline(torch.nn.Identity())
    assert pipeline.first_sigmas(8) == own
    assert pipeline.first_sigmas(4) == [1, 0.75, 0.5, 0.25]


def test_references_of_other_sizes_than_the_encoder_saw_are_an_error(family: ModelFamily):
    image = Image.new("RGB", (64, 64), "red")
    [row] = family.encode_prompts(["a cat"], [[PromptImage.of(image)]])
    assert int(row.tensors["image_slots"].sum()) == 4
    latents, denoiser = torch.zeros(1, 64, 4, 4), family.load_denoiser()
    for references in ([[torch.zeros(64, 2, 4)]], [[]]):
        conditioning = family.condition_on([row], references)
        with pytest.raises(ValueError, match="img_shapes accounts for"):
            family.predict(denoiser, latents, torch.tensor([0.5]), conditioning)
    [plain] = family.encode_prompts(["a cat"])
    conditioning = family.condition_on([plain], [[torch.zeros(64, 4, 4)]])
    with pytest.raises(ValueError, match="img_shapes accounts for"):
        family.predict(denoiser, latents, torch.tensor([0.5]), conditioning)
    with pytest.raises(DataError, match="takes no reference of 48 x 64 pixels"):
        family.encode_prompts(["a cat"], [[PromptImage.of(Image.new("RGB", (48, 64)))]])


@pytest.mark.slow
def test_a_run_learns_from_pairs_and_generates_with_the_reference(tmp_path: Path, monkeypatch):
    """Captions are encoded together with the references, and all of them before the denoiser is there."""
    events: list[str] = []
    for method in ("_encode", "load_denoiser"):
        original = getattr(QwenImage21, method)

        def note(*args: Any, original: Any = original, method: str = method) -> Any:
            events.append(method)
            return original(*args)

        monkeypatch.setattr(QwenImage21, method, note)
    monkeypatch.setattr(QwenImage21, "reference_area", 32 * 32)
    write_pairs(tmp_path, "pairs", 3, seed=1)
    write_pairs(tmp_path, "held-out", 1, seed=2)
    data = [*entries("pairs", random_flip=True), *entries("held-out", dataset_type="eval")]
    options = {
        "model_family": "qwen_image_21",
        "model_type": "lora",
        "lora_type": "standard",
        "caption_dropout_probability": 0.5,
        "train_batch_size": 2,
        "max_train_steps": 3,
        "eval_steps_interval": 3,
        "num_eval_images": 1,
        "eval_timesteps": 1,
        "validation_disable": False,
        "validation_prompt": "turn it green",
        "validation_resolution": "32",
        "validation_num_inference_steps": 2,
        "checkpoint_step_interval": 0,
    }
    model = tiny_qwen_image_21_folder(tmp_path / "model")
    output = train_here(write_run(tmp_path, model, data, **options))
    assert len(metrics(output, "step_done")) == 3
    assert list((output / "validation_images").glob("*.png"))
    assert "_encode" in events
    assert "_encode" not in events[events.index("load_denoiser") :]


def test_a_saved_network_is_diffusers_own(family: QwenImage21, tmp_path: Path):
    family.load_denoiser().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "QwenImage21Transformer2DModel"
    again = QwenImage21Transformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in family.load_denoiser().state_dict().items())
