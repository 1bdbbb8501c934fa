"""What must hold between the keys of an adapter."""

from __future__ import annotations

from typing import Any

import pytest

from simpletuner.adapters.assistant import wants_assistant

from .conftest import Workspace

STANDARD = {"lora_type": "standard", "lycoris_config": None}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"lora_target": "attention,atention"}, "lora_target", '"atention" matches no layer'),  # codespell:ignore
        ({"lora_target": "layers.*.self_attn.to_v"}, "lora_target", "layers.*.self_attn.to_q"),
        ({"lora_target": []}, "lora_target", "names no layer"),
        ({"lora_init_type": "loftq"}, "lora_init_type", "set base_model_precision instead"),
        ({"lora_init_type": "eva"}, "lora_init_type", "before the run has any"),
        ({"lora_init_type": "pissa", "use_dora": True}, "lora_init_type", "cannot be combined with use_dora"),
        ({"lora_init_type": "orthogonal", "lora_rank": 3}, "lora_rank", "needs an even rank"),
        ({"lora_format": "webui"}, "lora_format", "diffusers, kohya, comfyui, lycoris"),
        ({"init_lora": "gone.safetensors"}, "init_lora", "there is no file of this name"),
        ({"peft_lora_mode": "singlora"}, "peft_lora_mode", "no maintained library"),
    ],
)
def test_settings_of_standard_lora_that_cannot_be_used(
    workspace: Workspace, changes: dict[str, Any], key: str, words: str
) -> None:
    workspace.config |= STANDARD | changes
    problems = workspace.fails_written().problems
    assert [problem.key for problem in problems] == [key]
    assert words in problems[0].render()


@pytest.mark.parametrize("target", ["default", "all-linear", "proj_out, layers.*.self_attn.to_q", ["layers.*"]])
def test_targets_that_stand_for_layers_are_taken(workspace: Workspace, target: Any) -> None:
    workspace.config |= STANDARD | {"lora_target": target}
    assert workspace.load_written().config.adapter.lora_target


def test_algorithms_that_read_weights_need_them_unpacked(workspace: Workspace) -> None:
    workspace.config["base_model_precision"] = "int8-quanto"
    workspace.lycoris["algo"] = "full"
    assert "full trains whole weights, and base_model_precision is int8-quanto" in workspace.fails_written().render()
    workspace.config |= STANDARD | {"lora_init_type": "pissa"}
    assert "pissa decomposes the base's weights" in workspace.fails_written().render()


def test_two_starts_are_refused(workspace: Workspace) -> None:
    workspace.put("start.safetensors", "x")
    workspace.config |= STANDARD | {"lora_init_type": "olora", "init_lora": "start.safetensors"}
    assert "are both a start" in workspace.fails_written().render()


def test_joined_files_of_weight_decomposed_adapters_need_the_whole_base(workspace: Workspace) -> None:
    workspace.config |= STANDARD | {"model_family": "flux", "lora_format": "kohya", "use_dora": True}
    assert workspace.load_written().config.adapter.use_dora
    workspace.config |= {"fsdp_enable": True, "num_processes": 2}
    problem = next(each for each in workspace.fails_written().problems if each.key == "lora_format")
    assert "simpletuner export" in problem.render()


def test_keys_of_the_other_kind_of_adapter_are_reported(workspace: Workspace) -> None:
    workspace.config["lora_rank"] = 8
    assert [
        line for line in workspace.load_written().warnings if "lora_rank: has no use with lora_type lycoris" in line
    ]
    workspace.config["lora_type"] = "standard"
    loaded = workspace.load_written()
    assert loaded.lycoris is None
    assert [line for line in loaded.warnings if "lycoris_config: has no use with lora_type standard" in line]


def test_sdxl_files_have_the_form_that_all_programs_read(workspace: Workspace) -> None:
    workspace.config |= STANDARD | {"model_family": "sdxl"}
    assert workspace.load_written().config.adapter.lora_format == "kohya"
    workspace.config["use_dora"] = True  # which kohya's form would change
    assert workspace.load_written().config.adapter.lora_format == "diffusers"
    workspace.config |= {"use_dora": False, "lora_format": "diffusers"}
    assert workspace.load_written().config.adapter.lora_format == "diffusers"
    workspace.config |= {"model_family": "flux"}
    del workspace.config["lora_format"]
    assert workspace.load_written().config.adapter.lora_format == "diffusers"


def test_whoever_chooses_weight_decomposition_is_reported_who_reads_it(workspace: Workspace) -> None:
    workspace.config |= STANDARD | {"model_family": "sdxl", "use_dora": True, "lora_format": "kohya"}
    [line] = [line for line in workspace.load_written().warnings if "use_dora" in line]
    assert "files in the kohya format are read by no other program" in line
    assert "ComfyUI computes another weight decomposition" in line
    assert line.endswith("with lora_format diffusers they are read by diffusers")
    workspace.config |= {"lora_type": "lycoris", "lycoris_config": "config/lycoris_config.json"}
    del workspace.config["use_dora"]
    workspace.lycoris["dora_wd"] = True
    [line] = [line for line in workspace.load_written().warnings if "dora_wd" in line]
    assert "read by LyCORIS; ComfyUI computes another weight decomposition" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"multiplier": 0.5, "algo": "diag-oft", "linear_dim": 4}, "cannot be used with diag-oft"),
        ({"multiplier": 0.5, "dora_wd": True}, "cannot be used with dora_wd"),
        ({"multiplier": 0}, "would train nothing"),
    ],
    ids=str,
)
def test_a_multiplier_that_no_file_can_hold_is_refused(workspace: Workspace, settings: dict[str, Any], words: str):
    workspace.lycoris |= settings
    [problem] = workspace.fails_written().problems
    assert problem.key == "multiplier"
    assert words in problem.message


def test_a_folder_of_peft_is_a_start(workspace: Workspace) -> None:
    workspace.put("start/adapter_model.safetensors", "x")
    workspace.config |= STANDARD | {"init_lora": "start"}
    assert workspace.load_written().config.adapter.init_lora.name == "start"
    workspace.config["init_lora"] = "."
    assert "there is no file of this name" in workspace.fails_written().render()


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({}, "trainable_modules", "model_type is lora"),
        ({"model_type": "full", "deepspeed_config": "zero.json"}, "trainable_modules", "fsdp_enable in place"),
        (
            {"model_type": "full", "optimizer": "muon", "trainable_modules_low_learning_rate": ["mlp"]},
            "trainable_modules_low_learning_rate",
            "one learning rate for all weights",
        ),
    ],
)
def test_parts_of_a_model_train_where_they_can(workspace: Workspace, changes: dict[str, Any], key: str, words) -> None:
    workspace.put("zero.json", {"zero_optimization": {"stage": 2}})
    workspace.config |= {"lycoris_config": None} if changes else {}
    workspace.config |= {"trainable_modules": ["self_attn"]} | changes
    problems = workspace.fails_written().problems
    assert any(problem.key == key and words in problem.render() for problem in problems)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"assistant_lora_path": "gone.safetensors"}, "there is no file of this name"),
        ({"assistant_lora_path": "models/gone.safetensors"}, "there is no file of this name"),
        ({"assistant_lora_path": "./helpers/v2"}, "there is no file of this name"),
        ({"assistant_lora_path": "config"}, "holds no adapter file"),
        ({"assistant_lora_path": "owner/name", "model_type": "full"}, "beside an adapter that trains"),
        ({"assistant_lora_path": "owner/name", "fsdp_enable": True, "num_processes": 2}, "needs a whole one"),
    ],
)
def test_assistants_that_cannot_be_used(workspace: Workspace, changes: dict[str, Any], words: str) -> None:
    workspace.config |= STANDARD | changes
    problems = workspace.fails_written().problems
    assert [problem.key for problem in problems] == ["assistant_lora_path"]
    assert words in problems[0].render()


@pytest.mark.parametrize(
    "where", ["owner/name", "owner/name/v2.safetensors", "owner/name/a/b.safetensors", "here.safetensors"]
)
def test_an_assistant_is_a_file_or_on_the_hub(workspace: Workspace, where: str) -> None:
    workspace.put("here.safetensors", "x")
    workspace.config |= STANDARD | {"assistant_lora_path": where}
    found = workspace.load_written().config.adapter.assistant_lora_path
    assert found is not None
    assert found.endswith(where)


def test_distilled_flavours_have_an_assistant_which_other_training_leaves_away(workspace: Workspace) -> None:
    workspace.config |= STANDARD | {"model_family": "z_image", "model_flavour": "turbo"}
    config = workspace.load_written().config
    assert config.adapter.assistant_lora_path == (
        "ostris/zimage_turbo_training_adapter/zimage_turbo_training_adapter_v2.safetensors"
    )
    assert wants_assistant(config)
    workspace.config |= {"assistant_lora_strength": 0}
    assert not wants_assistant(workspace.load_written().config)
    workspace.config |= {"assistant_lora_strength": 1, "model_type": "full"}
    assert not wants_assistant(workspace.load_written().config)
    workspace.config |= {"model_type": "lora", "model_flavour": "base"}
    assert not wants_assistant(workspace.load_written().config)
    workspace.config |= {"model_family": "flux", "model_flavour": "schnell"}
    assert workspace.load_written().config.adapter.assistant_lora_path == "ostris/FLUX.1-schnell-training-adapter"
