"""The flags of OmniGen2's `inference.py`, for `simpletuner generate`.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `inference.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from simpletuner.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from PIL.Image import Image

    from simpletuner.models.family import ModelFamily

MODEL = "OmniGen2/OmniGen2"
NEGATIVE_PROMPT = (
    "(((deformed))), blurry, over saturation, bad anatomy, disfigured, poorly drawn face, mutation, mutated, "
    "(extra_limb), (ugly), (poorly drawn hands), fused fingers, messy drawing, broken legs censor, censored, "
    "censor_bar"
)
SCHEDULERS = ("euler", "dpmsolver++")
DTYPES = ("bf16", "fp16", "fp32")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff")
# The largest image that the original generates; a larger one is made of it by resizing.
MAX_PIXELS = 1024 * 1024
MULTIPLE = 16


class Flag(NamedTuple):
    """A flag with a value.

    Args:
        kind: of its value.
        default: where it is not given.
        choices: that are allowed, if not all.
    """

    kind: type
    default: Any = None
    choices: tuple[str, ...] = ()


FLAGS: Mapping[str, Flag] = {
    "model_path": Flag(str, MODEL),
    "transformer_path": Flag(str),
    "transformer_lora_path": Flag(str),
    "scheduler": Flag(str, "euler", SCHEDULERS),
    "num_inference_step": Flag(int, 50),
    "seed": Flag(int, 0),
    "height": Flag(int, 1024),
    "width": Flag(int, 1024),
    "dtype": Flag(str, None, DTYPES),
    "text_guidance_scale": Flag(float, 5.0),
    "image_guidance_scale": Flag(float, 2.0),
    "cfg_range_start": Flag(float, 0.0),
    "cfg_range_end": Flag(float, 1.0),
    "instruction": Flag(str),
    "negative_prompt": Flag(str, NEGATIVE_PROMPT),
    "output_image_path": Flag(str, "output.png"),
    "num_images_per_prompt": Flag(int, 1),
}
# Takes one or more values.
INPUTS = "input_image_path"
SWITCHES = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
REFUSED = {
    "enable_teacache": "steps are not skipped: every step is computed",
    "teacache_rel_l1_thresh": "steps are not skipped: every step is computed",
    "enable_taylorseer": "steps are not extrapolated: every step is computed",
    "max_input_image_pixels": "the original does nothing with it: references have at most 1024 x 1024 pixels",
}


def is_asked(arguments: Sequence[str]) -> bool:
    """Whether these are the flags of `inference.py`."""
    return any(_split(word)[0] == "instruction" for word in arguments)


def _split(word: str) -> tuple[str, str | None]:
    name, equals, value = word.removeprefix("--").partition("=")
    return (name.replace("-", "_") if word.startswith("--") else "", value if equals else None)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """Flag -> value, all of them.

    Raises:
        ConfigError: a flag that is unknown or refused, or a value that cannot be used.
    """
    found: dict[str, Any] = {name: flag.default for name, flag in FLAGS.items()}
    found |= {INPUTS: [], **dict.fromkeys(SWITCHES, False)}
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, value = _split(word)
        if name in REFUSED:
            raise ConfigError(Problem(f"it is not built: {REFUSED[name]}", key=f"--{name}", fix="leave it out"))
        if name in SWITCHES:
            found[name] = True
        elif name == INPUTS:
            found[INPUTS] += [value] if value is not None else []
            while words and not words[0].startswith("--"):
                found[INPUTS].append(words.pop(0))
        elif name in FLAGS:
            if value is None and not words:
                raise ConfigError(Problem("it needs a value", key=f"--{name}"))
            found[name] = _value(name, FLAGS[name], words.pop(0) if value is None else value)
        else:
            allowed = ", ".join(f"--{flag}" for flag in (*FLAGS, INPUTS, *SWITCHES))
            raise ConfigError(Problem(f'"{word}" is not a flag', allowed=allowed))
    return found


def _value(name: str, flag: Flag, text: str) -> Any:
    try:
        value = flag.kind(text)
    except ValueError:
        raise ConfigError(Problem(f'"{text}" is not a number', key=f"--{name}")) from None
    if flag.choices and value not in flag.choices:
        raise ConfigError(Problem(f'"{text}" cannot be used', key=f"--{name}", allowed=", ".join(flag.choices)))
    return value


def input_files(names: Sequence[str]) -> list[Path]:
    """The input images: files, or those of one folder, by name.

    Raises:
        ConfigError: a path that leads nowhere.
    """
    paths = [Path(name) for name in names]
    if len(paths) == 1 and paths[0].is_dir():
        return sorted(path for path in paths[0].iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    for path in paths:
        if not path.is_file():
            raise ConfigError(Problem(f"there is no image {path}", key=f"--{INPUTS}", allowed="files, or one folder"))
    return paths


def generated_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) that is generated: at most a megapixel, sides multiples of 16."""
    ratio = min(1.0, math.sqrt(MAX_PIXELS / (height * width)))
    rows, columns = (max(1, int(side * ratio) // MULTIPLE) * MULTIPLE for side in (height, width))
    return rows, columns


def collage(images: Sequence[Image]) -> Image:
    """Images side by side, at their tops, on gray."""
    from PIL import Image

    whole = Image.new(
        "RGB", (sum(image.width for image in images), max(image.height for image in images)), (127, 127, 127)
    )
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole


def use_flags(family: ModelFamily, flags: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Let a family take its denoiser from `--transformer_path`, and work in `--dtype`.

    Raises:
        ConfigError: the folder holds no denoiser.
    """
    import torch

    if folder := flags["transformer_path"]:
        if not (Path(folder) / "config.json").is_file():
            message = f"{folder} has no config.json"
            raise ConfigError(Problem(message, key="--transformer_path", fix="make it with simpletuner convert"))
        family.source = replace(family.source, denoiser=folder)
    if family.device.type != "cpu":
        family.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[flags["dtype"] or "bf16"]
    elif flags["dtype"] not in (None, "fp32"):
        say(f"--dtype {flags['dtype']} has no effect on a CPU, which computes in float32")


def generate(flags: Mapping[str, Any], family: ModelFamily, say: Callable[[str], None]) -> list[Path]:
    """Generate and write images; returns their paths, the collage first.

    Raises:
        DataError: an input image cannot be read, or nothing can be written.
        ConfigError: the adapter does not fit.
    """
    import torch
    from PIL import Image

    from simpletuner.adapters.files import apply_adapter_file
    from simpletuner.cache.prompts import PromptsAhead
    from simpletuner.config.paths import adapter_file_in
    from simpletuner.models.omnigen2.pipeline import fit_reference
    from simpletuner.validation.references import read_references
    from simpletuner.validation.schedulers import use_scheduler

    use_flags(family, flags, say)
    references = [each.image for each in read_references(input_files(flags[INPUTS]), f"--{INPUTS}")]
    family.prompts = PromptsAhead(family, [flags["instruction"], flags["negative_prompt"]])
    denoiser = family.load_base()
    if flags["transformer_lora_path"]:
        path = adapter_file_in(Path(flags["transformer_lora_path"]))
        for line in apply_adapter_file(denoiser, path, family.spec).notices:
            say(line)
    pipeline = family.pipeline(denoiser.eval(), family.load_vae())
    _offload(denoiser, family, flags, say)
    if flags["scheduler"] == "dpmsolver++":
        use_scheduler(pipeline, "dpm++")
    asked = (flags["height"], flags["width"])
    if len(references) == 1:  # the result has the size of the only image, as that is seen
        asked = fit_reference(references[0]).size[::-1]
    height, width = generated_size(*asked)
    count = flags["num_images_per_prompt"]
    generators = [torch.Generator().manual_seed(flags["seed"] + index) for index in range(count)]
    images = []
    for generator in generators:
        images += pipeline(
            flags["instruction"],
            flags["negative_prompt"],
            height=height,
            width=width,
            num_inference_steps=flags["num_inference_step"],
            guidance_scale=flags["text_guidance_scale"],
            img_guidance_scale=flags["image_guidance_scale"],
            cfg_range=(flags["cfg_range_start"], flags["cfg_range_end"]),
            generator=[generator],
            references=[references] if references else None,
        ).images
    if (height, width) != asked:
        images = [image.resize(asked[::-1], Image.Resampling.BILINEAR) for image in images]
    return _written(images, Path(flags["output_image_path"]))


def _offload(denoiser: Any, family: ModelFamily, flags: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Move the denoiser to the device: whole, or block by block when each is its turn."""
    from simpletuner.training.swapping import move_with_swap, repeated_blocks

    by_blocks = flags["enable_sequential_cpu_offload"] or flags["enable_group_offload"]
    classes = family.spec.block_classes
    count = len(repeated_blocks(denoiser, classes)) if by_blocks and family.device.type != "cpu" else 0
    move_with_swap(denoiser, classes, count, family.device)
    if flags["enable_model_cpu_offload"]:
        say(
            "--enable_model_cpu_offload has no effect: the language model is always freed before the denoiser is loaded"
        )


def _written(images: Sequence[Image], path: Path) -> list[Path]:
    paths = [path]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (collage(images) if len(images) > 1 else images[0]).save(path)
        for index, image in enumerate(images) if len(images) > 1 else ():
            paths.append(path.with_name(f"{path.stem}_{index}{path.suffix}"))
            image.save(paths[-1])
    except (OSError, ValueError) as error:
        raise DataError(Problem(f"cannot write {path}: {error}", key="--output_image_path")) from error
    return paths
