"""From the flags of a script to the JSON files of a run here."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.commands.diffsynth.flags import parse, script_of
from simpletuner.commands.diffsynth.targets import lora_target
from simpletuner.commands.diffsynth.weights import weight_options
from simpletuner.commands.run_files import CONFIG, DATA, options_of, write_run_files
from simpletuner.config.json_writer import json_text
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import FamilySpec

DEEPSPEED = "deepspeed.json"
FORMATS = {"32": "no", "16": "fp16", "16-mixed": "fp16", "bf16": "bf16"}


@dataclass
class Translation:
    """What a command line amounts to.

    Args:
        config: options of `config.json`.
        data: entries of `multidatabackend.json`.
        deepspeed: content of a DeepSpeed file, or empty.
        rest: words that no file may hold: options of this program that are secrets.
        notes: lines for the user.
    """

    config: dict[str, Any]
    data: list[dict[str, Any]]
    deepspeed: dict[str, Any] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate(
    name: str, words: Sequence[str], working_dir: Path, processes_of: Callable[[list[str]], int]
) -> Translation:
    """Everything on a script's command line.

    Args:
        name: of the script.
        processes_of: how many processes a run with these options of this program has.

    Raises:
        ConfigError: a flag that cannot be used, a file that is not there, or pickled weights.
    """
    flags, rest = parse(name, words)
    script = script_of(name)
    given, secrets = options_of(rest)
    spec = get_spec(script.family)
    notes: list[str] = []
    if problems := [*_refused(flags), *_misfits(flags, spec.size_multiple, working_dir)]:
        raise ConfigError(problems)
    processes = processes_of(rest)
    stage = _stage(flags, processes, notes)
    per_epoch = math.ceil(math.ceil(flags.steps_per_epoch / processes) / flags.accumulate_grad_batches)
    output = flags.output_path or f"output/{script.name}"
    config: dict[str, Any] = {
        "model_family": script.family,
        "output_dir": output,
        "cache_dir": f"{output.rstrip('/')}/cache",
        **weight_options(script, flags, working_dir, notes.append),
        **_adapter(spec, flags),
        "max_train_steps": flags.max_epochs * per_epoch,
        "num_train_epochs": 0,
        "checkpoint_step_interval": per_epoch,
        "checkpoints_total_limit": 0,
        "train_batch_size": flags.batch_size,
        "gradient_accumulation_steps": flags.accumulate_grad_batches,
        "gradient_checkpointing": flags.use_gradient_checkpointing,
        "mixed_precision": _number_format(flags, stage, notes),
        "optimizer": "torch-adamw",
        "learning_rate": flags.learning_rate,
        **{"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "adam_weight_decay": 0.01},
        **{"lr_scheduler": "constant", "lr_warmup_steps": 0, "max_grad_norm": 0.0, "grad_clip_method": "norm"},
        "caption_dropout_probability": 0.0,
        "aspect_bucket_alignment": max(spec.size_multiple, 8),
        "validation_resolution": f"{flags.width}x{flags.height}",
        "validation_step_interval": per_epoch,
        **script.config,
        **given,
    }
    if flags.dataloader_num_workers:
        notes.append("--dataloader_num_workers has no effect: the next batch is always prepared while one is trained")
    if getattr(flags, "num_timesteps", None) is not None:
        notes.append("--num_timesteps has no effect, in the original either")
    deepspeed = {"zero_optimization": {"stage": stage}} if stage else {}
    return Translation(config, [_dataset(flags)], deepspeed, secrets, notes)


def write_run(translation: Translation, say: Callable[[str], None]) -> Path:
    """Write the files into the run's own folder, over existing ones; returns its `config.json`."""
    return _write(translation, Path(translation.config["output_dir"]) / "diffsynth", say, replaces=True)


def import_run(translation: Translation, folder: Path, say: Callable[[str], None]) -> Path:
    """Write the files for somebody to edit.

    Raises:
        ConfigError: a file already exists.
    """
    return _write(translation, folder, say, replaces=False)


def _write(translation: Translation, folder: Path, say: Callable[[str], None], replaces: bool) -> Path:
    config = translation.config
    texts = {}
    if translation.deepspeed:
        config = {**config, "deepspeed_config": str(folder / DEEPSPEED)}
        texts[DEEPSPEED] = json_text(translation.deepspeed) + "\n"
    texts |= {CONFIG: json_text(config) + "\n", DATA: json_text(translation.data) + "\n"}
    write_run_files(folder, texts, replaces)
    for line in translation.notes:
        say(line)
    return folder / CONFIG


def _adapter(spec: FamilySpec, flags: argparse.Namespace) -> dict[str, Any]:
    options = {
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": flags.lora_rank,
        "lora_alpha": flags.lora_alpha,
        "lora_dropout": 0.0,
        "lora_init_type": {"kaiming": "default"}.get(flags.init_lora_weights, flags.init_lora_weights),
        "lora_target": lora_target(flags.lora_target_modules, spec),
    }
    if flags.pretrained_lora_path:
        options["init_lora"] = flags.pretrained_lora_path
    if getattr(flags, "align_to_opensource_format", False):
        options["lora_format"] = "kohya"
    if getattr(flags, "quantize", None):
        options["base_model_precision"] = "fp8-quanto"
    return options


def _dataset(flags: argparse.Namespace) -> dict[str, Any]:
    """The images of `<dataset_path>/train`, cut to one size."""
    path = Path(flags.dataset_path)
    name = re.sub(r"[^\w.-]", "-", path.resolve().name).strip("-.")
    is_square = flags.width == flags.height
    aspect = {"crop_aspect": "closest", "crop_aspect_buckets": [flags.width / flags.height]}
    crops = {"crop_style": "center"} if flags.center_crop else _RANDOM_CROPS
    return {
        "id": name or "images",
        "type": "local",
        "instance_data_dir": str(path / "train"),
        "caption_strategy": "csv",
        "crop": True,
        **({"crop_aspect": "square"} if is_square else aspect),
        # Of the shorter side: from an area both sides would be rounded, some to a neighbor of what was asked for.
        "resolution": min(flags.width, flags.height),
        "resolution_type": "pixel",
        **crops,
        "minimum_image_size": 0,
        "with_replacement": True,
        "random_flip": flags.random_flip,
    }


# Sampled anew in each round, which latents on disk would not be.
_RANDOM_CROPS = {"crop_style": "random", "vae_cache_clear_each_epoch": True}


def _stage(flags: argparse.Namespace, processes: int, notes: list[str]) -> int:
    stage = 0 if flags.training_strategy == "auto" else int(flags.training_strategy[-1])
    if stage and processes == 1:
        notes.append(
            f"--training_strategy {flags.training_strategy} has no effect: one process has no other to share with"
        )
        return 0
    return stage


def _number_format(flags: argparse.Namespace, stage: int, notes: list[str]) -> str:
    found = FORMATS[flags.precision]
    if stage and found == "fp16":
        notes.append(f"--precision {flags.precision}: with DeepSpeed it is bf16, which needs no scaled loss")
        return "bf16"
    return found


def _refused(flags: argparse.Namespace) -> Iterator[Problem]:
    if flags.modelscope_model_id or flags.modelscope_access_token:
        key = "--modelscope_model_id" if flags.modelscope_model_id else "--modelscope_access_token"
        message = "this program uploads to the Hugging Face hub only"
        fix = "use --push_to_hub and --hub_model_id=OWNER/NAME, or upload the output folder with `modelscope upload`"
        yield Problem(message, key=key, fix=fix)
    if flags.use_swanlab or any(getattr(flags, f"swanlab_{name}") for name in ("project", "name", "mode", "logdir")):
        yield Problem("SwanLab is not a supported tracker", key="--use_swanlab", fix="use --report_to=tensorboard")
    if getattr(flags, "preset_lora_path", None):
        fix = "merge it with `simpletuner export --merge`, and name the merged transformer"
        yield Problem("a LoRA is not merged before training", key="--preset_lora_path", fix=fix)


def _misfits(flags: argparse.Namespace, multiple: int, working_dir: Path) -> Iterator[Problem]:
    for side in ("height", "width"):
        if (pixels := getattr(flags, side)) % multiple:
            yield Problem(f"{pixels} is not a multiple of {multiple}", f"--{side}", allowed=f"multiples of {multiple}")
    table = working_dir / Path(flags.dataset_path).expanduser() / "train" / "metadata.csv"
    if not table.is_file():
        fix = "put the images and metadata.csv (file_name,text) into train/ there"
        yield Problem(f"there is no {table}", key="--dataset_path", fix=fix)
