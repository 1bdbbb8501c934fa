"""The flags of DiffSynth-Studio's scripts `examples/train/*/train_*_lora.py`: names, kinds, defaults.

Source: modelscope/DiffSynth-Studio (Apache-2.0), `diffsynth/trainers/text_to_image.py` and the scripts of 2024.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from simpletuner.commands.diffsynth.scripts import SCRIPTS, Script
from simpletuner.commands.flags import FlagParser
from simpletuner.errors import ConfigError, Problem

PRECISIONS = ("32", "16", "16-mixed", "bf16")
STRATEGIES = ("auto", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")


def parse(name: str, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(flags of a script, all other words): the others are options of this program.

    Raises:
        ConfigError: a flag is missing, or has a value that it cannot have.
    """
    return parser_of(name).parse_known_args(list(words))


def script_of(name: str) -> Script:
    """The script that a name means.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCRIPTS:
        raise ConfigError(
            Problem(f'"{name}" is not a model of DiffSynth-Studio\'s scripts', allowed=", ".join(SCRIPTS))
        )
    return SCRIPTS[name]


def parser_of(name: str) -> argparse.ArgumentParser:
    """Raises:
    ConfigError: there is no such script.
    """
    script = script_of(name)
    ends = "Every option of this program can be given too, as --key=value: simpletuner options"
    parser = FlagParser(f"diffsynth {name}", ends)
    for flag, text in script.paths.items():
        parser.add_argument(f"--{flag}", required=True, help=text)
    if script.name == "flux":
        text = "Write LoRA files with the names of the original release, as kohya's program does."
        parser.add_argument("--align_to_opensource_format", action="store_true", help=text)
        text = "Pack the transformer's weights."
        parser.add_argument("--quantize", choices=["float8_e4m3fn"], help=text)
        parser.add_argument("--preset_lora_path", help="A LoRA to be merged into the base first; refused.")
        parser.add_argument("--num_timesteps", type=int, help="Without effect, there as here.")
    _add_general(parser, script)
    return parser


def _add_general(parser: argparse.ArgumentParser, script: Script) -> None:
    def add(name: str, kind: Any, default: Any, text: str, **options: Any) -> None:
        shown = f"{text} Default: {default}" if default is not None else text
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown, **options)

    def switch(name: str, text: str) -> None:
        parser.add_argument(f"--{name}", action="store_true", help=text)

    targets = "Layers with LoRA: ends of DiffSynth's module names, separated by commas."
    add("lora_target_modules", str, ",".join(script.targets), targets)
    add("dataset_path", str, None, "Folder with train/metadata.csv (file_name,text) and the images.", required=True)
    add("output_path", str, None, f"Folder of the results. Default: output/{script.name}")
    add("steps_per_epoch", _positive, 500, "Batches of an epoch, shared by all GPUs.")
    add("height", _positive, 1024, "Height of training images in pixels.")
    add("width", _positive, 1024, "Width of training images in pixels.")
    switch("center_crop", "Crop images at their center; otherwise at random.")
    switch("random_flip", "Flip half of the images.")
    add("batch_size", _positive, 1, "Images of a forward pass of one GPU.")
    add("dataloader_num_workers", int, 0, "Without effect: the next batch is always prepared while one is trained.")
    add("precision", str, "16-mixed", "Number format.", choices=PRECISIONS)
    add("learning_rate", float, 1e-4, "Of AdamW, constant.")
    add("lora_rank", _positive, 4, "Rank of the LoRA.")
    add("lora_alpha", float, 4.0, "The LoRA is multiplied with lora_alpha / lora_rank.")
    add("init_lora_weights", str, "gaussian", "Initialization of the LoRA.", choices=("gaussian", "kaiming"))
    add("pretrained_lora_path", str, None, "LoRA to start from (.safetensors; simpletuner convert reads a .ckpt).")
    switch("use_gradient_checkpointing", "Recompute activations in the backward pass.")
    add("accumulate_grad_batches", _positive, 1, "Batches of an optimizer step.")
    add("training_strategy", str, "auto", "auto, or the ZeRO stage of DeepSpeed.", choices=STRATEGIES)
    add("max_epochs", _positive, 1, "Epochs; each ends with a checkpoint.")
    add("modelscope_model_id", str, None, "Refused: uploads go to the Hugging Face hub.")
    add("modelscope_access_token", str, None, "Refused, as modelscope_model_id is.")
    switch("use_swanlab", "Refused: use --report_to=tensorboard or wandb.")
    for name in ("project", "name", "mode", "logdir"):
        add(f"swanlab_{name}", str, None, "Refused, as use_swanlab is.")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


_positive.__name__ = "number above 0"  # argparse names it where a value cannot be used
