"""What stands exactly at the limit of a rule is taken; what has no effect is said once, with its place."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.errors import Problem

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
            **{"hub_model_id": f"me/{'x' * 93}", "num_machines": 1, "machine_rank": 0},
            **{"flow_schedule_terminal": 0.5, "flow_schedule_shift": 3.0},
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
            **{"lr_scale": True, "lr_scale_sqrt": True},
            **{"enable_group_offload": True, "tracker_run_name": "my run", "custom_tracker": "a:C", "report_to": "all"},
        },
        {
            **FULL,
            **{"fsdp_enable": True, "num_processes": 2, "fsdp_shard_size": 4, "optimizer": "adamw_bf16"},
            **{"num_machines": 2, "machine_rank": 0, "main_process_ip": "10.0.0.1", "main_process_port": 29500},
            **{"fsdp_cpu_offload": True, "activation_memory": "lowest", "use_ema": True},
            **{"lr_scale": True, "lr_scheduler": "linear", "learning_rate": 1e-5, "lr_end": 2e-5},
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


OFF = "remove the key"
SEVERAL = {"num_processes": 4, "optimizer": "adamw_bf16"}
ZERO = {
    "deepspeed_config": "zero.json",
    "grad_clip_method": "norm",
    "num_processes": 2,
    "optimizer": "adamw_bf16",
    "mixed_precision": "bf16",
}
PLANS = "the weights among the processes"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {**FULL, "init_lora": "start.safetensors"},
            (
                "init_lora",
                '"{root}/start.safetensors" has no use: model_type is "full", which trains without an adapter',
                None,
                "merge it into the model first: simpletuner export --merge",
            ),
        ),
        (
            {**FULL, "base_model_precision": "int8-torchao"},
            (
                "base_model_precision",
                "int8-torchao weights cannot be trained, and model_type is full",
                "no_change",
                "set it to no_change, or train an adapter (model_type lora)",
            ),
        ),
        (
            {"text_encoder_1_precision": "int8-quanto"},
            ("text_encoder_1_precision", "Toy has no text encoder", "no_change", OFF),
        ),
        (
            {"model_family": "sd15", "text_encoder_2_precision": "int8-quanto", **STANDARD},
            ("text_encoder_2_precision", "Stable Diffusion 1.5 and 2.1 has 1 text encoder", "no_change", OFF),
        ),
        (
            {**FULL, "enable_group_offload": True},
            (
                "enable_group_offload",
                "only frozen weights can wait in main memory, and model_type is full",
                None,
                "remove the key, or train an adapter (model_type lora)",
            ),
        ),
        (
            {"musubi_blocks_to_swap": 1, "fsdp_enable": True, **SEVERAL},
            (
                "musubi_blocks_to_swap",
                f"fsdp_enable divides {PLANS} already",
                None,
                "remove one of the two; fsdp_cpu_offload keeps the parts in main memory",
            ),
        ),
        (
            {"memory": "auto", "fsdp_enable": True, **SEVERAL},
            ("memory", f"fsdp_enable divides {PLANS}, for which nothing is planned", None, "remove one of the two"),
        ),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_backend": "unsloth"},
            (
                "gradient_checkpointing_backend",
                "has no effect without gradient_checkpointing",
                None,
                "set gradient_checkpointing to true",
            ),
        ),
        (
            {"deterministic": True, "dynamo_backend": "inductor"},
            (
                "deterministic",
                "inductor chooses its kernels by timing them at each start, so two starts may differ in the last bits",
                "false",
                "remove it, or set dynamo_backend to no",
            ),
        ),
        (
            {"num_machines": 2, "machine_rank": 2, "main_process_ip": "10.0.0.1", "main_process_port": 1234},
            (
                "machine_rank",
                "2 is not a machine of 2",
                "0 to 1",
                "count from 0, and give every machine the same num_machines",
            ),
        ),
        (
            {"num_machines": 2, "main_process_ip": "localhost", "main_process_port": 1234},
            (
                "main_process_ip",
                "is this machine's own address, which the other machines cannot reach",
                "the address of machine 0 (MASTER_ADDR)",
                "set it, the same on all machines",
            ),
        ),
        (
            {"num_machines": 2, "main_process_ip": "10.0.0.1"},
            (
                "main_process_port",
                "is not set: a free port would be another one on each machine",
                "a port that is open on machine 0 (MASTER_PORT)",
                "set it, for example 29500, the same on all machines",
            ),
        ),
        (
            {"fsdp_shard_size": 2},
            ("fsdp_shard_size", "has no use without fsdp_enable", None, "set fsdp_enable, or remove the key"),
        ),
        (
            {"fsdp_enable": True, "num_processes": 1, "optimizer": "adamw_bf16"},
            ("fsdp_enable", "one process has no other to share with", None, "set num_processes above 1"),
        ),
        (
            {"fsdp_enable": True, "fsdp_shard_size": 3, **SEVERAL},
            ("fsdp_shard_size", "3 does not divide the 4 processes", "a divisor of them", None),
        ),
        (
            {"fsdp_enable": True, "base_model_precision": "int8-torchao", **SEVERAL},
            (
                "fsdp_enable",
                'cannot shard weights quantized as "int8-torchao": their packed form cannot be split',
                None,
                "set base_model_precision to no_change: sharded over two processes, bf16 takes what int8 takes on one",
            ),
        ),
        (
            {**ZERO, "fsdp_enable": True},
            ("deepspeed_config", "shards the model as fsdp_enable does", None, "remove one of the two"),
        ),
        (
            {**ZERO, "num_processes": 1},
            ("deepspeed_config", "one process has no other to share with", None, "set num_processes above 1"),
        ),
        (
            {**ZERO, "max_grad_norm": 1.0, "grad_clip_method": "value"},
            ("grad_clip_method", "DeepSpeed clips by norm only", '"norm"', "set it to norm"),
        ),
        (
            {**ZERO, "mixed_precision": "fp16"},
            ("mixed_precision", "scales losses, which DeepSpeed's own step would not know", "bf16, no", "use bf16"),
        ),
        (
            {**ZERO, "optimizer": "muon", "learning_rate": 0.01},
            (
                "optimizer",
                "muon looks at whole weights, and DeepSpeed moves parts of them laid end to end",
                None,
                "use adamw_bf16 or lion",
            ),
        ),
        (
            {**ZERO, "use_ema": True},
            (
                "use_ema",
                "the average needs the weights that stage 3 shards",
                "false with ZeRO stage 3",
                "use fsdp_enable, which keeps an EMA",
            ),
        ),
        (
            {**ZERO, "base_model_precision": "int8-torchao"},
            ("base_model_precision", "stage 3 shards plain weights only", "no_change", "use stage 2"),
        ),
        (
            {"flow_schedule_shift": 3.0, "flow_schedule_auto_shift": True},
            (
                "flow_schedule_shift",
                "flow_schedule_auto_shift chooses the shift already",
                None,
                "keep one of them",
            ),
        ),
        (
            {**FULL, "validation_lycoris_strength": 0.5},
            (
                "validation_lycoris_strength",
                "cannot be used: model_type is full, and there is no adapter",
                "only 1",
                OFF,
            ),
        ),
        (
            {"eval_dataset_id": "gone"},
            (
                "eval_dataset_id",
                'there is no enabled dataset "gone" of dataset_type eval',
                "none: there is no eval dataset",
                None,
            ),
        ),
        (
            {"checkpoint_keep_best": True},
            (
                "checkpoint_keep_best",
                "no eval loss is computed, so no checkpoint is best",
                None,
                "set eval_steps_interval and add a dataset of dataset_type eval (or set eval_holdout), or remove the "
                "key",
            ),
        ),
        (
            {"early_stopping_patience": 3},
            (
                "early_stopping_patience",
                "no eval loss is computed, so nothing can stop falling",
                None,
                "set eval_steps_interval and add a dataset of dataset_type eval (or set eval_holdout), or remove the "
                "key",
            ),
        ),
        (
            {"optimizer": "adamw", "optimizer_config": {"weight_decay": 1001}},
            (
                "optimizer_config",
                "1001 cannot be weight_decay of adamw: it would train nothing, or destroy the weights",
                "0 to 1000",
                None,
            ),
        ),
        (
            {"trainable_modules": "layers.*"},
            (
                "trainable_modules",
                "chooses weights of the model itself, and model_type is lora",
                None,
                "remove the key (lora_target chooses layers of an adapter)",
            ),
        ),
    ],
    ids=lambda each: "",
)
def test_a_refusal_says_what_was_given_what_is_allowed_and_what_to_do(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], problem: tuple[Any, ...]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # DeepSpeed is there
    workspace.put("start.safetensors", "x")
    workspace.put("zero.json", {"zero_optimization": {"stage": 3}})
    workspace.config |= changes
    problems = workspace.fails_written().problems
    assert len(problems) == 1, [each.render() for each in problems]
    [found] = problems
    key, message, allowed, fix = problem
    expected = (key, message.format(root=workspace.root), allowed, fix)
    assert (found.key, found.message, found.allowed, found.fix) == expected


def test_a_deepspeed_file_says_nothing_that_is_an_option(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    workspace.config |= {"deepspeed_config": "zero.json", "num_processes": 2}
    settings = {"train_batch_size": 4, "optimizer": {"type": "Adam"}, "bf16": {"enabled": False}, "fp16": "auto"}
    workspace.put("zero.json", {**settings, "amp": {"opt_level": 1}, "zero_optimization": {"stage": 0}})
    file, allowed = str(workspace.root / "zero.json"), '"auto", or no such key'
    assert workspace.fails_written().problems == [
        Problem("DeepSpeed is not installed", "deepspeed_config", fix="pip install deepspeed"),
        *(
            Problem(
                f"{key} is set in the DeepSpeed file",
                "deepspeed_config",
                file,
                allowed=allowed,
                fix=f"set {ours} in config.json and take it out there",
            )
            for key, ours in (("train_batch_size", "train_batch_size"), ("optimizer", "optimizer"))
        ),
        Problem(
            "zero_optimization.stage is 0",
            "deepspeed_config",
            file,
            allowed="1 (shards the optimizer's state), 2 (gradients too), 3 (weights too)",
            fix='write {"zero_optimization": {"stage": 2}}',
        ),
    ]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"crop": True, "enlarge": False},
            (
                "images.enlarge",
                "false keeps the sizes of images, and crop cuts them to one shape",
                "set crop to false, or remove the key",
            ),
        ),
        (
            {"maximum_side": 512},
            (
                "images.maximum_side",
                "512 limits images that keep their own size, and these are enlarged",
                "set enlarge to false, or remove the key",
            ),
        ),
        (
            {"caption_strategy": "instanceprompt", "instance_prompt": "a", "caption_fallback": "filename"},
            (
                "images.caption_fallback",
                "has no use: all images have instance_prompt as their caption",
                "remove it, or change caption_strategy",
            ),
        ),
        ({"caption_fallback": "filename"}, ("images.caption_fallback", "has no use: it is the caption_strategy", None)),
        (
            {"text_embeds": "gone"},
            (
                "images.text_embeds",
                '"gone" is not the text_embeds entry that all captions are kept in',
                "remove the key",
            ),
        ),
        (
            {"caption_strategy": "csv", "metadata_file": "datasets/images/a.xml"},
            ("images.metadata_file", '"{root}/datasets/images/a.xml" has none of the known extensions', None),
        ),
    ],
    ids=lambda each: "",
)
def test_a_refusal_of_a_key_of_a_dataset_says_what_to_do(
    workspace: Workspace, changes: dict[str, Any], problem: tuple[Any, ...]
) -> None:
    workspace.put("datasets/images/a.xml", "x")
    workspace.datasets[0] |= changes
    [found] = workspace.fails_written().problems
    key, message, fix = problem
    assert (found.key, found.message, found.fix) == (key, message.format(root=workspace.root), fix)
