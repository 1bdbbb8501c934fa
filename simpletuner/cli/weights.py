"""Verbs of what was trained: to generate with it, to write it for other programs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click.core import ParameterSource

from simpletuner.cli.shared import PASS_ON, app, print_to_stderr, say, takes
from simpletuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    from simpletuner.config.options.validation import ValidationOptions
    from simpletuner.models.family import ModelFamily


@dataclass(frozen=True)
class GenerateFlags:
    """What `simpletuner generate` takes on the command line."""

    prompt: Annotated[
        list[str] | None, typer.Option(help="What to generate; may be given several times.", show_default=False)
    ] = None
    model: Annotated[str | None, typer.Option(help="Model folder or hub id.")] = None
    model_family: Annotated[str | None, typer.Option(help="Of --model, if its folder does not say.")] = None
    config: Annotated[Path | None, typer.Option(help="config.json of a run: its model and its validation_*.")] = None
    adapter: Annotated[Path | None, typer.Option(help="Adapter file (.safetensors) of any format, or folder.")] = None
    strength: Annotated[float, typer.Option(help="Strength of the adapter; 1 is as trained.")] = 1.0
    reference: Annotated[list[Path] | None, typer.Option(help="Image to edit; several times for several.")] = None
    negative_prompt: Annotated[str | None, typer.Option(help="Negative prompt.")] = None
    width: Annotated[int | None, typer.Option(help="Pixels.", min=8)] = None
    height: Annotated[int | None, typer.Option(help="Pixels.", min=8)] = None
    steps: Annotated[int | None, typer.Option(help="Sampling steps.", min=1)] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.", min=0)] = None
    guidance_image: Annotated[
        float | None, typer.Option(help="Guidance toward the references, where the family has it.", min=0)
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of the first image; each further image adds 1.", min=0)] = 42
    count: Annotated[int, typer.Option(help="Images per prompt.", min=1)] = 1
    base_precision: Annotated[
        str | None, typer.Option(help="Pack the model's weights, as base_model_precision does: int8-quanto, ...")
    ] = None
    output: Annotated[Path, typer.Option(help="Folder, or a .png file for a single image.")] = Path("generated")

    @property
    def options(self) -> dict[str, Any]:
        """The options of validation that the flags set."""
        width, height = self.width or self.height, self.height or self.width
        given = {
            "validation_negative_prompt": self.negative_prompt,
            "validation_num_inference_steps": self.steps,
            "validation_guidance": self.guidance,
            "validation_guidance_image": self.guidance_image,
            "validation_resolution": f"{width}x{height}" if width else None,
        }
        return {name: value for name, value in given.items() if value is not None}


@app.command(context_settings=PASS_ON, short_help="Generate images with a model and an adapter.")
@takes(GenerateFlags)
def generate(context: typer.Context, flags: GenerateFlags) -> None:
    """Generate: simpletuner generate --prompt "..." [--model FOLDER | --config FILE | example=NAME] [--adapter FILE]

    Without --model, the model is that of a configuration, found as `train` finds it, and its validation_* options are
    the defaults of what is not given here; --key=value overrides its options. With --instruction in place of --prompt
    the flags are those of OmniGen2's inference.py.
    """
    from simpletuner.commands.omnigen2 import inference

    if inference.is_asked(context.args):
        for path in _generate_by_instruction(context, flags):
            say(str(path))
        return
    if not flags.prompt:
        raise ConfigError(Problem("--prompt is missing", fix='add --prompt "..."'))
    family, options, kernels = _model_of(flags, context.args)
    if flags.guidance_image is not None and "img_guidance_scale" not in family.spec.pipeline_options:
        message = f"the pipeline of {family.spec.title} has one guidance scale"
        raise ConfigError(Problem(message, key="--guidance-image", fix="remove it"))

    from simpletuner.validation.generate import GenerationRequest, generate_images

    options = options.model_copy(update=flags.options)
    request = GenerationRequest(tuple(flags.prompt), options, flags.seed, flags.count, tuple(flags.reference or ()))
    with kernels:
        paths = generate_images(family, request, flags.adapter, flags.output, print_to_stderr, flags.strength)
    for path in paths:
        say(str(path))


def _model_of(
    flags: GenerateFlags, arguments: Sequence[str]
) -> tuple[ModelFamily, ValidationOptions, AbstractContextManager[None]]:
    """The model to generate with, how images are generated where no flag says it, and the kernels that compute them.

    Args:
        arguments: `env=NAME`, `example=NAME` and options of the run.
    """
    from simpletuner import launch

    if flags.base_precision is not None:
        launch.require_number_format(flags.base_precision)
    if flags.model is not None:
        if flags.config is not None or arguments:
            message, fix = "--model needs no configuration", "give --model, or --config with --key=value"
            raise ConfigError(Problem(message, key="--model", fix=fix))
        family = launch.family_of_model(flags.model, flags.model_family, flags.base_precision)
        return family, launch.generation_options(family.spec), nullcontext()

    loaded = launch.load_arguments(arguments, os.environ, Path.cwd(), print_to_stderr, flags.config, check_files=False)
    family = launch.family_of_run(loaded, flags.base_precision)
    from simpletuner.training.kernels import chosen_kernels

    return family, loaded.config.validation, chosen_kernels(loaded.config, family.device)


def _generate_by_instruction(context: typer.Context, given: GenerateFlags) -> list[Path]:
    """Generate by the flags of OmniGen2's inference.py, three of which are called as ours are."""
    from simpletuner import launch
    from simpletuner.commands.omnigen2 import inference

    typed = {"seed": given.seed, "height": given.height, "width": given.width}
    chosen = [name for name in typed if context.get_parameter_source(name) is not ParameterSource.DEFAULT]
    flags = inference.parse([*context.args, *(f"--{name}={typed[name]}" for name in chosen)])
    family = launch.family_of_model(flags["model_path"], "omnigen2")
    return inference.generate(flags, family, print_to_stderr)


@app.command(short_help="Write a trained adapter for other programs, or merge it into its model.")
def export(
    source: Annotated[Path, typer.Argument(help="Output folder, checkpoint, or adapter file.", show_default=False)],
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="diffusers, kohya, comfyui, lycoris or diffsynth; several may be given. The first four if unset.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder, or a .safetensors file for one format.")] = None,
    rank: Annotated[int | None, typer.Option(help="Convert it to a plain LoRA of this rank first.", min=1)] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write the whole model with the adapter in it.")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="Use the EMA weights of the folder.")] = False,
    model: Annotated[str | None, typer.Option(help="Model folder or hub id, if it was moved.")] = None,
    model_family: Annotated[str | None, typer.Option(help="Of --model, if its folder does not say.")] = None,
) -> None:
    """Write files for other programs: simpletuner export FOLDER [--format kohya] [--rank N | --merge]

    Every file is loaded onto a fresh model and must give the trainer's own output before it gets its name.
    """
    from simpletuner.commands.export import export_command, find_source
    from simpletuner.launch import family_of_export

    found = find_source(source, ema)
    family = family_of_export(source, model, model_family)
    for path in export_command(found, family, formats or (), output, rank, merge, print_to_stderr):
        say(str(path))


@app.command(short_help="Convert a pickle of tensors (.bin, .pt, .ckpt) into safetensors.")
def convert(
    source: Annotated[
        Path | None,
        typer.Argument(help="The file, or a folder; the only pickles that are ever opened.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The .safetensors file; beside SOURCE if not given.")] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of a LoRA whose file does not say it, as DiffSynth-Studio's: --lora_alpha.")
    ] = None,
    config_path: Annotated[Path | None, typer.Option("--config_path", help="Options file of an OmniGen2 run.")] = None,
    model_path: Annotated[
        Path | None, typer.Option("--model_path", help="Its weights, or its checkpoint here.")
    ] = None,
    save_path: Annotated[Path | None, typer.Option("--save_path", help="Folder for what generation reads.")] = None,
) -> None:
    """Write the tensors of a pickle as safetensors: simpletuner convert FILE.bin [--output FILE.safetensors]

    Of a folder all pickles in it are converted, each beside itself. Nothing in a file runs: whatever is no tensor is
    refused. Training and generation read safetensors only. Files of DiffSynth-Studio do not say with which alpha they
    were trained: give it where it was not the rank (--alpha 8). A checkpoint of OmniGen2's own program, or of an
    OmniGen2 run here: simpletuner convert --config_path FILE.yml --model_path FILE --save_path FOLDER
    """
    paths = (config_path, model_path, save_path)
    if any(paths):
        if source is not None or output is not None or alpha is not None or not all(paths):
            allowed = "SOURCE [--output FILE] [--alpha N], or --config_path FILE --model_path FILE --save_path FOLDER"
            raise ConfigError(Problem("these do not go together", allowed=allowed))
        from simpletuner.commands.omnigen2.convert import convert_checkpoint

        say(str(convert_checkpoint(config_path, model_path, save_path, print_to_stderr)))  # type: ignore[arg-type]
        return
    if source is None:
        raise ConfigError(Problem("SOURCE is missing", allowed="a .bin, .pt, .pth or .ckpt file"))
    from simpletuner.commands.convert import convert as run_convert
    from simpletuner.commands.convert import convert_folder

    if source.is_dir():
        if output is not None or alpha is not None:
            allowed = "FOLDER alone: files are written beside their sources"
            raise ConfigError(Problem("a folder takes no further option", allowed=allowed))
        say(f"{convert_folder(source)} files written in {source}")
        return
    say(str(run_convert(source, output, alpha)))
