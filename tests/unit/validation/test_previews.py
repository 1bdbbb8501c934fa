"""Previews: what they show, by samplers whose answer is known, and on the shipped model, which really generates."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from simpletuner.examples import example_dir
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.reporting.events import PreviewMade
from simpletuner.validation.files import ImageFiles
from simpletuner.validation.previews import Previews, _noise_share, foreseen, sampler_sigmas, to_images
from simpletuner.validation.prompts import GenerationSettings, ImageRequest
from simpletuner.validation.sampling import make_images

SETTINGS = GenerationSettings(20, 2.5, "<cfg>")
REQUESTS = [
    ImageRequest("circle", "a red circle on a white background", 64, 64, 1, SETTINGS),
    ImageRequest("triangle", "a small green triangle on a black background", 64, 64, 3, SETTINGS),
]


def test_by_hand_the_clean_latents_follow_from_two_steps() -> None:
    # clean 2, noise 10: at sigma 0.8 latents are 0.2 * 2 + 0.8 * 10 = 8.4, at 0.6 they are 0.4 * 2 + 0.6 * 10 = 6.8.
    assert foreseen(torch.tensor(6.8), torch.tensor(8.4), 0.6, 0.8).item() == pytest.approx(2.0, abs=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
def test_along_a_flow_sampler_the_clean_latents_are_foreseen_at_each_step(inverted: bool) -> None:
    options = {"invert_sigmas": True, "num_train_timesteps": 1} if inverted else {"shift": 3.0}
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 6)[:-1])
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    # Samplers that count from noise to data are given data - noise (OmniGen), the others noise - data.
    velocity = clean - noise if inverted else noise - clean
    check_foreseen(scheduler, noise, clean, lambda latents: velocity)


def test_along_an_epsilon_sampler_the_clean_latents_are_foreseen_at_each_step() -> None:
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear")
    scheduler.set_timesteps(7)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    check_foreseen(scheduler, clean + noise * scheduler.sigmas[0], clean, lambda latents: noise)


@pytest.mark.parametrize("sampler", [DDIMScheduler, PNDMScheduler])
def test_along_ddim_and_pndm_the_clean_latents_are_foreseen(sampler: Any, tmp_path: Path) -> None:
    """PNDM takes a step more than it was asked for, and its second two times."""
    options = {"skip_prk_steps": True} if sampler is PNDMScheduler else {"clip_sample": False}
    scheduler = sampler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, **options)
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    recorder = Recorder(tmp_path, 1, "epsilon")
    callback = recorder.watch(10, "ema")([ImageRequest("a", "p", 8, 8, 1, GenerationSettings(6, 1.0))])
    for index, timestep in enumerate(scheduler.timesteps):
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        callback(SimpleNamespace(scheduler=scheduler), index, timestep, {"latents": latents})
    unknown = (0, 1) if sampler is PNDMScheduler else (0,)  # the first step has none before it
    for index, shown in enumerate(recorder.shown):
        assert torch.allclose(shown, clean, atol=1e-4) == (index not in unknown)
    levels = [event.sigma for event in recorder.events]
    assert levels == sorted(levels, reverse=True)
    assert {event.num_sampling_steps for event in recorder.events} == {len(scheduler.timesteps)}
    last = 0.0 if sampler is DDIMScheduler else 0.00085**0.5 / (0.99915**0.5 + 0.00085**0.5)
    assert levels[-1] == pytest.approx(last, abs=1e-5)


@pytest.mark.parametrize("sampler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("is_flow", [False, True])
def test_dpm_solver_and_unipc_show_what_they_foresee_themselves(sampler: Any, is_flow: bool, tmp_path: Path) -> None:
    """Not their latents, which are mixed of two steps."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0} if is_flow else {}
    scheduler = sampler(beta_start=0.0001, beta_end=0.02, **flow)
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    recorder = Recorder(tmp_path, 1, "flow" if is_flow else "epsilon")
    callback = recorder.watch(10, "ema")([ImageRequest("a", "p", 8, 8, 1, GenerationSettings(6, 1.0))])
    for index, timestep in enumerate(scheduler.timesteps):
        answer = noise - clean if is_flow else noise
        latents = scheduler.step(answer, timestep, latents, return_dict=False)[0]
        callback(SimpleNamespace(scheduler=scheduler), index, timestep, {"latents": latents})
    for shown in recorder.shown:
        torch.testing.assert_close(shown, clean, rtol=0, atol=1e-4)
    levels = [event.sigma for event in recorder.events]
    assert levels == sorted(levels, reverse=True)
    assert levels[-1] == pytest.approx(0.0, abs=1e-6)


def check_foreseen(scheduler: Any, latents: Tensor, clean: Tensor, predict: Any) -> None:
    sigmas = sampler_sigmas(scheduler)
    assert sigmas is not None
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == pytest.approx(0.0, abs=1e-6)
    for index, timestep in enumerate(scheduler.timesteps):
        previous, latents = latents, scheduler.step(predict(latents), timestep, latents, return_dict=False)[0]
        shown = foreseen(latents, previous, sigmas[index + 1], sigmas[index])
        torch.testing.assert_close(shown, clean, rtol=0, atol=1e-4)


class Recorder(Previews):
    """Keeps what would be decoded."""

    def __init__(self, tmp_path: Path, every: int, prediction_type: str = "flow"):
        spec = SimpleNamespace(prediction_type=prediction_type)
        family: Any = SimpleNamespace(spec=spec, unpack_latents=lambda latents, height, width: latents)
        family.decode_preview = self.decode
        self.shown: list[Tensor] = []
        self.events: list[PreviewMade] = []
        super().__init__(family, torch.nn.Identity(), every, ImageFiles(tmp_path, [], {}), self.events.append)

    def decode(self, decoder: Any, latents: Tensor) -> Tensor:
        self.shown.append(latents)
        return torch.zeros(len(latents), 3, 8, 8)


def test_a_sampler_with_its_own_history_shows_its_latents_as_they_are(tmp_path: Path) -> None:
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(4)
    recorder = Recorder(tmp_path, 2, "epsilon")
    callback = recorder.watch(10, "ema")([ImageRequest("a", "p", 8, 8, 1, GenerationSettings(4, 1.0))])
    given = [torch.full((1, 4, 1, 1), float(index)) for index in range(4)]
    for index, latents in enumerate(given):
        assert callback(SimpleNamespace(scheduler=scheduler), index, 0, {"latents": latents}) == {"latents": latents}
    assert [tensor.mean() for tensor in recorder.shown] == [1.0, 3.0]
    assert [(event.sampling_step, event.sigma) for event in recorder.events] == [(2, 0.5), (4, 0.0)]
    assert recorder.events[0].image.path.name == "step_10_a_0_8x8_ema_at_2.png"


def test_a_preview_of_every_third_step_compares_it_with_the_step_before(tmp_path: Path) -> None:
    """By hand: sigmas 1, 0.8, 0.6, 0.4, 0.2, 0; clean 2, noise 10: latents are (1 - sigma) * 2 + sigma * 10."""
    sigmas = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]
    flow = type("FlowMatchEulerDiscreteScheduler", (), {})()
    flow.config, flow.sigmas, flow.timesteps = {}, torch.tensor(sigmas), torch.arange(5)
    recorder = Recorder(tmp_path, 3)
    callback = recorder.watch(10, "ema")([ImageRequest("a", "p", 8, 8, 1, GenerationSettings(5, 1.0))])
    for index, sigma in enumerate(sigmas[1:]):
        latents = torch.full((1, 4, 1, 1), (1 - sigma) * 2 + sigma * 10)
        callback(SimpleNamespace(scheduler=flow), index, 0, {"latents": latents})
    [shown] = recorder.shown
    assert shown.mean().item() == pytest.approx(2.0, abs=1e-4)
    [event] = recorder.events
    assert (event.step, event.sampling_step, event.num_sampling_steps) == (10, 3, 5)
    assert event.sigma == pytest.approx(0.4)


def test_the_noise_that_is_left_is_counted_as_the_flow_counts_it() -> None:
    assert _noise_share(None, 0, "epsilon", 4) == 0.75
    assert _noise_share([9.0, 3.0], 0, "epsilon", 1) == 0.75
    assert _noise_share([1.0, 0.25], 0, "flow", 1) == 0.25
    assert _noise_share([math.inf, math.inf], 0, "epsilon", 1) == 1.0


def test_pixels_from_minus_one_to_one_are_shades_from_0_to_255_and_others_are_clipped() -> None:
    pixels = torch.tensor([-1.0, 1.0, -3.0, 3.0, 0.0, 0.5]).repeat(1, 3, 2, 1)
    [image] = to_images(pixels)
    assert image.size == (6, 2)
    assert [image.getpixel((x, 1))[2] for x in range(6)] == [0, 255, 0, 255, 128, 191]


@pytest.fixture(scope="module")
def previews(tmp_path_factory: pytest.TempPathFactory) -> list[PreviewMade]:
    """Every fifth step of two images that the shipped model generates in twenty."""
    folder = tmp_path_factory.mktemp("previews")
    model = ModelSource(str(example_dir("omnigen-tiny") / "model"))
    family = OmniGen(OMNIGEN, model, torch.device("cpu"), torch.float32)
    events: list[PreviewMade] = []
    files = ImageFiles(folder, REQUESTS, {})
    watcher = Previews(family, family.load_preview_decoder(), 5, files, events.append)
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = make_images(pipeline, REQUESTS, batch_size=2, watch=watcher.watch(250, "live"))
    for image in images:
        image.image.save(folder / f"{image.request.shortname}.png")
    return events


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


def test_twenty_steps_and_every_fifth_give_four_previews_of_each_image(previews: list[PreviewMade]) -> None:
    for request in REQUESTS:
        mine = [event for event in previews if event.image.shortname == request.shortname]
        assert [(event.sampling_step, event.num_sampling_steps) for event in mine] == [
            (5, 20),
            (10, 20),
            (15, 20),
            (20, 20),
        ]
        assert [event.sigma for event in mine] == pytest.approx([0.75, 0.5, 0.25, 0.0])
        assert {(event.step, event.image.prompt, event.image.kind) for event in mine} == {(250, request.prompt, "live")}
        assert {(event.image.width, event.image.height, event.image.seed) for event in mine} == {(64, 64, request.seed)}
        name = f"step_250_{request.shortname}_0_64x64_at_5.png"
        assert mine[0].image.path.parts[-3:] == ("validation_images", "previews", name)


def test_previews_come_nearer_to_the_image_with_each_step(previews: list[PreviewMade]) -> None:
    for request in REQUESTS:
        paths = [event.image.path for event in previews if event.image.shortname == request.shortname]
        finished = pixels(paths[0].parents[2] / f"{request.shortname}.png")
        distances = [np.abs(pixels(path) - finished).mean() for path in paths]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 0.75 * distances[0]


def test_the_first_preview_is_an_image_already_and_not_noise(previews: list[PreviewMade]) -> None:
    """A quarter of the way the latents are three quarters noise; what the model foresees has the right colors."""
    circle, triangle = (
        next(e for e in previews if e.sampling_step == 5 and e.image.shortname == r.shortname) for r in REQUESTS
    )
    red, green, blue = pixels(circle.image.path)[28:36, 28:36].mean(axis=(0, 1))
    assert red > 2 * max(green, blue)
    assert pixels(circle.image.path)[:6].mean() > 220
    red, green, blue = pixels(triangle.image.path)[28:36, 28:36].mean(axis=(0, 1))
    assert green > 1.5 * max(red, blue)
    assert pixels(triangle.image.path)[:6].mean() < 40
