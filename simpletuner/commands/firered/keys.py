"""What the flags of `sft` and the variables of `accelerate launch` become: options of this program, or a refusal.

Source: FireRedTeam/FireRed-Image-Edit (Apache-2.0), `train/src`; accelerate's `utils/launch.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.commands.firered.flags import SftFlags
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec

# Flag -> why nothing follows from it.
WITHOUT_EFFECT: Mapping[str, str] = {
    "local_rank": "LOCAL_RANK says which process this is",
    "nnodes": "the launcher says how many machines there are",
    "num_processes_per_node": "the launcher says how many processes there are",
    "train_sampling_steps": "noise levels are continuous, not steps of a grid",
    "dataloader_num_workers": "the next batch is always prepared while one is trained",
    "prefetch_factor": "the next batch is always prepared while one is trained",
    "logging_dir": "logs and trackers' files are in --output_dir",
    "report_model_info": "the start of the log says what is trained",
}
_ONE_LIMIT = "the limit of the gradient's norm is --max_grad_norm at every step"
REFUSED: Mapping[str, str] = {
    "streaming": "the original never built it: rows are read from the files of --train_data_meta_dir",
    "abnormal_norm_clip_start": _ONE_LIMIT,
    "initial_grad_norm_ratio": _ONE_LIMIT,
}
MODES = ("offline", "sync")
# Share of the captions that the original drops; it keeps their source images.
DROPPED_CAPTIONS = 0.05
# Images have sides of multiples of this.
ALIGNMENT = 32
# What diffusers ends its schedules at.
_ENDS = {"polynomial": 1e-7}


def translate(flags: SftFlags, spec: FamilySpec, environment: Mapping[str, str], num_processes: int) -> dict[str, Any]:
    """The options of a run, but for its data and its length.

    Args:
        environment: variables of `accelerate launch` count.
        num_processes: of the run, on all machines.

    Raises:
        ConfigError: what cannot be done, all of it at once.
    """
    problems = [
        Problem(reason, key=f"--{name}", fix="leave it out") for name, reason in REFUSED.items() if name in flags.given
    ]
    if flags["condition_encoder_mode"] not in MODES:
        message = f'"{flags["condition_encoder_mode"]}" is not built: the original has no embeddings then'
        problems.append(Problem(message, "--condition_encoder_mode", allowed=", ".join(MODES)))
    config: dict[str, Any] = {
        "model_family": spec.name,
        "pretrained_model_name_or_path": flags["pretrained_model_name_or_path"],
        "output_dir": flags["output_dir"],
        "cache_dir": f"{flags['output_dir']}/cache",
        "seed": flags["seed"],
        "train_batch_size": flags["train_batch_size"],
        "gradient_accumulation_steps": flags["gradient_accumulation_steps"],
        "gradient_checkpointing": flags["gradient_checkpointing"],
        "disable_tf32": not flags["allow_tf32"],
        "mixed_precision": flags["mixed_precision"] or environment.get("ACCELERATE_MIXED_PRECISION") or "no",
        "resume_from_checkpoint": flags["resume_from_checkpoint"],
        "checkpoint_step_interval": flags["checkpointing_steps"],
        "checkpoints_total_limit": flags["checkpoints_total_limit"] or 0,
        "report_to": flags["report_to"],
        "tracker_project_name": flags["tracker_project_name"],
        "vae_batch_size": flags["vae_mini_batch"],
        "caption_dropout_probability": DROPPED_CAPTIONS,
        "reference_dropout_probability": 0.0,
        "data_backend_sampling": "uniform",
        "aspect_bucket_alignment": ALIGNMENT,
    }
    if flags["condition_encoder_mode"] == "sync":
        config["text_cache_ondemand"] = True
    for flag, option in (
        ("transformer_path", "pretrained_transformer_model_name_or_path"),
        ("vae_path", "pretrained_vae_model_name_or_path"),
    ):
        if flags[flag]:
            config[option] = flags[flag]
    config |= _trained_weights(flags)
    config |= _optimizer(flags, config["mixed_precision"])
    config |= _noise_levels(flags, num_processes)
    config |= _sharding(flags, spec, environment, num_processes, problems)
    if problems:
        raise ConfigError(problems)
    return config


def notes_of(flags: SftFlags, environment: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """A line for each flag that was given and does nothing, or something else than its name says.

    Args:
        config: what `translate` gave.
    """
    notes = [f"--{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in flags.given]
    if is_spread(flags, environment) and not config.get("fsdp_enable"):
        notes.append("--use_fsdp has no effect: one process, or NO_SHARD, shares no weights")
    if environment.get("FSDP_STATE_DICT_TYPE", "").startswith(("SHARDED", "LOCAL")):
        kind = environment["FSDP_STATE_DICT_TYPE"]
        notes.append(
            f"--fsdp_state_dict_type {kind}: checkpoints hold whole weights, which any number of processes reads"
        )
    return notes


def is_spread(flags: SftFlags, environment: Mapping[str, str]) -> bool:
    """Whether the flags or `accelerate launch` ask for FSDP."""
    return bool(flags["use_fsdp"]) or environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def _trained_weights(flags: SftFlags) -> dict[str, Any]:
    if not flags["use_peft_lora"]:
        chosen = {
            "trainable_modules": list(flags["trainable_modules"] or ()),
            "trainable_modules_low_learning_rate": list(flags["trainable_modules_low_learning_rate"]),
        }
        return {"model_type": "full", **{key: texts for key, texts in chosen.items() if texts}}
    start = {"init_lora": flags["lora_path"]} if flags["lora_path"] else {}
    return {
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": flags["lora_r"],
        "lora_alpha": flags["lora_alpha"],
        "lora_dropout": flags["lora_dropout"],
        "lora_init_type": "gaussian",
        "lora_target": [f"*.{name}" for name in flags["lora_target_modules"]],
        **start,
    }


def _optimizer(flags: SftFlags, mixed_precision: str) -> dict[str, Any]:
    name = flags["lr_scheduler"]
    found: dict[str, Any] = {
        "learning_rate": flags["learning_rate"],
        "lr_scale": flags["scale_lr"],
        "lr_scheduler": name,
        "lr_warmup_steps": 0 if name == "constant" else flags["lr_warmup_steps"],
        "lr_end": _ENDS.get(name, 0.0),
        "lr_power": 1.0,
        "max_grad_norm": flags["max_grad_norm"],
        "grad_clip_method": "norm",
    }
    if flags["use_came"]:
        return found | {"optimizer": "came"}
    # The original's weights and states are bf16 too; these are rounded stochastically, so that small steps count.
    plain = "adamw_bf16" if mixed_precision == "bf16" else "torch-adamw"
    adam = ("adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon")
    found |= {name: flags[name] for name in adam}
    return found | {"optimizer": "bnb-adamw8bit" if flags["use_8bit_adam"] else plain}


def _noise_levels(flags: SftFlags, num_processes: int) -> dict[str, Any]:
    """Density and weights. The original counts its levels from noise, so that its logit has the other sign."""
    scheme = flags["weighting_scheme"]
    found: dict[str, Any] = {}
    if scheme in ("sigma_sqrt", "cosmap"):
        found["flow_loss_weighting"] = scheme
    if flags["uniform_sampling"]:
        return found | {"flow_use_uniform_schedule": True, "timestep_stratified": num_processes > 1}
    if scheme == "logit_normal":
        return found | {"flow_logit_mean": -flags["logit_mean"], "flow_sigmoid_scale": flags["logit_std"]}
    if scheme == "mode":
        return found | {"flow_use_mode_schedule": True, "flow_mode_scale": flags["mode_scale"]}
    return found | {"flow_use_uniform_schedule": True}


# FSDP's sharding strategies, by name and by number -> whether fetched weights are let go, whether copies are kept.
_STRATEGIES: Mapping[str, tuple[bool, bool]] = {
    "FULL_SHARD": (True, False),
    "SHARD_GRAD_OP": (False, False),
    "HYBRID_SHARD": (True, True),
    "HYBRID_SHARD_ZERO2": (False, True),
}
_NUMBERED = ("", "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
# accelerate's variables of other engines, and what does their work here.
_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "deepspeed_config, or --use_fsdp", "ACCELERATE_USE_MEGATRON_LM": "--use_fsdp"}


def _sharding(
    flags: SftFlags, spec: FamilySpec, environment: Mapping[str, str], num_processes: int, problems: list[Problem]
) -> dict[str, Any]:
    """What `accelerate launch --use_fsdp` and its `--fsdp_*` flags mean."""
    for name, instead in _ENGINES.items():
        if environment.get(name, "").lower() == "true":
            problems.append(Problem("this engine of accelerate is not read", key=name, fix=f"use {instead}"))
    if not is_spread(flags, environment):
        return {}
    wrapped = [name.strip() for name in environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "").split(",")]
    if wrong := [name for name in wrapped if name and name not in spec.block_classes]:
        message = f'"{wrong[0]}" is not a block of {spec.title}'
        allowed = ", ".join(spec.block_classes)
        problems.append(Problem(message, "--fsdp_transformer_layer_cls_to_wrap", allowed=allowed))
    if environment.get("FSDP_IGNORED_MODULES"):
        problems.append(Problem("all weights are sharded", "--fsdp_ignored_modules", fix="leave it out"))
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    strategy = _NUMBERED[int(strategy)] if strategy.isdecimal() and int(strategy) < len(_NUMBERED) else strategy
    if strategy != "NO_SHARD" and strategy not in _STRATEGIES:
        allowed = ", ".join((*_STRATEGIES, "NO_SHARD"))
        problems.append(Problem(f'"{strategy}" is not a way to shard', "--fsdp_sharding_strategy", allowed=allowed))
    if num_processes == 1 or strategy not in _STRATEGIES:
        return {}
    reshards, keeps_copies = _STRATEGIES[strategy]
    if environment.get("FSDP_VERSION") == "2":
        reshards = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() != "false"
    local = int(environment.get("LOCAL_WORLD_SIZE", num_processes))
    found: dict[str, Any] = {"fsdp_enable": True, "fsdp_reshard_after_forward": reshards}
    if keeps_copies and 1 < local < num_processes:
        found["fsdp_shard_size"] = local
    if environment.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
        found["fsdp_cpu_offload"] = True
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        found["gradient_checkpointing"] = True
    return found
