"""The keys of OmniGen2's `options/*.yml`: each becomes options of `config.json`, is noted, or is refused.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `options/ft.yml`, `options/ft_lora.yml` and what `train.py` reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.config.yaml_reader import YamlDocument
from simpletuner.errors import ConfigError, Problem
from simpletuner.spelling import did_you_mean

REQUIRED: Any = object()
MAX_TOKENS = 888

# Key -> why nothing follows from it.
WITHOUT_EFFECT: Mapping[str, str] = {
    "device_specific_seed": "noise is keyed by the place in the global batch, so processes never share it",
    "workder_specific_seed": "crops and captions are keyed by the seed and the image, whichever thread loads them",
    "same_seed_per_epoch": "crops and captions are keyed by the seed and the image, whichever thread loads them",
    "cache_dir": "caches are kept in the folder of the experiment",
    "model.vae_subfolder": "the VAE's folder is found by its configuration",
    "train.dataloader_num_workers": "the next batch is always prepared while one is trained",
    "train.set_grads_to_none": "gradients are always set to none",
    "train.benchmark_cudnn": "the kernels of attention and products are not chosen by cuDNN's benchmark",
    "val.validation_steps": "without a prompt nothing is generated; add --validation_prompt",
    "val.train_visualization_steps": "add --validation_prompt to see images while training",
    "val.num_train_visualization_samples": "add --validation_prompt to see images while training",
}
_OWN_ARCHITECTURE = "the transformer's own config.json says how it is built"
# diffusers' names of schedules that are ours too.
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass
class Translation:
    """What an options file amounts to.

    Args:
        name: of the experiment.
        config: options of `config.json`.
        data_path: the mix, as it is written.
        max_output_pixels: of a target.
        max_input_pixels: of references, by their number; the last entry repeats.
        max_side: pixels, of targets and references.
        global_batch_size: images of an optimizer step, all processes together; None where it is not given.
        notes: lines for the user.
    """

    name: str
    config: dict[str, Any]
    data_path: str
    max_output_pixels: int
    max_input_pixels: tuple[int, ...]
    max_side: int
    global_batch_size: int | None
    notes: list[str] = field(default_factory=list)


class Keys:
    """Takes values out of a document one by one, and knows afterwards what nobody took."""

    def __init__(self, document: YamlDocument):
        self.document = document
        self.problems: list[Problem] = []
        self.taken: set[str] = set()

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of a key, `default` where it is absent or empty."""
        self.taken.add(key)
        value: Any = self.document.values.get(key)
        if value is None:
            if default is REQUIRED:
                self.problems.append(self.document.problem(key, "it is missing"))
                return kind()
            return default
        allowed: Any = {int: (int,), float: (int, float), bool: (bool,), str: (str,), list: (list,)}[kind]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            self.refuse(key, f'"{value}" cannot be used', {int: "a whole number", float: "a number"}.get(kind))
            return kind() if default is REQUIRED else default
        return value * 1.0 if kind is float else value

    def refuse(self, key: str, message: str, allowed: str | None = None, fix: str | None = None) -> None:
        self.problems.append(self.document.problem(key, message, allowed, fix))

    def refuse_others(self) -> None:
        """Add a problem for each key that nobody asked for."""
        for key in self.document.values.keys() - self.taken:
            self.refuse(key, "there is no such key", fix=did_you_mean(key, self.taken) or "remove it")


def translate(document: YamlDocument) -> Translation:
    """Everything in an options file.

    Raises:
        ConfigError: what cannot be done as the file says, all of it at once.
    """
    keys = Keys(document)
    name = keys.take("name", str)
    notes: list[str] = []
    config: dict[str, Any] = {
        "model_family": "omnigen2",
        "output_dir": f"experiments/{name}",
        "cache_dir": f"experiments/{name}/cache",
        "seed": keys.take("seed", int, 0),
        "resume_from_checkpoint": keys.take("resume_from_checkpoint", str, "none"),
        "loss_balance": "pixels",  # the original divides a sum over latents by their number
    }
    sizes = _data(keys, config)
    _model(keys, config, notes)
    _transport(keys, config, sizes[0])
    _training(keys, config)
    _optimizer(keys, config)
    _schedule(keys, config)
    _adapter(keys, config)
    _logging(keys, config)
    for key, reason in WITHOUT_EFFECT.items():
        if keys.take(key, _kind(document.values.get(key)), None) is not None:
            notes.append(f"{key} has no effect: {reason}")
    keys.refuse_others()
    if keys.problems:
        raise ConfigError(sorted(keys.problems, key=lambda problem: problem.line or 0))
    batch = keys.take("train.global_batch_size", int, None)
    return Translation(name, config, keys.take("data.data_path", str), *sizes, batch, notes)


def _kind(value: Any) -> type:
    return type(value) if isinstance(value, bool | int | float | str | list) else str


def _data(keys: Keys, config: dict[str, Any]) -> tuple[int, tuple[int, ...], int]:
    """(max_output_pixels, max_input_pixels, max_side_length)."""
    keys.take("data.data_path", str)
    if keys.take("data.use_chat_template", bool, True) is False:
        keys.refuse("data.use_chat_template", "OmniGen2 reads instructions in its chat template", "true")
    tokens = keys.take("data.maximum_text_tokens", int, MAX_TOKENS)
    if tokens != MAX_TOKENS:
        keys.refuse(
            "data.maximum_text_tokens",
            f"{tokens} cannot be set: instructions have the length that OmniGen2 was trained with",
            str(MAX_TOKENS),
        )
    config["caption_dropout_probability"] = keys.take("data.prompt_dropout_prob", float, 0.0)
    config["reference_dropout_probability"] = keys.take("data.ref_img_dropout_prob", float, 0.0)
    most = keys.take("data.max_output_pixels", int)
    given = keys.document.values.get("data.max_input_pixels")
    each = (
        [keys.take("data.max_input_pixels", int)]
        if isinstance(given, int)
        else keys.take("data.max_input_pixels", list)
    )
    if not each or not all(isinstance(pixels, int) and pixels > 0 for pixels in each):
        keys.refuse(
            "data.max_input_pixels", "is not a list of pixel counts", "[1048576, 589824], one for each number of images"
        )
        each = [most]
    return most, tuple(each), keys.take("data.max_side_length", int, 2048)


def _model(keys: Keys, config: dict[str, Any], notes: list[str]) -> None:
    model = keys.take("model.pretrained_model_path", str)
    config["pretrained_model_name_or_path"] = model
    vae = keys.take("model.pretrained_vae_model_name_or_path", str, None)
    if vae is not None and _comes_from(vae, model, "vae"):
        config["pretrained_vae_model_name_or_path"] = vae
    elif vae is not None and vae != model:
        notes.append(
            f"model.pretrained_vae_model_name_or_path: the same VAE is in {model}, which is used; {vae} is not"
        )
    encoder = keys.take("model.pretrained_text_encoder_model_name_or_path", str, None)
    if encoder is not None and _comes_from(encoder, model, "mllm"):
        config["text_encoder_paths"] = encoder
    elif encoder is not None and encoder != model:
        key = "model.pretrained_text_encoder_model_name_or_path"
        notes.append(f"{key}: the language model in {model} is used; {encoder} is not")
    if keys.take("model.resize_token_embeddings", bool, False):
        keys.refuse("model.resize_token_embeddings", "the language model is used as it is", "false")
    for key in keys.document.values:
        if key.startswith("model.arch_opt."):
            keys.taken.add(key)
    if any(key.startswith("model.arch_opt") for key in keys.document.lines):
        notes.append(f"model.arch_opt has no effect: {_OWN_ARCHITECTURE}")


def _comes_from(source: str, model: str, part: str) -> bool:
    """Whether a part is taken from a source of its own: a folder, or a hub id where the model's folder lacks it."""
    if Path(source).is_dir():
        return Path(source) != Path(model)
    return Path(model).is_dir() and not (Path(model) / part / "config.json").is_file() and source != model


def _transport(keys: Keys, config: dict[str, Any], max_output_pixels: int) -> None:
    kind = keys.take("transport.snr_type", str, "lognorm")
    if kind == "stratified_uniform":
        config |= {"flow_use_uniform_schedule": True, "timestep_stratified": True}
    elif kind != "lognorm":
        keys.refuse("transport.snr_type", f'"{kind}" cannot be trained with', "lognorm, stratified_uniform")
    version = keys.take("transport.time_shift_version", str, "v1")
    if version not in ("v1", "v2"):
        keys.refuse("transport.time_shift_version", f'"{version}" is not a shift', "v1, v2")
    is_shifted = keys.take("transport.do_shift", bool, False)
    is_dynamic = keys.take("transport.dynamic_time_shift", bool, False)
    if not is_shifted:
        config["flow_schedule_shift"] = 1.0
    elif is_dynamic and version == "v2":
        config |= {"flow_schedule_auto_shift": True, "flow_schedule_auto_shift_curve": "sqrt"}
    elif not is_dynamic:
        # One shift for all images, that of the largest: exp(mu), mu linear in the number of patches, or their root.
        tokens = max_output_pixels // 256
        mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        config["flow_schedule_shift"] = round(math.sqrt(tokens) / 20 if version == "v2" else math.exp(mu), 6)


def _training(keys: Keys, config: dict[str, Any]) -> None:
    keys.take("train.global_batch_size", int, None)
    config["train_batch_size"] = keys.take("train.batch_size", int)
    config["gradient_accumulation_steps"] = keys.take("train.gradient_accumulation_steps", int, 1)
    steps = keys.take("train.max_train_steps", int, None)
    epochs = keys.take("train.num_train_epochs", int, None)
    if steps is None and epochs is None:
        keys.refuse("train.max_train_steps", "neither this nor train.num_train_epochs is given")
    # The original counts epochs only where no steps are given.
    config["max_train_steps"] = steps or 0
    config["num_train_epochs"] = 0 if steps else epochs or 0
    config["gradient_checkpointing"] = keys.take("train.gradient_checkpointing", bool, False)
    config["disable_tf32"] = not keys.take("train.allow_tf32", bool, False)
    config["mixed_precision"] = keys.take("train.mixed_precision", str, "no")
    if decay := keys.take("train.ema_decay", float, 0.0):
        config |= {"use_ema": True, "ema_decay": decay}


def _optimizer(keys: Keys, config: dict[str, Any]) -> None:
    config["optimizer"] = "bnb-adamw8bit" if keys.take("train.use_8bit_adam", bool, False) else "torch-adamw"
    config["learning_rate"] = keys.take("train.learning_rate", float)
    config["lr_scale"] = keys.take("train.scale_lr", bool, False)
    for name in ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon"):
        if (value := keys.take(f"train.{name}", float, None)) is not None:
            config[name] = value
    config["max_grad_norm"] = keys.take("train.max_grad_norm", float, 0.0)
    config["grad_clip_method"] = "norm"


def _schedule(keys: Keys, config: dict[str, Any]) -> None:
    name = keys.take("train.lr_scheduler", str, "timm_constant_with_warmup")
    warmup = keys.take("train.warmup_t", int, 0)
    start = keys.take("train.warmup_lr_init", float, 0.0)
    if start > 1e-3 * config["learning_rate"]:
        keys.refuse(
            "train.warmup_lr_init", f"{start:g} cannot be used: a warm-up begins at 0", "at most 0.001 of the rate"
        )
    comes_before = keys.take("train.warmup_prefix", bool, False)
    if keys.take("train.t_in_epochs", bool, False):
        keys.refuse("train.t_in_epochs", "the schedule counts optimizer steps", "false")
    length, lowest = keys.take("train.t_initial", int, None), keys.take("train.lr_min", float, 0.0)
    decay = keys.take("train.cycle_decay", float, 1.0)
    steps, cycles = keys.take("train.lr_warmup_steps", int, 0), keys.take("train.lr_num_cycles", int, 1)
    power = keys.take("train.lr_power", float, 1.0)
    if name == "timm_constant_with_warmup":
        config |= {"lr_scheduler": "constant_with_warmup" if warmup else "constant", "lr_warmup_steps": warmup}
    elif name == "timm_cosine":
        whole = config["max_train_steps"] - (warmup if comes_before else 0)
        if length != whole:
            keys.refuse("train.t_initial", f"the cosine reaches its end with the run, after {whole} steps", str(whole))
        if decay != 1:
            keys.refuse("train.cycle_decay", "the cosine has one cycle, so that nothing decays", "1.0")
        config |= {"lr_scheduler": "cosine", "lr_warmup_steps": warmup, "lr_end": lowest}
    elif name in SCHEDULES:
        config |= {"lr_scheduler": name, "lr_warmup_steps": steps, "lr_num_cycles": cycles, "lr_power": power}
    else:
        allowed = ", ".join(("timm_constant_with_warmup", "timm_cosine", *SCHEDULES))
        keys.refuse("train.lr_scheduler", f'"{name}" is not a supported schedule', allowed)


def _adapter(keys: Keys, config: dict[str, Any]) -> None:
    rank, dropout = keys.take("train.lora_rank", int, 8), keys.take("train.lora_dropout", float, 0.0)
    if keys.take("train.lora_ft", bool, False):
        config |= {"model_type": "lora", "lora_type": "standard", "lora_rank": rank, "lora_alpha": rank}
        config |= {"lora_dropout": dropout, "lora_target": "attention", "lora_init_type": "gaussian"}
    else:
        # The original trains float32 weights under autocast.
        config |= {"model_type": "full", "base_model_default_dtype": "fp32"}


def _logging(keys: Keys, config: dict[str, Any]) -> None:
    given = keys.document.values.get("logger.log_with")
    names = [keys.take("logger.log_with", str)] if isinstance(given, str) else keys.take("logger.log_with", list, [])
    if unknown := [name for name in names if name not in ("tensorboard", "wandb")]:
        keys.refuse("logger.log_with", f'"{unknown[0]}" is not a supported tracker', "tensorboard, wandb")
    config["report_to"] = ",".join(names) or "none"
    config["tracker_project_name"] = "OmniGen2"
    config["checkpoint_step_interval"] = keys.take("logger.checkpointing_steps", int, 0)
    config["checkpoints_total_limit"] = keys.take("logger.checkpoints_total_limit", int, 0)


def accumulation(translation: Translation, document: YamlDocument, num_processes: int) -> tuple[int, str | None]:
    """Micro-batches of an optimizer step so that it has `train.global_batch_size` images, and a line where that is new.

    Raises:
        ConfigError: the processes cannot make so many.
    """
    per_pass = translation.config["train_batch_size"] * num_processes
    asked, total = translation.config["gradient_accumulation_steps"], translation.global_batch_size
    if total is None or per_pass * asked == total:
        return asked, None
    if total % per_pass:
        message = (
            f"{total} is not a multiple of {per_pass}: {num_processes} processes with train.batch_size images each"
        )
        allowed = ", ".join(str(per_pass * count) for count in (total // per_pass, total // per_pass + 1) if count)
        raise ConfigError(
            document.problem("train.global_batch_size", message, allowed, "change it, or train.batch_size")
        )
    count = total // per_pass
    line = f"train.global_batch_size {total} is met by {count} forward passes of {num_processes} processes in each step"
    return count, line
