"""Qwen-Image-Edit: references as further patches, images in front of instructions, and diffusers' own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Conditioning, PromptImage
from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.cache.prompts import PromptCache
from simpletuner.cache.store import TensorStore
from simpletuner.data.digests import DigestMemo
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.patches import unpack
from tests.golden_qwen_image import assert_near, golden_case, golden_family
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder

PROMPT = "make it green"


def family_in(folder: Path) -> ModelFamily:
    spec = get_spec("qwen_image_edit")
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    return family_in(tiny_qwen_image_edit_folder(tmp_path_factory.mktemp("edit")))


def image(color: str = "red", size: tuple[int, int] = (64, 48)) -> Image.Image:
    made = Image.new("RGB", size, color)
    made.paste("yellow", (0, 0, size[0] // 2, size[1] // 3))
    return made


@pytest.mark.parametrize("number", [3, 4, 5, 6])
def test_the_denoiser_answers_as_in_the_pipelines_of_diffusers(tmp_path: Path, number: int) -> None:
    """One reference, two of other sizes, two rows of unequal prompts and times, and the modulation of 2511."""
    case = golden_case(number)
    family = golden_family("qwen_image_edit", tmp_path, "QwenImageEditPlusPipeline", **case.facts["config"])
    with torch.no_grad():
        output = family.predict(
            family.load_denoiser(), case.tensors["latents"], case.tensors["sigma"], case.conditioning()
        )
    assert_near(output, case.tensors["output"])


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}])
def test_rows_whose_references_differ_are_what_they_are_alone(tmp_path: Path, config: dict[str, bool]) -> None:
    family = family_in(tiny_qwen_image_edit_folder(tmp_path, **config))
    denoiser = family.load_denoiser()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 16, 4, 6, generator=generator)
    references = [[torch.randn(16, *size, generator=generator) for size in row] for row in ([(4, 4)], [(6, 4)], [])]
    embeds, sigmas = family.encode_prompts([PROMPT, "a longer instruction", "a"]), torch.tensor([0.2, 0.5, 0.8])
    conditioning = family.condition_on(embeds, references)
    with torch.no_grad():
        together = family.predict(denoiser, latents, sigmas, conditioning)
        for row in range(3):
            one = slice(row, row + 1)
            alone = family.condition_on(embeds[one], references[one])
            assert_near(together[one], family.predict(denoiser, latents[one], sigmas[one], alone))
            blind = Conditioning(alone.tensors, [()])
            differs = (together[one] - family.predict(denoiser, latents[one], sigmas[one], blind)).abs().max() > 1e-3
            assert differs == bool(references[row])
        of_two_sizes = family.condition_on(embeds[:2], references[:2])  # one each
        assert_near(family.predict(denoiser, latents[:2], sigmas[:2], of_two_sizes), together[:2])


@pytest.mark.parametrize(
    ("pipeline_class", "labels", "area"),
    [
        ("QwenImageEditPipeline", False, 1024 * 1024),
        ("QwenImageEditPlusPipeline", True, 384 * 384),
        ("SomethingElse", True, 384 * 384),
    ],
)
def test_the_class_of_the_pipeline_says_how_images_are_shown(
    tmp_path: Path, pipeline_class: str, labels: bool, area: int
) -> None:
    family = family_in(tiny_qwen_image_edit_folder(tmp_path, pipeline_class))
    assert (family.labels_images, family.encoder_area) == (labels, area)


def test_an_image_takes_the_tokens_of_its_area_and_changes_the_states(family: ModelFamily) -> None:
    """384 x 384 pixels of a 64 x 48 image are 448 x 320, for the encoder 448 x 308: 16 x 11 tokens, and 8 + 2 of tags.

    Tokens of the tiny model are bytes: "Picture 1: " has eleven.
    """
    plain, red, green = (
        family.encode_prompts([PROMPT], [row])[0].tensors["prompt_embeds"]
        for row in ([], [PromptImage.of(image())], [PromptImage.of(image("green"))])
    )
    assert len(red) == len(plain) + 16 * 11 + 2 + len("Picture 1: ")
    assert (red[-5:] - green[-5:]).abs().max() > 1e-3
    assert family.count_prompt_tokens([PROMPT]) == [len(plain)]


def test_the_key_of_a_cached_prompt_holds_its_images_and_their_wording(family: ModelFamily, tmp_path: Path) -> None:
    other = family_in(tiny_qwen_image_edit_folder(tmp_path / "edit", "QwenImageEditPipeline"))
    with DigestMemo(tmp_path / "digests.sqlite") as memo:
        assert prompt_fingerprint(family, memo) != prompt_fingerprint(other, memo)
        Path(other.source.model, "processor/preprocessor_config.json").write_text('{"patch_size": 14}')
        assert prompt_fingerprint(other, memo) not in (prompt_fingerprint(family, memo), None)
    assert PromptImage.of(image()) == PromptImage.of(image())
    assert PromptImage.of(image()) != PromptImage.of(image("green"))
    assert PromptImage.of(image(size=(64, 48))) != PromptImage.of(image(size=(48, 64)))


@pytest.mark.slow
def test_a_lora_gives_the_pipeline_of_diffusers_the_trainers_own_images(family: ModelFamily, tmp_path: Path) -> None:
    """With given embeddings, for its own are wrong, and a reference of the size that it makes itself."""
    denoiser = family.load_denoiser()
    adapter = attach_lora(denoiser, LoraSettings(rank=2, alpha=3), family.spec, torch.float32, seed=0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    adapter.save(tmp_path / "lora.safetensors", {})
    reference, size = image(size=(1024, 1024)), {"height": 64, "width": 96}
    pipeline = family.pipeline(denoiser, family.load_vae())
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", **size}
    ours = pipeline(
        PROMPT,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        references=[[reference]],
        **options,
    ).images
    plain = family.pipeline(family.load_denoiser(), pipeline.vae)
    assert (plain(PROMPT, guidance_scale=3.0, latents=torch.zeros(1, 16, 8, 12), **options).images - ours).any()

    stock = diffusers.QwenImageEditPlusPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config),
        vae=family.load_vae(),
        text_encoder=None,
        tokenizer=None,
        processor=None,
        transformer=family.load_denoiser(),
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    seen = [[PromptImage.of(reference)]] * 2
    wanted, unwanted = (each.tensors["prompt_embeds"][None] for each in family.encode_prompts([PROMPT, " "], seen))
    theirs = stock(
        image=[reference],
        prompt_embeds=wanted,
        prompt_embeds_mask=torch.ones(wanted.shape[:2]),
        negative_prompt_embeds=unwanted,
        negative_prompt_embeds_mask=torch.ones(unwanted.shape[:2]),
        true_cfg_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        **options,
    ).images
    torch.testing.assert_close(ours, unpack(theirs, 8, 12), rtol=0, atol=1e-4)


def test_keys_of_texts_alone_are_those_of_earlier_versions(family: ModelFamily, tmp_path: Path) -> None:
    """sha256 of the settings and the text, as JSON with sorted keys."""
    import hashlib
    import json

    from simpletuner.batch import PromptRequest

    with TensorStore(tmp_path) as store:
        cache = PromptCache(store, family, "abc")
        written = json.dumps({"schema": 1, "encoders": "abc", "prompt": "a cat"}, sort_keys=True)
        assert cache.key(PromptRequest("a cat")) == hashlib.sha256(written.encode()).hexdigest()
        images = (PromptImage.of(image()), PromptImage.of(image("green")))
        keys = {cache.key(PromptRequest("a cat", row)) for row in ((), images, images[::-1], images[:1])}
        assert len(keys) == 4
