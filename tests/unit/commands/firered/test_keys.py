"""The flags of sft and the variables of accelerate: what each becomes, and what is refused."""

from __future__ import annotations

import pytest

from simpletuner.commands.firered.flags import parse_sft, sft_parser
from simpletuner.commands.firered.keys import REFUSED, WITHOUT_EFFECT, notes_of, translate
from simpletuner.commands.firered.launched import command_of
from simpletuner.commands.firered.run import _length
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_spec

SPEC = get_spec("qwen_image")
NEEDED = ("--pretrained_model_name_or_path=/models/edit", "--train_data_meta_dir=/data/meta")
# The command of the page, as a shell gives it.
PAGE = [
    "accelerate",
    "launch",
    "--mixed_precision=bf16",
    "--use_fsdp",
    "--fsdp_auto_wrap_policy",
    "TRANSFORMER_BASED_WRAP",
    "--fsdp_transformer_layer_cls_to_wrap=QwenImageTransformerBlock",
    "--fsdp_state_dict_type=SHARDED_STATE_DICT",
    "--num_processes",
    "8",
    "--num_machines",
    "1",
    "--machine_rank",
    "0",
    "--main_process_ip",
    "localhost",
    "--main_process_port",
    "6003",
    "-m",
    "src.sft",
    "--pretrained_model_name_or_path=/path/to/Qwen-Image-Edit-2509",
    "--train_data_meta_dir=/path/to/your_meta_dir",
    "--train_data_weights=dataset_a=0.5,dataset_b=1.2,dataset_c=1.0",
    "--train_src_img_num_weights=0=1,1=1,2=1,3=0",
    "--train_batch_size=1",
    "--image_sample_size=512",
    "--gradient_accumulation_steps=1",
    "--num_train_epochs=1",
    "--max_train_steps=512",
    "--learning_rate=2e-05",
    "--lr_scheduler=constant_with_warmup",
    "--lr_warmup_steps=100",
    "--checkpointing_steps=100",
    "--output_dir=/path/to/ckpts",
    "--gradient_checkpointing",
    "--mixed_precision=bf16",
    "--adam_weight_decay=3e-2",
    "--max_grad_norm=0.05",
    "--uniform_sampling",
    "--trainable_modules",
    ".",
    "--vae_mini_batch=1",
]


def translated(*words: str, environment: dict[str, str] | None = None, processes: int = 1):
    return translate(parse_sft([*NEEDED, *words]), SPEC, environment or {}, processes)


def test_the_command_of_the_page_becomes_these_options() -> None:
    command = command_of(PAGE)
    assert command.options == {"num_processes": 8}
    assert translate(parse_sft(command.flags), SPEC, command.variables, 8) == {
        "model_family": "qwen_image",
        "pretrained_model_name_or_path": "/path/to/Qwen-Image-Edit-2509",
        "model_type": "full",
        "trainable_modules": ["."],
        "output_dir": "/path/to/ckpts",
        "cache_dir": "/path/to/ckpts/cache",
        "seed": 42,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "disable_tf32": True,
        "mixed_precision": "bf16",
        "resume_from_checkpoint": "latest",
        "checkpoint_step_interval": 100,
        "checkpoints_total_limit": 0,
        "report_to": "wandb",
        "tracker_project_name": "rededit-finetune",
        "vae_batch_size": 1,
        "caption_dropout_probability": 0.05,
        "reference_dropout_probability": 0.0,
        "data_backend_sampling": "uniform",
        "aspect_bucket_alignment": 32,
        "optimizer": "adamw_bf16",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 3e-2,
        "adam_epsilon": 1e-8,
        "learning_rate": 2e-5,
        "lr_scale": False,
        "lr_scheduler": "constant_with_warmup",
        "lr_warmup_steps": 100,
        "lr_end": 0.0,
        "lr_power": 1.0,
        "max_grad_norm": 0.05,
        "grad_clip_method": "norm",
        "flow_use_uniform_schedule": True,
        "timestep_stratified": True,
        "fsdp_enable": True,
        "fsdp_reshard_after_forward": True,
    }


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--use_came"], {"optimizer": "came"}),
        (["--use_8bit_adam", "--adam_beta2=0.95"], {"optimizer": "bnb-adamw8bit", "adam_beta2": 0.95}),
        (["--allow_tf32"], {"disable_tf32": False}),
        (["--mixed_precision=no"], {"optimizer": "torch-adamw"}),
        (["--lr_scheduler=polynomial"], {"lr_end": 1e-7, "lr_warmup_steps": 500}),
        (["--lr_scheduler=constant"], {"lr_warmup_steps": 0}),
        (["--condition_encoder_mode=sync"], {"text_cache_ondemand": True}),
        (["--weighting_scheme=none"], {"flow_use_uniform_schedule": True}),
        (["--weighting_scheme=cosmap"], {"flow_use_uniform_schedule": True, "flow_loss_weighting": "cosmap"}),
        (["--weighting_scheme=mode", "--mode_scale=0.5"], {"flow_use_mode_schedule": True, "flow_mode_scale": 0.5}),
        (
            ["--weighting_scheme=logit_normal", "--logit_mean=0.3", "--logit_std=2"],
            {"flow_logit_mean": -0.3, "flow_sigmoid_scale": 2.0},
        ),
        (
            ["--trainable_modules", "attn", "img_mlp", "--trainable_modules_low_learning_rate", "txt_mlp"],
            {"trainable_modules": ["attn", "img_mlp"], "trainable_modules_low_learning_rate": ["txt_mlp"]},
        ),
        (
            ["--use_peft_lora", "--lora_r=8", "--lora_target_modules", "to_q", "to_out.0", "--lora_path=start"],
            {
                **{"model_type": "lora", "lora_type": "standard", "lora_rank": 8, "lora_alpha": 32.0},
                **{"lora_dropout": 0.0, "lora_init_type": "gaussian", "lora_target": ["*.to_q", "*.to_out.0"]},
                "init_lora": "start",
            },
        ),
        (
            ["--transformer_path=a.safetensors", "--vae_path=b"],
            {
                "pretrained_transformer_model_name_or_path": "a.safetensors",
                "pretrained_vae_model_name_or_path": "b",
            },
        ),
    ],
)
def test_flags_become_options(words: list[str], found: dict) -> None:
    config = translated(*words)
    assert {key: config[key] for key in found} == found


FSDP = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, {"fsdp_enable": True, "fsdp_reshard_after_forward": True, "mixed_precision": "bf16"}),
        ({"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, {"fsdp_reshard_after_forward": False}),
        ({"FSDP_SHARDING_STRATEGY": "2"}, {"fsdp_reshard_after_forward": False}),
        ({"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "false"}, {"fsdp_reshard_after_forward": False}),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD", "LOCAL_WORLD_SIZE": "2"}, {"fsdp_shard_size": 2}),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, {"fsdp_cpu_offload": True}),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"gradient_checkpointing": True}),
    ],
)
def test_variables_of_accelerate_say_how_weights_are_spread(variables: dict[str, str], found: dict) -> None:
    config = translated(environment=FSDP | variables, processes=4)
    assert {key: config[key] for key in found} == found


def test_one_process_and_no_shard_spread_nothing() -> None:
    assert "fsdp_enable" not in translated(environment=FSDP)
    assert "fsdp_enable" not in translated(environment=FSDP | {"FSDP_SHARDING_STRATEGY": "NO_SHARD"}, processes=4)
    assert "fsdp_enable" not in translated(processes=4)


@pytest.mark.parametrize(
    ("words", "variables", "key", "said"),
    [
        (["--streaming"], {}, "--streaming", "never built it"),
        (["--condition_encoder_mode=online"], {}, "--condition_encoder_mode", "offline, sync"),
        (["--abnormal_norm_clip_start=1000"], {}, "--abnormal_norm_clip_start", "at every step"),
        (["--initial_grad_norm_ratio=5"], {}, "--initial_grad_norm_ratio", "at every step"),
        ([], {"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED", "--use_fsdp"),
        (
            [],
            FSDP | {"FSDP_TRANSFORMER_CLS_TO_WRAP": "FluxTransformerBlock"},
            "--fsdp_transformer_layer_cls_to_wrap",
            "QwenImageTransformerBlock",
        ),
        ([], FSDP | {"FSDP_IGNORED_MODULES": "x"}, "--fsdp_ignored_modules", "leave it out"),
        ([], FSDP | {"FSDP_SHARDING_STRATEGY": "OTHER"}, "--fsdp_sharding_strategy", "FULL_SHARD"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(words, variables, key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated(*words, environment=variables, processes=2)
    assert [problem.key for problem in caught.value.problems] == [key]
    assert said in caught.value.render()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learning_rate=fast"], "learning_rate"),
        (["--lr_scheduler=sine"], "invalid choice"),
        (["--trainable_modules"], "expected at least one argument"),
    ],
)
def test_values_that_are_none_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sft([*NEEDED, *words])
    assert said in caught.value.render()


def test_other_words_are_options_of_this_program() -> None:
    """Behind a flag that takes several words too, and where the value holds blanks."""
    words = ["--trainable_modules", "attn", "--validation_prompt=a hat", "--use_ema", "--ema_decay", "0.9"]
    flags = parse_sft([*NEEDED, *words])
    assert flags["trainable_modules"] == ["attn"]
    assert flags.rest == ("--validation_prompt=a hat", "--use_ema", "--ema_decay", "0.9")


# `train/src/arguments.py` of the original, all of it.
FLAGS_OF_THE_ORIGINAL = (
    *("local_rank", "nnodes", "num_processes_per_node", "seed", "use_fsdp", "pretrained_model_name_or_path"),
    *("transformer_path", "vae_path", "output_dir", "train_data_meta_dir", "train_data_weights"),
    *("train_src_img_num_weights", "num_train_epochs", "max_train_steps", "train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "scale_lr", "lr_scheduler", "lr_warmup_steps"),
    *("use_8bit_adam", "use_came", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm"),
    *("gradient_checkpointing", "allow_tf32", "mixed_precision", "trainable_modules"),
    *("trainable_modules_low_learning_rate", "train_sampling_steps", "uniform_sampling", "weighting_scheme"),
    *("logit_mean", "logit_std", "mode_scale", "image_sample_size", "dataloader_num_workers", "prefetch_factor"),
    *("condition_encoder_mode", "enable_inverse", "streaming", "vae_mini_batch", "logging_dir", "report_to"),
    *("report_model_info", "tracker_project_name", "checkpointing_steps", "checkpoints_total_limit"),
    *("resume_from_checkpoint", "abnormal_norm_clip_start", "initial_grad_norm_ratio", "use_peft_lora", "lora_r"),
    *("lora_alpha", "lora_dropout", "lora_target_modules", "lora_path"),
)


def test_every_flag_of_the_original_is_known() -> None:
    """What each becomes, and which are refused, is tried below."""
    known = {action.dest: action for action in sft_parser()._actions}
    assert set(FLAGS_OF_THE_ORIGINAL) <= known.keys()
    assert len(FLAGS_OF_THE_ORIGINAL) == len(set(FLAGS_OF_THE_ORIGINAL)) == 60
    assert {"skip_bad_rows", "help"} == known.keys() - set(FLAGS_OF_THE_ORIGINAL)
    assert all(action.help for action in known.values())


def test_every_flag_acts_or_says_why_not() -> None:
    """A flag with another value changes the options, the data, or is in one of the two tables."""
    elsewhere = {"train_data_meta_dir", "train_data_weights", "train_src_img_num_weights", "image_sample_size"}
    elsewhere |= {"enable_inverse", "skip_bad_rows", "num_train_epochs", "max_train_steps", "use_fsdp", "help"}
    other = {int: "7", float: "0.3", str: "x", None: None}
    plain = translated("--weighting_scheme=none")
    choices = {"lr_scheduler": "cosine", "weighting_scheme": "cosmap", "mixed_precision": "fp16"}
    beside = {
        **dict.fromkeys(
            ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_path"), "--use_peft_lora"
        ),
        **dict.fromkeys(("logit_mean", "logit_std"), "--weighting_scheme=logit_normal"),
        "mode_scale": "--weighting_scheme=mode",
        "lr_warmup_steps": "--lr_scheduler=linear",
        "condition_encoder_mode": "--seed=42",
    }
    values = {"condition_encoder_mode": "sync"}
    for action in sft_parser()._actions:
        name = action.dest
        if name in elsewhere or name in WITHOUT_EFFECT or name in REFUSED:
            continue
        value = values.get(name) or choices.get(name) or other[action.type]
        word = f"--{name}" if value is None else f"--{name}={value}"
        needed = beside.get(name)
        before = translated(*([needed] if needed else [])) if needed else plain
        assert translated(*([needed] if needed else []), word) != before, name


def test_flags_without_effect_are_reported_where_they_are_given() -> None:
    assert notes_of(parse_sft(NEEDED), {}, {}) == []
    [line] = notes_of(parse_sft([*NEEDED, "--dataloader_num_workers=8"]), {}, {})
    assert line.startswith("--dataloader_num_workers has no effect: ")
    sharded = FSDP | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    alone, whole = notes_of(parse_sft(NEEDED), sharded, {})
    assert alone.startswith("--use_fsdp has no effect")
    assert "whole weights" in whole
    assert notes_of(parse_sft(NEEDED), FSDP, {"fsdp_enable": True}) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--x"], "there is no sft in the command"),
        (["torchrun", "-m", "src.sft"], '"torchrun" is not a supported launcher'),
        (["accelerate", "launch", "--num_processes=3", "--num_machines=2", "-m", "src.sft"], "not a multiple of the 2"),
        (["accelerate", "launch", "--num_processes=x", "-m", "src.sft"], "not a number above 0"),
        (["accelerate", "launch", "--use_deepspeed", "-m", "src.sft"], "--use_deepspeed"),
    ],
)
def test_commands_that_are_no_launch_of_sft(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_of(words)
    assert said in caught.value.render()


def test_processes_of_several_machines_are_divided() -> None:
    words = ["accelerate", "launch", "--num_processes=16", "--num_machines=2", "-m", "simpletuner", "sft", "--seed=1"]
    command = command_of(words)
    assert (command.options, command.flags) == ({"num_processes": 8, "num_machines": 2}, ("--seed=1",))
    assert command_of(["sft", "--seed=1"]).flags == ("--seed=1",)


@pytest.mark.parametrize(("rows", "processes", "steps"), [(100, 1, 36), (100, 2, 18), (15, 2, 3)])
def test_an_epoch_is_as_many_steps_as_all_processes_fill(rows: int, processes: int, steps: int) -> None:
    """Three epochs; a step takes 8 rows of each process, and an epoch of fewer rows is one step."""
    words = ["--pretrained_model_name_or_path=m", "--train_data_meta_dir=d", "--num_train_epochs=3"]
    flags = parse_sft([*words, "--train_batch_size=4", "--gradient_accumulation_steps=2"])
    assert _length(flags, rows, processes) == {"max_train_steps": steps, "num_train_epochs": 0}
    assert _length(parse_sft([*words, "--max_train_steps=7"]), rows, processes)["max_train_steps"] == 7
