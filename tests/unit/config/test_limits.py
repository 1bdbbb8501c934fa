"""What stands exactly at the limit of a rule is taken; what has no effect is said once, with its place."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import DATASET, Workspace

FULL = {"model_type": "full", "lycoris_config": None}
STANDARD = {"lora_type": "standard", "lycoris_config": None}
PLAIN = {"id": "plain", "instance_data_dir": "datasets/images"}


@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"lr_scheduler": "polynomial", "lr_end": 1e-4, "learning_rate": 1e-4, "optimizer": "adamw"},
            **{"optimizer_config": {"eps": 1.0, "weight_decay": 1000, "amsgrad": False, "betas": [0.9, 0.99]}},
            **{"validation_preview": True, "validation_preview_steps": 25, "lr_warmup_steps": 99},
            **{"timestep_bias_strategy": "range", "timestep_bias_begin": 499, "timestep_bias_end": 500},
            **{"validation_resolution": "2048x16", "aspect_bucket_alignment": 48, "report_to": "none"},
            **{"hub_model_id": f"me/{'x' * 93}", "num_machines": 1, "machine_rank": 0, "lr_scale": True},
            **{"lr_scale_sqrt": True, "flow_schedule_terminal": 0.5, "flow_schedule_shift": 3.0},
        },
        {
            **{"optimizer": "prodigy", "learning_rate": 0.1, "lr_scheduler": "constant", "lr_end": 1.0},
            **{"timestep_bias_strategy": "later", "timestep_bias_multiplier": 0, "timestep_bias_portion": 0.99},
            **{"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True, "use_ema": True},
            **{"flow_schedule_auto_shift_curve": "sqrt", "custom_tracker": "a.b:C", "report_to": "custom-tracker"},
            **{"musubi_blocks_to_swap": 2, "gradient_checkpointing": True, "gradient_checkpointing_interval": 1},
            **{"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_ramp_steps": 5},
            **{"scheduled_sampling_prob_end": 0.5, "scheduled_sampling_reflexflow": True, "validation_guidance": 1},
        },
        {
            **{"optimizer": "adamw_schedulefree", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 10},
            **{"quantize_activations": True, "base_model_precision": "int8-torchao", "mixed_precision": "bf16"},
            **{"base_model_default_dtype": "bf16", "max_train_steps": 0, "num_train_epochs": 1},
            **{"enable_group_offload": True, "tracker_run_name": "my run", "custom_tracker": "a:C", "report_to": "all"},
        },
        {
            **FULL,
            **{"fsdp_enable": True, "num_processes": 4, "fsdp_shard_size": 2, "optimizer": "adamw_bf16"},
            **{"fsdp_cpu_offload": True, "activation_memory": "lowest", "use_ema": True},
        },
        {
            **STANDARD,
            **{"lora_init_type": "orthogonal", "lora_rank": 4, "num_machines": 2, "machine_rank": 1},
            **{"main_process_ip": "10.0.0.1", "main_process_port": 29500, "activation_memory": "low"},
            **{"dynamo_backend": "inductor", "lora_target": ["layers.*.self_attn.to_q"], "train_batch_size": 2},
        },
        {**STANDARD, "lora_init_type": "pissa", "base_model_precision": "no_change", "deterministic": True},
    ],
)
def test_options_at_their_limits_are_taken(workspace: Workspace, changes: dict[str, Any]) -> None:
    workspace.config |= changes
    assert workspace.load_written().config.value("max_train_steps") == changes.get("max_train_steps", 100)


@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"minimum_aspect_ratio": 1.5, "maximum_aspect_ratio": 1.5, "resolution": 2048, "probability": 0.01},
            **{"minimum_image_size": 512, "maximum_image_size": 512, "target_downsample_size": 512},
            **{"start_step": 100, "end_step": 100, "id": "x" * 100},
        },
        {
            **{"crop_aspect": "random", "crop_aspect_buckets": [{"aspect_bucket": 1, "weight": 0}, 2]},
            **{"resolution": 16, "start_epoch": 2, "end_epoch": 2, "vae_cache_clear_each_epoch": True},
        },
        {"resolution_type": "area", "resolution": 20, "crop": False, "enlarge": False, "maximum_side": 512},
        {"caption_strategy": "textfile", "caption_fallback": "filename", "probability": 0},
        {"type": "records", "records_file": "rows.jsonl", "crop": False, "enlarge": True, "instance_data_dir": None},
    ],
)
def test_keys_of_a_dataset_at_their_limits_are_taken(workspace: Workspace, changes: dict[str, Any]) -> None:
    """Beside a plain one, which trains while the first does not."""
    workspace.put("rows.jsonl", "{}\n")
    workspace.datasets = [{**DATASET, **changes}, dict(PLAIN)]
    run = workspace.load_written()
    assert [entry.id for entry in run.datasets] == [changes.get("id", "images"), "plain"]
    assert run.warnings == ()


def test_an_eval_dataset_may_write_the_defaults_of_training(workspace: Workspace) -> None:
    held = {**PLAIN, "dataset_type": "eval", "probability": 1, "random_flip": False, "start_step": 0, "end_epoch": 0}
    workspace.datasets.append(held)
    workspace.config |= {"eval_steps_interval": 5, "checkpoint_keep_best": True, "early_stopping_patience": 3}
    workspace.config |= {"eval_dataset_id": "plain"}
    assert workspace.load_written().warnings == ()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"lr_warmup_steps": 100, "learning_rate": 0.001},
            "lr_warmup_steps: 100 steps of warm-up in a run of 100: the learning rate never reaches 0.001",
        ),
        (
            {"optimizer": "optimi-lion", "adam_epsilon": 1e-6},
            "adam_epsilon: optimi-lion has no such term; it is not used",
        ),
        (
            {"caption_dropout_probability": 0},
            "caption_dropout_probability: 0 never trains the empty caption that guidance uses; long runs do better "
            "with 0.05 to 0.1",
        ),
        (
            {"webhook_reporting_interval": 3},
            "webhook_reporting_interval: there is no webhook_config, so nothing is reported",
        ),
        ({"lora_rank": 4}, "lora_rank: has no use with lora_type lycoris"),
        ({**FULL, "lora_rank": 4}, "lora_rank: has no use with model_type full"),
        ({"lora_type": "standard"}, "lycoris_config: has no use with lora_type standard"),
        ({"input_perturbation_steps": 3}, "input_perturbation_steps: has no effect: input_perturbation is 0"),
        (
            {"scheduled_sampling_probability": 0.5},
            "scheduled_sampling_probability: has no effect: scheduled_sampling_max_step_offset is 0",
        ),
        (
            {"eval_epoch_interval": 3},
            "eval_epoch_interval: there is no dataset of dataset_type eval, so no eval loss is computed",
        ),
        (
            {"eval_holdout": 0.1},
            "eval_holdout, but no eval_steps_interval or eval_epoch_interval: no eval loss is computed",
        ),
    ],
)
def test_what_has_no_effect_is_said_once_with_its_place(
    workspace: Workspace, changes: dict[str, Any], line: str
) -> None:
    workspace.config |= changes
    [warning] = workspace.load_written().warnings
    place, _, text = warning.partition(": ")
    assert text == line
    key = line.partition(":")[0].partition(",")[0]
    written = (workspace.root / "config/config.json").read_text().splitlines()
    number = next(number for number, each in enumerate(written, 1) if f'"{key}"' in each)
    assert place == f"config/config.json:{number}"
