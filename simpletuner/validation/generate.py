"""Draws images outside of a run: a model, optionally an adapter file on top, and what to draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.adapters.files import apply_adapter_file
from simpletuner.cache.prompts import PromptsAhead
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.config.values import parse_sizes
from simpletuner.errors import ConfigError, Problem
from simpletuner.validation.files import write_png
from simpletuner.validation.prompts import ImageRequest, rounded_sizes, settings_of
from simpletuner.validation.references import read_references
from simpletuner.validation.sampling import batch_size_for, make_images, noise_device, pipeline_for

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Args:
        prompts: at least one.
        options: size (the first of `validation_resolution`, rounded to the family's multiple), steps, guidance,
            scheduler and device of the noise, as validation takes them.
        seed: of each prompt's first image; its further ones count up.
        count: images per prompt.
        references: files of input images, for each prompt the same.
    """

    prompts: tuple[str, ...]
    options: ValidationOptions
    seed: int = 42
    count: int = 1
    references: tuple[Path, ...] = ()


def generate_images(
    family: ModelFamily,
    wanted: GenerationRequest,
    adapter_file: Path | None,
    output: Path,
    say: Callable[[str], None] = print,
    strength: float = 1.0,
) -> list[Path]:
    """Generate, and write PNG files; returns their paths in the order of prompts.

    Args:
        adapter_file: safetensors of any adapter format, or None for the model alone.
        output: a `.png` file for a single image, else a folder, where no file is overwritten.
        say: told what a person should know.
        strength: multiplies what the adapter changes.

    Raises:
        DataError: the adapter does not fit, or the images cannot be written.
        ConfigError: a size that the family cannot draw.
    """
    requests = requests_of(wanted, family, say)
    if family.spec.caches_prompt_embeds:
        negative = family.spec.negative_text(wanted.options.validation_negative_prompt)
        seen = [family.prompt_image(each.image) for each in requests[0].references]
        family.prompts = PromptsAhead(family, [*wanted.prompts, negative], seen)
    denoiser = family.load_base()
    if adapter_file is not None:
        for line in apply_adapter_file(denoiser, adapter_file, family.spec, strength).notices:
            say(line)
    denoiser.to(family.device).eval()
    images = make_images(
        pipeline_for(wanted.options, family, denoiser, family.load_vae()),
        requests,
        batch_size=batch_size_for(requests),
        noise_device=noise_device(wanted.options, family),
    )
    paths = output_paths(output, len(images))
    for image, path in zip(images, paths, strict=True):
        write_png(path, image.image)
    return paths


def requests_of(wanted: GenerationRequest, family: ModelFamily, say: Callable[[str], None]) -> list[ImageRequest]:
    """One request per prompt and seed, at a size that the family can generate."""
    spec = family.spec
    size = parse_sizes(wanted.options.validation_resolution)[0]
    [(height, width)], notices = rounded_sizes([size], spec.size_multiple, spec.max_size)
    for line in notices:
        say(line)
    if len(wanted.references) > spec.max_references:
        if not spec.max_references:
            raise ConfigError(Problem(f"{spec.title} takes no reference images", "--reference", fix="leave it out"))
        message = f"{len(wanted.references)} reference images are too many for {spec.title}"
        raise ConfigError(Problem(message, key="--reference", allowed=f"at most {spec.max_references}"))
    references = read_references(wanted.references, "--reference")
    settings = settings_of(wanted.options)
    return [
        ImageRequest(
            f"image-{number}",
            prompt,
            height,
            width,
            wanted.seed + index,
            settings,
            index,
            references=references,
        )
        for number, prompt in enumerate(wanted.prompts)
        for index in range(wanted.count)
    ]


def output_paths(output: Path, count: int) -> list[Path]:
    """`output` itself if it is a PNG for one image, else the next free `<number>.png` of a folder."""
    if output.suffix.lower() == ".png" and count == 1:
        return [output]
    folder = output.with_suffix("") if output.suffix.lower() == ".png" else output
    taken = [int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal()]
    first = max(taken, default=-1) + 1
    return [folder / f"{number:04d}.png" for number in range(first, first + count)]
