"""Generating with OmniGen2: which predictions guidance compares, the steps of both samplers, sizes of references."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.omnigen2.pipeline import fit_reference
from simpletuner.validation.schedulers import use_scheduler
from tests.tiny_omnigen2 import tiny_omnigen2_folder

STEPS, HEIGHT, WIDTH = 5, 64, 96
PROMPT, NEGATIVE = "add a hat", "blurry"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    spec = get_spec("omnigen2")
    folder = tiny_omnigen2_folder(tmp_path_factory.mktemp("omnigen2"))
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noise() -> Tensor:
    return torch.randn(1, 16, HEIGHT // 8, WIDTH // 8, generator=torch.Generator().manual_seed(3))


def generate(family: ModelFamily, references: list[Image.Image] | None = None, **options: Any) -> Tensor:
    """Latents, and with them how often the denoiser was called, by whether it saw references."""
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    if scheduler := options.pop("scheduler", None):
        use_scheduler(pipeline, scheduler)
    arguments = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS, "output_type": "latent", **options}
    return pipeline(
        PROMPT, NEGATIVE, latents=noise(), references=None if references is None else [references], **arguments
    ).images


class ByHand:
    """The original's sampling, written down anew: t from 0 on noise to 1 on data, the answer is `data - noise`."""

    def __init__(self, family: ModelFamily, reference: Tensor | None):
        self.denoiser = family.load_denoiser()
        self.text = {
            prompt: family.encode_prompts([prompt])[0].tensors["prompt_embeds"][None] for prompt in (PROMPT, NEGATIVE)
        }
        self.reference = reference

    def answer(self, latents: Tensor, time: float, prompt: str, sees: bool) -> Tensor:
        references = [[self.reference]] if sees and self.reference is not None else None
        with torch.no_grad():
            return self.denoiser(latents, torch.tensor([time]), self.text[prompt], None, references)

    def guided(self, latents: Tensor, time: float, text_scale: float, image_scale: float) -> Tensor:
        asked = self.answer(latents, time, PROMPT, True)
        if text_scale <= 1:
            return asked
        nothing = self.answer(latents, time, NEGATIVE, False)
        if image_scale <= 1 or self.reference is None:
            return nothing + text_scale * (asked - nothing)
        images = self.answer(latents, time, NEGATIVE, True)
        return nothing + image_scale * (images - nothing) + text_scale * (asked - images)

    def times(self) -> list[float]:
        shift = math.sqrt(HEIGHT // 8 * (WIDTH // 8)) / 40
        plain = [number / STEPS for number in range(STEPS)]
        return [time / (shift - shift * time + time) for time in plain] + [1.0]

    def euler(self, text: float, image: float, guided: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        latents, times = noise(), self.times()
        for number, (now, then) in enumerate(itertools.pairwise(times)):
            scales = (text, image) if guided[0] <= number / STEPS <= guided[1] else (1.0, 1.0)
            latents = latents + (then - now) * self.guided(latents, now, *scales)
        return latents

    def dpm_solver(self, text: float, image: float) -> Tensor:
        """DPM-Solver++(2M), Lu et al. (arXiv 2211.01095), algorithm 2; the first and the last step are of order 1."""
        latents, times = noise(), self.times()
        before: tuple[Tensor, float] | None = None
        for number, (now, then) in enumerate(itertools.pairwise(times)):
            data = latents + (1 - now) * self.guided(latents, now, text, image)
            if then == 1.0:
                return data
            level = math.log(now / (1 - now)) if now else -math.inf
            step = math.log(then / (1 - then)) - level
            shown = data
            if before is not None and number < STEPS - 1:
                ratio = (level - before[1]) / step
                shown = data + (data - before[0]) / (2 * ratio)
            kept = (1 - then) / (1 - now)
            latents = kept * latents - then * math.expm1(-step) * shown
            before = (data, level)
        raise AssertionError


@pytest.mark.parametrize("scales", [(5.0, 2.0), (4.0, 1.0), (1.0, 2.0)], ids=str)
@pytest.mark.parametrize("has_reference", [False, True])
def test_eulers_steps_lead_where_the_original_goes(
    family: ModelFamily, image: Image.Image, has_reference: bool, scales: tuple[float, float]
) -> None:
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    by_hand = ByHand(family, pipeline.encode_reference(image) if has_reference else None)
    references = [image] if has_reference else None
    ours = generate(family, references, guidance_scale=scales[0], img_guidance_scale=scales[1])
    torch.testing.assert_close(ours, by_hand.euler(*scales), rtol=0, atol=1e-4)


def test_guidance_ends_where_its_range_does(family: ModelFamily, image: Image.Image) -> None:
    """0.2 to 0.6 of five steps are the second, third and fourth, both ends included."""
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    by_hand = ByHand(family, pipeline.encode_reference(image))
    ours = generate(family, [image], cfg_range=(0.2, 0.6))
    torch.testing.assert_close(ours, by_hand.euler(5.0, 2.0, (0.2, 0.6)), rtol=0, atol=1e-4)
    assert (ours - by_hand.euler(5.0, 2.0)).abs().max() > 1e-2


def test_the_second_sampler_is_dpm_solver_on_the_same_noise_levels(family: ModelFamily, image: Image.Image) -> None:
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    by_hand = ByHand(family, pipeline.encode_reference(image))
    ours = generate(family, [image], scheduler="dpm++")
    torch.testing.assert_close(ours, by_hand.dpm_solver(5.0, 2.0), rtol=0, atol=1e-4)
    assert (ours - by_hand.euler(5.0, 2.0)).abs().max() > 1e-2


@pytest.mark.slow
def test_several_references_are_seen_in_their_order(family: ModelFamily, image: Image.Image) -> None:
    other = image.rotate(180).crop((0, 0, 32, 48))
    first, second, alone = (generate(family, each) for each in ([image, other], [other, image], [image]))
    assert (first - second).abs().max() > 1e-3
    assert (first - alone).abs().max() > 1e-3


def test_images_drawn_together_are_those_drawn_alone(family: ModelFamily, image: Image.Image) -> None:
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    options = {"height": HEIGHT, "width": WIDTH, "num_inference_steps": 2, "output_type": "latent"}
    prompts, references = [PROMPT, "a longer prompt than that"], [[image], []]
    latents = torch.cat([noise(), noise().flip(1)])
    together = pipeline(prompts, latents=latents, references=references, **options).images
    for row in range(2):
        one = pipeline([prompts[row]], latents=latents[row][None], references=[references[row]], **options).images
        torch.testing.assert_close(together[row], one[0], rtol=0, atol=1e-4)


def test_what_cannot_be_generated_is_refused(family: ModelFamily, image: Image.Image) -> None:
    pipeline = family.pipeline(family.load_denoiser())
    with pytest.raises(ValueError, match="no VAE, so it can take no references"):
        pipeline(PROMPT, height=64, width=64, output_type="latent", references=[[image]])
    with pytest.raises(ValueError, match="multiples of 16, not 64 and 72"):
        pipeline(PROMPT, height=64, width=72, output_type="latent")


@pytest.mark.parametrize(
    ("given", "fitted"),
    [
        ((640, 961), (640, 960)),  # never enlarged, stretched down to whole tokens
        ((4000, 3000), (1024, 768)),  # the longer side
        ((1200, 1200), (1024, 1024)),  # the area
        ((3000, 30), (1024, 16)),  # 10 pixels would be no token
        ((5, 7), (16, 16)),
    ],
)
def test_references_have_the_size_that_the_original_gives_them(given: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_reference(Image.new("RGB", given)).size == fitted


def test_a_reference_is_seen_upright() -> None:
    image = Image.new("RGB", (64, 32), "red")
    image.getexif()[0x0112] = 6  # turned by a quarter
    image.paste("blue", (0, 0, 32, 32))
    turned = fit_reference(image)
    assert turned.size == (32, 64)
    assert turned.getpixel((16, 8)) == (0, 0, 255)
