"""Each rule across keys refuses what breaks it and lets the rest pass; all faults show at once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.json_reader import parse_json
from simpletuner.config.options import all_options
from simpletuner.config.prompt_library import LibraryPrompt, read_prompt_library

from .conftest import Workspace


def test_the_sound_configuration_breaks_no_rule(workspace: Workspace) -> None:
    run = workspace.load_written()
    assert run.warnings == ()
    assert [entry.id for entry in run.datasets] == ["images"]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"num_train_epochs": 2}, "max_train_steps", "2 epochs (num_train_epochs) are both set"),
        ({"max_train_steps": 0}, "max_train_steps", "no length"),
        ({"model_flavour": "lage"}, "model_flavour", 'did you mean "large"?'),
        ({"offset_noise": True}, "offset_noise", "its noise is its own"),
        ({"validation_guidance_rescale": 0.5}, "validation_guidance_rescale", "has no guidance_rescale"),
        ({"validation_guidance_real": 3}, "validation_guidance_real", "has no true_cfg_scale"),
        ({"validation_guidance_skip_layers": "7,8"}, "validation_guidance_skip_layers", "has no skip_guidance_layers"),
        ({"validation_guidance_skip_scale": 2}, "validation_guidance_skip_scale", "has no use without"),
        ({"clip_skip": 2}, "clip_skip", "2 has no meaning for Toy"),
        ({"force_zeros_for_empty_prompt": False}, "force_zeros_for_empty_prompt", "false has no meaning for Toy"),
        ({"clip_skip": 0}, "clip_skip", "0 is too small"),
        ({"validation_noise_scheduler": "ddim"}, "validation_noise_scheduler", "Toy is a flow model"),
        ({"validation_preview": True, "validation_disable": True}, "validation_preview", "validation generates none"),
        ({"validation_method": "external-script"}, "validation_external_script", "is missing"),
        ({"validation_external_script": "draw"}, "validation_external_script", "has no use"),
        ({"validation_external_background": False}, "validation_external_background", "would stop training"),
        ({"lycoris_config": None}, "lycoris_config", "lora_type lycoris needs"),
        ({"model_type": "full"}, "lycoris_config", "trains without an adapter"),
        ({"lr_scheduler": "polynomial", "lr_end": 1}, "lr_end", "not below learning_rate"),
        ({"lr_scheduler": "cosine", "learning_rate": 1e-7}, "lr_end", "4e-07 is not below learning_rate"),
        ({"report_to": "none,tensorboard"}, "report_to", "none and another"),
        ({"aspect_bucket_alignment": 24}, "aspect_bucket_alignment", "a multiple of 16"),
        ({"validation_resolution": "4096x512"}, "validation_resolution", "at most 2048 pixels"),
        ({"resume_from_checkpoint": "checkpoint-7"}, "resume_from_checkpoint", "output/run/checkpoint-7"),
        ({"output_dir": "datasets/images/out"}, "output_dir", 'lies in the images of dataset "images"'),
        ({"output_dir": "config/config.json/x"}, "output_dir", "is a file"),
        ({"output_dir": "/proc/run"}, "output_dir", '"/proc" cannot be written'),
        ({"pretrained_model_name_or_path": "./gone"}, "pretrained_model_name_or_path", "there is no model folder"),
        ({"publishing_config": {"type": "s3"}}, "publishing_config", "only the Hugging Face Hub is built"),
        ({"push_checkpoints_to_hub": True}, "push_checkpoints_to_hub", "no effect without push_to_hub"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "hub_model_id", "cannot name a repository"),
        ({"report_to": "swanlab"}, "report_to", "this tracker is not built in"),
        ({"report_to": "custom-tracker"}, "custom_tracker", "is missing"),
        ({"report_to": "custom-tracker", "custom_tracker": "mine"}, "custom_tracker", "does not name a class"),
        ({"custom_tracker": "mine:Mine"}, "custom_tracker", "report_to does not name"),
        ({"optimizer": "dadaptation"}, "optimizer", "use prodigy"),
        ({"optimizer": "prodigy"}, "learning_rate", "set learning_rate to 1"),
        ({"optimizer": "adamw_schedulefree", "use_ema": True}, "use_ema", "averages the weights itself"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "cosine"}, "lr_scheduler", "falling learning rate"),
        ({"optimizer_config": "amsgrd=true", "optimizer": "adamw"}, "optimizer_config", 'did you mean "amsgrad"?'),
        ({"optimizer_config": "amsgrad=2", "optimizer": "adamw"}, "optimizer_config", "a value like false"),
        ({"optimizer_config": {"betas": [0.9]}, "optimizer": "came"}, "optimizer_config", "a value like [0.9"),
        ({"optimizer_config": {"eps": 0}, "optimizer": "adamw"}, "optimizer_config", "divided by 0"),
        ({"optimizer_config": {"eps1": -1.0}, "optimizer": "adafactor"}, "optimizer_config", "above 0"),
        ({"optimizer_config": "lr=1e-3"}, "optimizer_config", "use learning_rate"),
        ({"lr_scale_sqrt": True}, "lr_scale_sqrt", "set lr_scale to true too"),
        ({"gradient_checkpointing": "auto"}, "gradient_checkpointing", 'gradient_checkpointing_interval to "auto"'),
        ({"gradient_checkpointing_interval": "some"}, "gradient_checkpointing_interval", 'or "auto"'),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_interval": 2},
            "gradient_checkpointing_interval",
            "no",
        ),
        ({"gradient_checkpointing": False, "musubi_blocks_to_swap": 2}, "musubi_blocks_to_swap", "not recomputed"),
        ({"musubi_blocks_to_swap": 2, "gradient_checkpointing_interval": "auto"}, "musubi_blocks_to_swap", "remove"),
        ({"enable_group_offload": True, "dynamo_backend": "inductor"}, "enable_group_offload", "stay on the device"),
        ({"activation_memory": "lowest", "dynamo_backend": "eager"}, "activation_memory", "dynamo_backend to no"),
        ({"attention_mechanism": "xformers"}, "attention_mechanism", "use native-efficient"),
        ({"ramtorch": True}, "ramtorch", "enable_group_offload"),
        ({"base_model_precision": "int8dq-int4-torchao"}, "base_model_precision", "or int8dq-torchao"),
        ({"quantize_via": "pipeline"}, "quantize_via", "use accelerator"),
        ({"quantize_activations": True}, "quantize_activations", "base_model_precision is no_change"),
        (
            {"quantize_activations": True, "base_model_precision": "nf4-bnb"},
            "quantize_activations",
            "set base_model_precision to int8-torchao",
        ),
        (
            {"quantize_activations": True, "base_model_precision": "fp8wo-torchao"},
            "quantize_activations",
            "fp8wo-torchao is float8 of weights only",
        ),
        ({"text_encoder_1_precision": "int8dq-torchao"}, "text_encoder_1_precision", "stay in the cache"),
        ({"text_encoder_1_precision": "int8-quanto"}, "text_encoder_1_precision", "no text encoder"),
        ({"mixed_precision": "fp8"}, "mixed_precision", "fp8-torchao"),
        ({"mixed_precision": "fp16", "base_model_default_dtype": "bf16"}, "base_model_default_dtype", "remove the key"),
        ({"evaluation_type": "clip", "validation_disable": True}, "evaluation_type", "validation generates none"),
        ({"pretrained_evaluation_model_name_or_path": "a/b"}, "pretrained_evaluation_model_name_or_path", "no use"),
        ({"controlnet": True}, "controlnet", "cannot be trained yet"),
        ({"scheduled_sampling_max_step_offset": 3}, "scheduled_sampling_probability", "nothing is rolled out"),
        ({"scheduled_sampling_reflexflow": True}, "scheduled_sampling_reflexflow", "nothing is rolled out"),
        ({"scheduled_sampling_order": 3}, "scheduled_sampling_order", "<= 2"),
        ({"loss_type": "l1"}, "loss_type", "smooth_l1"),
        ({"flow_use_uniform_schedule": True, "flow_sigmoid_scale": 2}, "flow_sigmoid_scale", "has no use"),
        (
            {"flow_use_uniform_schedule": True, "flow_use_beta_schedule": True},
            "flow_use_beta_schedule",
            "flow_use_uniform_schedule chooses",
        ),
        ({"flow_beta_schedule_alpha": 3}, "flow_beta_schedule_alpha", "has no use without"),
        ({"flow_mode_scale": 1}, "flow_mode_scale", "has no use without flow_use_mode_schedule"),
        (
            {"flow_schedule_auto_shift_curve": "sqrt"},
            "flow_schedule_auto_shift_curve",
            "has no use without flow_schedule_auto_shift",
        ),
        ({"flow_use_mode_schedule": True, "flow_logit_mean": 1}, "flow_logit_mean", "has no use"),
        ({"flow_custom_timesteps": "0.5", "flow_schedule_terminal": 0.1}, "flow_schedule_terminal", "as they are"),
        ({"flow_schedule_terminal": 1}, "flow_schedule_terminal", "< 1"),
        (
            {"flow_custom_timesteps": "0.5", "flow_schedule_auto_shift": True},
            "flow_schedule_auto_shift",
            "taken as they are",
        ),
        ({"flow_custom_timesteps": "0.5,2000"}, "flow_custom_timesteps", "from 0"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 500, "timestep_bias_end": 500},
            "timestep_bias_begin",
            "is not below",
        ),
        (
            {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 0, "timestep_bias_portion": 1},
            "timestep_bias_multiplier",
            "no noise level",
        ),
        ({"validation_preview": True, "validation_preview_steps": 40}, "validation_preview_steps", "1 to 25"),
    ],
)
def test_options_that_do_not_go_together(workspace: Workspace, changes: dict[str, Any], key: str, words: str) -> None:
    workspace.config |= changes
    (problem,) = workspace.fails_written().problems
    assert problem.key == key
    assert words in problem.render()
    if changes.get(key) is not None:
        assert (problem.file, problem.line) == ("config/config.json", workspace.line("config/config.json", key))


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"instance_data_dir": "datasets/gone"}, "instance_data_dir", "there is no folder of this name"),
        ({"instance_data_dir": "config/config.json"}, "instance_data_dir", "is not a folder"),
        ({"resolution": 8}, "resolution", "16 to 2048 pixels"),
        ({"resolution": 4096}, "resolution", "16 to 2048 pixels"),
        ({"resolution": 0.5}, "resolution", 'set resolution_type to "area"'),
        ({"resolution": 1024, "resolution_type": "area"}, "resolution", 'set resolution_type to "pixel_area"'),
        ({"resolution_type": "area"}, "resolution", "is missing"),
        ({"maximum_image_size": 512}, "target_downsample_size", "is missing"),
        ({"target_downsample_size": 512}, "target_downsample_size", "without maximum_image_size"),
        ({"maximum_image_size": 512, "target_downsample_size": 600}, "target_downsample_size", "at most 512"),
        (
            {"minimum_image_size": 600, "maximum_image_size": 512, "target_downsample_size": 512},
            "minimum_image_size",
            "no image would be left",
        ),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt", "caption_strategy instanceprompt needs it"),
        ({"only_instance_prompt": True}, "instance_prompt", "only_instance_prompt needs it"),
        ({"crop_aspect": "random"}, "crop_aspect_buckets", "crop_aspect random chooses from it"),
        ({"crop_aspect": "random", "crop_aspect_buckets": [1, 0]}, "crop_aspect_buckets", "not above 0"),
    ],
)
def test_dataset_keys_that_do_not_go_together(
    workspace: Workspace, changes: dict[str, Any], key: str, words: str
) -> None:
    workspace.datasets[0] |= changes
    (problem,) = workspace.fails_written().problems
    assert problem.key == f"images.{key}"
    assert problem.file == "config/multidatabackend.json"
    if key in changes:
        assert problem.line == workspace.line("config/multidatabackend.json", key)
    assert words in problem.render()


def test_prior_preservation_needs_an_adapter(workspace: Workspace) -> None:
    workspace.config |= {"model_type": "full", "lycoris_config": None}
    workspace.datasets[0]["is_regularisation_data"] = True
    (problem,) = workspace.fails_written().problems
    assert problem.key == "images.is_regularisation_data"


def test_there_is_something_to_train_on(workspace: Workspace) -> None:
    workspace.datasets[0]["disabled"] = True
    assert "(images disabled)" in workspace.fails_written().render()
    workspace.datasets = []
    assert "names no dataset of dataset_type image" in workspace.fails_written().render()


@pytest.mark.parametrize("name", ["a/b", "a b ", ".hidden", "x" * 101, "a:b"])
def test_ids_can_name_files(workspace: Workspace, name: str) -> None:
    workspace.datasets[0]["id"] = name
    assert "cannot name a file" in workspace.fails_written().render()


def test_one_text_cache_is_the_default(workspace: Workspace) -> None:
    workspace.datasets += [{"id": name, "dataset_type": "text_embeds", "default": True} for name in ("t", "u")]
    (problem,) = workspace.fails_written().problems
    assert (problem.key, problem.line) == ("u.default", 14)


def test_a_named_checkpoint_may_be_a_name_or_a_path(workspace: Workspace) -> None:
    (workspace.root / "output/run/checkpoint-7").mkdir(parents=True)
    for name in ("checkpoint-7", "output/run/checkpoint-7", "latest", "none", ""):
        assert (
            workspace.load_written(f"--resume_from_checkpoint={name}").config.checkpoint.resume_from_checkpoint == name
        )
    assert not workspace.load("--resume_from_checkpoint=none").config.checkpoint.resumes


def test_a_named_checkpoint_that_was_moved_is_named_where_it_is_now(workspace: Workspace) -> None:
    """As after a start from another run's checkpoint in the same folder, which died before it saved."""
    moved = workspace.root / "output/run/earlier-runs/2-ab/checkpoint-7"
    moved.mkdir(parents=True)
    (problem,) = workspace.fails_written("--resume_from_checkpoint=checkpoint-7").problems
    assert f'it was moved: name "{moved}", or "latest"' in (problem.fix or "")
    (problem,) = workspace.fails_written("--resume_from_checkpoint=checkpoint-*").problems
    assert problem.fix is None


def test_notices_are_said_once_and_stop_nothing(workspace: Workspace) -> None:
    workspace.config |= {"eval_steps_interval": 5, "lr_warmup_steps": 400000, "caption_dropout_probability": 0}
    del workspace.config["validation_prompt"]
    warnings = "\n".join(workspace.load_written().warnings)
    for words in (
        "no dataset of dataset_type eval",
        "400000 steps of warm-up",
        "0 never trains",
        "no validation images",
    ):
        assert warnings.count(words) == 1


def test_all_faults_show_at_once(workspace: Workspace) -> None:
    workspace.config |= {"learning_rte": 1, "seed": "x", "publishing_config": "s3", "num_train_epochs": 3}
    workspace.datasets[0] |= {"repeats": -1, "cropp": True}
    workspace.lycoris["apply_preset"]["target_module"] = ["Nothing"]
    problems = workspace.fails_written("--train_batch_size=0").problems
    assert {problem.key for problem in problems} == {
        *("learning_rte", "seed", "publishing_config", "max_train_steps", "train_batch_size"),
        *("images.repeats", "images.cropp", "apply_preset.target_module.0"),
    }
    assert all(problem.file for problem in problems)


def test_a_value_that_was_refused_is_not_judged_again(workspace: Workspace) -> None:
    workspace.config["max_train_steps"] = "many"
    assert [problem.key for problem in workspace.fails_written().problems] == ["max_train_steps"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a/b": "x"}', "cannot name a file"),
        ('{"": "x"}', "is empty"),
        ('{" a": "x"}', "spaces around"),
        ('{"a": ""}', "is not a prompt"),
        ('{"a": 3}', "is not a prompt"),
        ('{"Cat": "x", "cat": "y"}', "in capitals only"),
        ('{"cat": "x", "Cat": "y"}', "in capitals only"),
        ('{"validation": "x"}', "that of validation_prompt"),
        ("{}", "holds no prompts"),
        ('["a"]', "is not a JSON object"),
        ('{"' + "a" * 200 + '": "x"}', "200 letters"),
    ],
)
def test_nicknames_can_name_files(text: str, words: str) -> None:
    prompts, (problem,) = read_prompt_library(parse_json(text, "library.json"))
    assert prompts == {}
    assert words in problem.render()
    assert problem.line == 1


def test_a_library_with_placeholders_is_read() -> None:
    prompts, problems = read_prompt_library(parse_json('{"anime_<token>": "a portrait"}', "library.json"))
    assert (dict(prompts), problems) == ({"anime_<token>": LibraryPrompt("a portrait")}, [])


def test_a_prompt_may_say_how_it_is_drawn() -> None:
    text = """{"wide": {"prompt": "a lake", "resolution": "64x32", "seed": "7", "guidance": 0,
      "adapter_strength": 0.5, "negative_prompt": "", "num_images": null}}"""
    prompts, problems = read_prompt_library(parse_json(text, "library.json"))
    expected = LibraryPrompt(
        "a lake", negative_prompt="", resolution="64x32", guidance=0.0, seed=7, adapter_strength=0.5
    )
    assert (dict(prompts), problems) == ({"wide": expected}, [])


@pytest.mark.parametrize(
    ("fields", "key", "words"),
    [
        ('"prompt": "x", "guidence": 3', "a.guidence", 'did you mean "guidance"?'),  # codespell:ignore
        ('"prompt": "x", "num_inference_steps": 0', "a.num_inference_steps", "1 to 1000"),
        ('"prompt": "x", "resolution": "big"', "a.resolution", "is not a size"),
        ('"prompt": " "', "a.prompt", "outside of what is allowed"),
        ('"seed": 3', "a", "has no prompt"),
        ('"prompt": "x", "adapter_strength": -10.5', "a.adapter_strength", "outside of what is allowed"),
        ('"prompt": "x", "guidance_rescale": 1.1', "a.guidance_rescale", "outside of what is allowed"),
    ],
)
def test_a_fault_in_a_prompt_names_its_key_and_line(fields: str, key: str, words: str) -> None:
    prompts, (problem,) = read_prompt_library(parse_json('{"a": {\n' + fields + "}}", "library.json"))
    assert prompts == {}
    assert problem.key == key
    assert problem.line == (1 if key == "a" else 2)
    assert words in problem.render()


def test_a_prompt_that_the_family_cannot_draw_is_refused_by_its_name(workspace: Workspace) -> None:
    library = {
        "large": {"prompt": "x", "resolution": "4096"},
        "rescaled": {"prompt": "x", "guidance_rescale": 0.7},
        "fine": {"prompt": "x", "resolution": "64", "adapter_strength": 2},
    }
    workspace.put("config/library.json", library)
    workspace.config["user_prompt_library"] = "config/library.json"
    problems = workspace.fails_written().problems
    assert {(problem.key, problem.file) for problem in problems} == {
        ("large.resolution", "config/library.json"),
        ("rescaled.guidance_rescale", "config/library.json"),
    }


def test_images_that_validation_edits_are_there_and_taken(workspace: Workspace) -> None:
    workspace.config |= {"model_family": "omnigen", "validation_references": ["a.png", "gone.png"]}
    workspace.put("a.png", "")
    (problem,) = workspace.fails_written().problems
    assert problem.key == "validation_references"
    assert '"gone.png": there is no image of this name' in problem.message
    workspace.put("gone.png", "")
    found = workspace.load_written().config.validation.validation_references
    assert found == (str(workspace.root / "a.png"), str(workspace.root / "gone.png"))
    workspace.config["model_family"] = "toy"
    (problem,) = workspace.fails_written().problems
    assert "2 reference images cannot be used: Toy takes none" in problem.message


def test_images_of_a_library_are_there_and_taken(workspace: Workspace) -> None:
    workspace.config |= {"model_family": "omnigen", "user_prompt_library": "library.json"}
    workspace.put("library.json", {"edit": {"prompt": "turn it green", "references": "a.png"}})
    (problem,) = workspace.fails_written().problems
    assert (problem.key, problem.file) == ("edit.references", "library.json")
    workspace.put("a.png", "")
    assert workspace.load_written().prompt_library["edit"].references == (str(workspace.root / "a.png"),)
    workspace.config["model_family"] = "toy"
    assert workspace.fails_written().problems[0].key == "edit.references"


def test_an_optimizer_that_looks_at_whole_weights_gets_no_parts(workspace: Workspace) -> None:
    workspace.config |= {"optimizer": "muon", "model_type": "full", "fsdp_enable": True}
    assert ["looks at whole weights" in p.message for p in workspace.fails_written().problems if p.key == "optimizer"]
    workspace.config["model_type"] = "lora"
    workspace.config["fsdp_enable"] = False
    workspace.load_written()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flow_sigmoid_scale", 2),
        ("flow_logit_mean", 0.5),
        ("flow_schedule_terminal", 0.02),
        ("flow_use_beta_schedule", True),
        ("flow_use_mode_schedule", True),
    ],
)
def test_a_family_whose_levels_are_fixed_refuses_others_by_name(workspace: Workspace, key: str, value: object) -> None:
    workspace.config |= {"model_family": "omnigen", key: value}
    found = [problem for problem in workspace.fails_written().problems if problem.key == key]
    assert "OmniGen is trained on logit-normal times" in found[0].message


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        ("omnigen", "flow_schedule_shift", 3.0, "OmniGen is trained on logit-normal times"),
        ("omnigen", "flow_schedule_auto_shift", True, "OmniGen is trained on logit-normal times"),
        ("sdxl", "flow_schedule_shift", 3.0, "Stable Diffusion XL is not a flow model"),
        ("sdxl", "flow_use_beta_schedule", True, "Stable Diffusion XL is not a flow model"),
        ("sdxl", "flow_beta_schedule_alpha", 4.0, "Stable Diffusion XL is not a flow model"),
        ("sdxl", "flow_custom_timesteps", "0.5,1", "Stable Diffusion XL is not a flow model"),
        ("sdxl", "flow_schedule_terminal", 0.02, "Stable Diffusion XL is not a flow model"),
        ("sdxl", "flow_loss_weighting", "cosmap", "Stable Diffusion XL is not a flow model"),
    ],
)
def test_noise_levels_that_a_family_has_no_use_for_are_ignored_with_a_warning(
    workspace: Workspace, family: str, key: str, value: object, words: str
) -> None:
    workspace.config |= {"model_family": family, key: value, "lora_type": "standard", "lycoris_config": None}
    run = workspace.load_written()
    (warning,) = [line for line in run.warnings if key in line]
    assert words in warning
    assert "config.json:" in warning
    assert run.config.value(key) == all_options()[key].default


def test_reflexflow_is_for_the_families_that_it_is_made_for(workspace: Workspace) -> None:
    workspace.config |= {"model_family": "sdxl", "lycoris_config": None}
    workspace.config |= {"lora_type": "standard", "scheduled_sampling_max_step_offset": 2}
    workspace.config |= {"scheduled_sampling_probability": 0.5}
    assert workspace.load_written().config.objective.scheduled_sampling_reflexflow is None
    workspace.config["scheduled_sampling_reflexflow"] = True
    (problem,) = workspace.fails_written().problems
    assert "made for flow models" in problem.message


def test_levels_are_read_in_thousandths_where_any_is_above_one(workspace: Workspace) -> None:
    for written, expected in (("0.9, 0.1", (0.1, 0.9)), ([500, 1], (0.001, 0.5)), ("750", (0.75,))):
        workspace.config["flow_custom_timesteps"] = written
        assert workspace.load_written().config.objective.flow_custom_timesteps == expected


def test_settings_without_their_switch_are_reported(workspace: Workspace) -> None:
    workspace.config |= {"noise_offset": 0.2, "huber_c": 0.3, "timestep_bias_portion": 0.5}
    warnings = "".join(workspace.load_written().warnings)
    for words in (
        "noise_offset: has no effect: offset_noise is false",
        "huber_c: has no",
        "timestep_bias_portion: has no",
    ):
        assert words in warnings


def test_skipped_layers_without_guidance_are_a_warning(workspace: Workspace) -> None:
    workspace.config |= {"model_family": "sd3", "validation_guidance_skip_layers": "7,8,9", "validation_guidance": 1}
    warnings = "".join(workspace.load_written().warnings)
    assert "validation_guidance_skip_layers has no effect: validation_guidance is not above 1" in warnings


def test_processes_that_share_weights_recompute_alike(workspace: Workspace) -> None:
    workspace.config |= {"fsdp_enable": True, "num_processes": 2, "gradient_checkpointing_interval": "auto"}
    keys = [problem.key for problem in workspace.fails_written().problems]
    assert keys == ["gradient_checkpointing_interval"]


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"validation_num_inference_steps": 4}, "validation_guidance_skip_layers_stop", "no sampling step of 4"),
        ({"validation_guidance_skip_layers": "-1"}, "validation_guidance_skip_layers", "counted from 0"),
    ],
)
def test_skipped_layers_are_refused_where_they_would_do_nothing(workspace: Workspace, changes, key, words) -> None:
    workspace.config |= {"model_family": "sd3", "validation_guidance_skip_layers": "[9, 7, 8]"}
    assert workspace.load_written().config.validation.validation_guidance_skip_layers == (7, 8, 9)
    workspace.config |= changes
    error = workspace.fails_written()
    assert key in [problem.key for problem in error.problems]
    assert words in error.render()


@pytest.mark.parametrize("key", ["tracker_run_name", "tracker_project_name", "output_dir"])
def test_names_of_a_run_stand_on_one_line(workspace: Workspace, key: str) -> None:
    for name in ("a\x1b[31mb", "a\u2028b", "a\u202eb", "a\x00b", *(["a\nb"] if key == "output_dir" else [])):
        workspace.config[key] = name
        (problem,) = workspace.fails_written().problems
        assert problem.key == key
        assert problem.message.isprintable()
    if key != "output_dir":
        workspace.config[key] = " first line\r\n\tsecond\n"
        assert workspace.load_written().config.value(key) == "first line second"


@pytest.mark.parametrize("name", ["..", ".", "a/../../b", "..\\b", "a\nb", "a\u2028b", "a\x7fb", "C:b", "/etc"])
def test_ids_and_nicknames_stay_in_their_folder_and_on_their_line(workspace: Workspace, name: str) -> None:
    workspace.datasets[0]["id"] = name
    problems = workspace.fails_written().problems
    assert [problem.message for problem in problems if "cannot name a file" in problem.message]
    prompts, faults = read_prompt_library(parse_json(json.dumps({name: "a prompt"}), "library.json"))
    assert prompts == {}
    assert "cannot name a file" in faults[0].message


@pytest.mark.parametrize(("batch_size", "processes", "warns"), [(1, 1, True), (2, 1, False), (1, None, False)])
def test_strata_of_a_single_image_have_no_effect(workspace: Workspace, batch_size, processes, warns) -> None:
    workspace.config |= {"timestep_stratified": True, "num_processes": processes, "train_batch_size": batch_size}
    lines = [line for line in workspace.load_written().warnings if "timestep_stratified" in line]
    assert any("a step has one image" in line for line in lines) is warns
