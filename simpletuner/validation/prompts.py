"""Which images validation generates: every prompt at every size, each with its own fixed seed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.config.builtin_prompts import BUILTIN_PROMPTS
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.config.values import parse_sizes
from simpletuner.errors import ConfigError, Problem
from simpletuner.randomness import keyed_seed
from simpletuner.validation.references import ReferenceImage, read_references

MAIN_SHORTNAME, UNCONDITIONAL_SHORTNAME = "validation", "unconditional"


@dataclass(frozen=True)
class SkippedLayers:
    """Guidance away from what the denoiser generates without some of its blocks.

    Source: "skip-layer guidance", github.com/Stability-AI/sd3.5; diffusers' `pipeline_stable_diffusion_3.py`.

    Args:
        layers: numbers of blocks, from 0.
        start, stop: shares of the sampling steps between which they are skipped.
    """

    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2


@dataclass(frozen=True)
class GenerationSettings:
    """How an image is generated; those of one call of a pipeline share it.

    Args:
        steps: inference steps.
        guidance: classifier-free guidance scale.
        negative_prompt: None leaves the family's own default.
        guidance_rescale: 0 is none; only for pipelines that have it.
        true_guidance: real guidance of a distilled model; 1 is none.
        image_guidance: guidance toward the references; None leaves the pipeline's own.
        skipped: only for pipelines that can skip layers.
    """

    steps: int
    guidance: float
    negative_prompt: str | None = None
    guidance_rescale: float = 0.0
    true_guidance: float = 1.0
    skipped: SkippedLayers | None = None
    image_guidance: float | None = None

    def arguments(self) -> dict[str, Any]:
        """Arguments of a pipeline; those that not every pipeline takes only where they are set."""
        arguments: dict[str, Any] = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }
        if self.guidance_rescale:
            arguments["guidance_rescale"] = self.guidance_rescale
        if self.true_guidance != 1:
            arguments["true_cfg_scale"] = self.true_guidance
        if self.image_guidance is not None:
            arguments["img_guidance_scale"] = self.image_guidance
        if self.skipped is not None:
            arguments["skip_guidance_layers"] = list(self.skipped.layers)
            for name in ("scale", "start", "stop"):
                arguments[f"skip_layer_guidance_{name}"] = getattr(self.skipped, name)
        return arguments


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    Args:
        shortname: names its files; the nickname of the prompt library, or `validation`.
        height: pixels.
        width: pixels.
        seed: of its own generator.
        settings: how it is generated.
        index: counts the images of one prompt and size.
        adapter_strength: multiplies what an adapter adds.
        references: the images that are edited.
    """

    shortname: str
    prompt: str
    height: int
    width: int
    seed: int
    settings: GenerationSettings
    index: int = 0
    adapter_strength: float = 1.0
    references: tuple[ReferenceImage, ...] = ()

    @property
    def size_text(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def file_stem(self) -> str:
        """The shortname as a file name can hold it."""
        return re.sub(r"[/\\\x00-\x1f]", "-", self.shortname)

    @property
    def title(self) -> str:
        """Names the image within one validation: shortname, size, and its number where there are several."""
        return f"{self.shortname}_{self.size_text}" + (f"_{self.index}" if self.index else "")


def requests_from_config(
    config: TrainConfig,
    prompt_library: Mapping[str, LibraryPrompt] | None,
    size_multiple: int,
    max_size: int | None = None,
    empty_prompt: str = "",
    references: tuple[ReferenceImage, ...] = (),
) -> tuple[list[ImageRequest], list[str]]:
    """Every prompt at every of its sizes, as many times as asked.

    Args:
        prompt_library: nickname -> prompt.
        size_multiple: pixels; sides are rounded to it.
        max_size: pixels; largest side that the family takes.
        empty_prompt: what the family calls a caption of nothing.
        references: input images of prompts that name none of their own; the empty one has none.

    Returns:
        The requests (none where there is no prompt), and what a person should know of them.

    Raises:
        ConfigError: a size that is too large for the family.
        DataError: a reference cannot be read.
    """
    options = config.validation
    if options.validation_disable:
        return [], []
    seed = config.training.seed if options.validation_seed is None else options.validation_seed
    requests: list[ImageRequest] = []
    notices: list[str] = []
    for shortname, prompt in all_prompts(options, prompt_library, empty_prompt).items():
        sizes, reported = rounded_sizes(
            parse_sizes(prompt.resolution or options.validation_resolution), size_multiple, max_size
        )
        notices += reported
        seen = references if shortname != UNCONDITIONAL_SHORTNAME else ()
        if prompt.references is not None:
            seen = read_references(prompt.references, f"{shortname}.references")
        requests += _requests_of(options, seed, shortname, prompt, sizes, seen)
    return requests, list(dict.fromkeys(notices))


def all_prompts(
    options: ValidationOptions, prompt_library: Mapping[str, LibraryPrompt] | None, empty_prompt: str
) -> dict[str, LibraryPrompt]:
    """Shortname -> prompt: the main one, the built-in library, the user's own (which wins), the empty one."""
    prompts = {MAIN_SHORTNAME: LibraryPrompt(options.validation_prompt)} if options.validation_prompt else {}
    if options.validation_prompt_library:
        prompts |= {nickname: LibraryPrompt(prompt) for nickname, prompt in BUILTIN_PROMPTS.items()}
    prompts |= prompt_library or {}
    if not options.validation_disable_unconditional:
        prompts[UNCONDITIONAL_SHORTNAME] = LibraryPrompt(empty_prompt)
    return prompts


def _requests_of(
    options: ValidationOptions,
    run_seed: int,
    shortname: str,
    prompt: LibraryPrompt,
    sizes: Sequence[tuple[int, int]],
    references: tuple[ReferenceImage, ...],
) -> Iterator[ImageRequest]:
    """What the prompt itself says comes before what the configuration says."""
    seed = run_seed if prompt.seed is None else prompt.seed
    settings = settings_of(options, prompt)
    strength = _first(prompt.adapter_strength, options.validation_lycoris_strength)
    for height, width in sizes:
        for index in range(_first(prompt.num_images, options.num_validation_images)):
            yield ImageRequest(
                shortname, prompt.prompt, height, width, seed + index, settings, index, strength, references
            )


def settings_of(options: ValidationOptions, prompt: LibraryPrompt | None = None) -> GenerationSettings:
    """How images are generated; what a prompt itself says comes first."""
    own = prompt or LibraryPrompt("")
    return GenerationSettings(
        steps=_first(own.num_inference_steps, options.validation_num_inference_steps),
        guidance=_first(own.guidance, options.validation_guidance),
        negative_prompt=_first(own.negative_prompt, options.validation_negative_prompt),
        guidance_rescale=_first(own.guidance_rescale, options.validation_guidance_rescale),
        true_guidance=options.validation_guidance_real,
        skipped=_skipped_layers(options),
        image_guidance=options.validation_guidance_image,
    )


def _skipped_layers(options: ValidationOptions) -> SkippedLayers | None:
    if options.validation_guidance_skip_layers is None:
        return None
    return SkippedLayers(
        options.validation_guidance_skip_layers,
        options.validation_guidance_skip_scale,
        options.validation_guidance_skip_layers_start,
        options.validation_guidance_skip_layers_stop,
    )


def reseeded(requests: Sequence[ImageRequest], step: int) -> list[ImageRequest]:
    """The same images with other seeds at each step, and the same ones again when the step is repeated."""
    return [
        dataclasses.replace(request, seed=keyed_seed(request.seed, "validation", step) % 2**32) for request in requests
    ]


def rounded_sizes(
    sizes: Sequence[tuple[int, int]], multiple: int, max_size: int | None
) -> tuple[list[tuple[int, int]], list[str]]:
    """(height, width) pairs that the family can generate, without doubles, and one notice for each that had to change.

    Raises:
        ConfigError: a side above `max_size`.
    """
    rounded, notices = [], []
    for height, width in sizes:
        new_height, new_width = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
        if max_size is not None and max(new_height, new_width) > max_size:
            raise ConfigError(
                Problem(
                    f"{width}x{height} is larger than this model can generate",
                    key="validation_resolution",
                    allowed=f"sides up to {max_size} pixels",
                )
            )
        if (new_height, new_width) != (height, width):
            notices.append(
                f"{width}x{height} becomes {new_width}x{new_height}: this model's sides are multiples of {multiple}"
            )
        rounded.append((new_height, new_width))
    return list(dict.fromkeys(rounded)), notices


def _first(*values: Any) -> Any:
    """The first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
