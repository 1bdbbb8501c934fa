"""Images are the same alone and in a batch, and depend on their own seed only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.config.options.validation import ValidationOptions
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.validation.prompts import GenerationSettings, ImageRequest, SkippedLayers
from simpletuner.validation.references import ReferenceImage
from simpletuner.validation.sampling import batch_size_for, make_images, noise_device


class CountingPipeline:
    """Answers each prompt with an image whose pixel is the first generate of its generator."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        self.calls.append(arguments)
        size = (arguments["width"], arguments["height"])
        shades = [int(torch.randint(0, 256, (1,), generator=g)) for g in arguments["generator"]]
        return SimpleNamespace(images=[Image.new("RGB", size, (shade, 0, 0)) for shade in shades])


SETTINGS = GenerationSettings(5, 2.0, "<cfg>")
REQUESTS = [
    ImageRequest("a", "prompt a", 64, 64, 1, SETTINGS),
    ImageRequest("b", "prompt b", 32, 64, 2, SETTINGS),
    ImageRequest("c", "prompt c", 64, 64, 3, SETTINGS),
    ImageRequest("d", "prompt d", 64, 64, 4, SETTINGS),
]


def test_images_of_one_size_share_a_call_and_come_back_in_the_order_asked():
    pipeline, progress = CountingPipeline(), []
    images = make_images(pipeline, REQUESTS, batch_size=2, on_progress=progress.append)
    assert [call["prompt"] for call in pipeline.calls] == [["prompt b"], ["prompt a", "prompt c"], ["prompt d"]]
    assert [image.request.shortname for image in images] == ["a", "b", "c", "d"]
    assert [image.image.size for image in images] == [(64, 64), (64, 32), (64, 64), (64, 64)]
    assert progress == [1, 3, 4]
    assert pipeline.calls[0]["negative_prompt"] == "<cfg>"
    assert (pipeline.calls[0]["num_inference_steps"], pipeline.calls[0]["guidance_scale"]) == (5, 2.0)


def test_images_with_other_settings_have_a_call_of_their_own_and_rare_arguments_only_where_set():
    rare = {"guidance_rescale", "true_cfg_scale", "skip_guidance_layers"}
    rare |= {f"skip_layer_guidance_{name}" for name in ("scale", "start", "stop")}
    skipped = SkippedLayers((7, 8), stop=0.5)
    other = GenerationSettings(8, 3.0, guidance_rescale=0.7, true_guidance=4.0, skipped=skipped)
    requests = [*REQUESTS[:1], replace(REQUESTS[2], settings=other)]
    pipeline = CountingPipeline()
    images = make_images(pipeline, requests, batch_size=4)
    assert [image.request for image in images] == requests
    calls = {call["num_inference_steps"]: call for call in pipeline.calls}
    assert calls[5].keys() == calls[8].keys() - rare
    assert (calls[8]["skip_guidance_layers"], calls[8]["skip_layer_guidance_stop"]) == ([7, 8], 0.5)
    assert (calls[8]["guidance_rescale"], calls[8]["true_cfg_scale"]) == (0.7, 4.0)
    assert calls[8]["negative_prompt"] is None


def test_images_with_references_of_one_size_share_a_call_and_each_is_given_its_own():
    small, large = (ReferenceImage(str(side), "", Image.new("RGB", (side, side))) for side in (4, 8))
    shown = [(small,), (large,), (small,), ()]
    requests = [replace(REQUESTS[0], seed=n, references=each) for n, each in enumerate(shown)]
    pipeline = CountingPipeline()
    images = make_images(pipeline, requests, batch_size=4)
    assert [image.request for image in images] == requests
    given = [[[image.size[0] for image in row] for row in call.get("references", [])] for call in pipeline.calls]
    assert given == [[], [[4], [4]], [[8]]]


def test_the_watcher_of_a_call_knows_its_images():
    pipeline, watched = CountingPipeline(), []

    def watch(requests: Any) -> Any:
        watched.append([request.shortname for request in requests])
        return len(watched)

    make_images(pipeline, REQUESTS, batch_size=2, watch=watch)
    assert watched == [["b"], ["a", "c"], ["d"]]
    assert [call["callback_on_step_end"] for call in pipeline.calls] == [1, 2, 3]


def test_noise_of_an_image_depends_on_its_seed_alone():
    expected = [int(torch.randint(0, 256, (1,), generator=torch.Generator().manual_seed(r.seed))) for r in REQUESTS]
    for batch_size in (1, 3):
        images = make_images(CountingPipeline(), REQUESTS, batch_size=batch_size)
        assert [image.image.getpixel((0, 0))[0] for image in images] == expected


def test_noise_comes_from_the_device_that_is_asked_for():
    accelerated: Any = SimpleNamespace(device=torch.device("cuda", 1))
    asked = [ValidationOptions(validation_seed_source=source) for source in ("cpu", "gpu")]
    assert [noise_device(options, accelerated) for options in asked] == ["cpu", "cuda:1"]


def test_large_images_are_drawn_singly_and_small_ones_together():
    assert batch_size_for([ImageRequest("a", "p", 1024, 1024, 1, SETTINGS)]) == 1
    assert batch_size_for([ImageRequest("a", "p", 512, 512, 1, SETTINGS)]) == 4
    assert batch_size_for(REQUESTS) == 16
    assert batch_size_for([ImageRequest("a", "p", 1024, 1032, 1, SETTINGS)]) == 1
    assert batch_size_for([ImageRequest("a", "p", 2048, 1024, 1, SETTINGS), *REQUESTS]) == 1
    assert batch_size_for([ImageRequest("a", "p", 256, 264, 1, SETTINGS)]) == 15


@pytest.fixture
def family(omnigen_folder: Path) -> OmniGen:
    return OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def test_a_real_pipeline_draws_the_same_image_alone_and_in_a_batch(family: OmniGen):
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    together = make_images(pipeline, REQUESTS, batch_size=3)
    alone = make_images(pipeline, REQUESTS[2:3])
    difference = np.asarray(together[2].image, dtype=int) - np.asarray(alone[0].image, dtype=int)
    assert np.abs(difference).max() <= 1  # matrix products of other batch sizes differ in the last bits
    assert np.asarray(together[0].image).std() > 0
    assert not np.array_equal(np.asarray(together[0].image), np.asarray(together[2].image))


def test_the_vae_decodes_in_float32_even_under_autocast(family: OmniGen):
    vae, latents = family.load_vae(), torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = family.decode_latents(vae, latents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(family.decode_latents(vae, latents), expected)
