"""Files of other trainers: every option name of SimpleTuner's documentation is read, ignored with a warning or refused
with a reason, and what would change the result is never ignored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.foreign_keys import UNBUILT, is_off
from simpletuner.config.merging import option_names

from .conftest import Workspace

# Names of options, as its option reference of 2026 lists them, one a line.
DOCUMENTED = (Path(__file__).parents[2] / "fixtures" / "simpletuner_options.txt").read_text().split()


def test_every_documented_name_is_known() -> None:
    assert len(DOCUMENTED) > 300
    assert sorted(set(DOCUMENTED) - set(option_names())) == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tread_config", {"routes": [{"start_layer_idx": 2}]}, "TREAD"),
        ("use_soft_min_snr", True, "use snr_gamma"),
        ("flux_lora_target", "context", "lora_target"),
        ("flux_guidance_mode", "random-range", "only constant"),
        ("rescale_betas_zero_snr", "true", "scheduler_config.json"),
        ("parquet_caption_column", "text", '"parquet": {"caption_column"'),
        ("only_instance_prompt", "1", "key of a dataset"),
        ("post_checkpoint_script", "/opt/notify", "not built"),
    ],
)
def test_what_would_change_the_result_is_refused_with_its_reason(
    workspace: Workspace, key: str, value: Any, words: str
) -> None:
    workspace.config[key] = value
    (problem,) = workspace.fails_written().problems
    assert problem.key == key
    assert words in str(problem)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tread_config", None),
        ("control", False),
        ("refiner_training", "false"),
        ("distillation_method", "none"),
        ("flux_lora_target", "all"),
        ("flux_guidance_value", 1.0),
        ("t5_padding", "unmodified"),
        ("init_lokr_norm", 0),
        ("snr_weight", "1.0"),
    ],
)
def test_a_key_that_is_off_is_accepted_without_a_word(workspace: Workspace, key: str, value: Any) -> None:
    workspace.config[key] = value
    assert workspace.load_written().warnings == ()


def test_steps_of_prodigy_matter_to_prodigy_alone(workspace: Workspace) -> None:
    workspace.config |= {"prodigy_steps": 1000, "optimizer": "adamw"}
    (warning,) = workspace.load_written().warnings
    assert "prodigy_steps has no effect: optimizer is not prodigy" in warning
    workspace.config |= {"optimizer": "prodigy", "learning_rate": 1.0}
    assert "prodigy_steps" in {problem.key for problem in workspace.fails_written().problems}


def test_an_instruction_for_sana_is_refused_by_sana_alone(workspace: Workspace) -> None:
    workspace.config["sana_complex_human_instruction"] = "Describe the image."
    (warning,) = workspace.load_written().warnings
    assert "sana_complex_human_instruction has no effect: model_family is not sana" in warning
    workspace.config["model_family"] = "sana"
    (problem,) = [p for p in workspace.fails_written().problems if p.key == "sana_complex_human_instruction"]
    assert "is put before every caption" in problem.message


@pytest.mark.parametrize("key", ["skip_file_discovery", "fuse_qkv_projections", "delete_problematic_images"])
def test_what_is_done_otherwise_here_is_a_warning(workspace: Workspace, key: str) -> None:
    workspace.config[key] = "vae" if key == "skip_file_discovery" else True
    (warning,) = workspace.load_written().warnings
    assert f"{key} has no effect" in warning


def test_images_that_a_dataset_would_delete_are_kept_with_a_warning(workspace: Workspace) -> None:
    workspace.datasets[0]["delete_problematic_images"] = True
    (warning,) = workspace.load_written().warnings
    assert "images.delete_problematic_images has no effect: images of yours are never deleted" in warning


def test_each_refused_key_has_a_reason_that_a_user_can_act_on() -> None:
    for name, key in UNBUILT.items():
        assert len(key.reason.split()) >= 3, name
        assert not any(is_off(value) for value in key.neutral), name


def test_names_and_values_of_before_are_read_under_those_of_today_with_a_warning(workspace: Workspace) -> None:
    for written, expected in ((True, False), ("false", True)):
        workspace.config |= {"vae_cache_preprocess": written}
        run = workspace.load_written()
        line = workspace.line("config/config.json", "vae_cache_preprocess")
        assert run.warnings == (f"config/config.json:{line}: vae_cache_preprocess is now called vae_cache_ondemand",)
        assert run.config.value("vae_cache_ondemand") is expected
    workspace.config["vae_cache_preprocess"] = "maybe"
    [problem] = workspace.fails_written().problems
    assert (problem.key, problem.message) == ("vae_cache_preprocess", '"maybe" must be true or false')
    del workspace.config["vae_cache_preprocess"]
    workspace.config |= {"lr_scheduler": "cosine_with_warmup", "checkpointing_steps": 7}
    run = workspace.load_written()
    line = workspace.line("config/config.json", "lr_scheduler")
    alias = f'config/config.json:{line}: lr_scheduler: "cosine_with_warmup" is now called "cosine"'
    assert alias in run.warnings
    assert (run.config.value("lr_scheduler"), run.config.value("checkpoint_step_interval")) == ("cosine", 7)
    workspace.config["checkpoint_step_interval"] = 8
    [problem] = workspace.fails_written().problems
    assert problem.key == "checkpoint_step_interval"
    assert problem.message == 'is given twice, as "checkpointing_steps" and as "checkpoint_step_interval"'
    assert problem.fix == 'keep "checkpoint_step_interval"'
    assert problem.line == workspace.line("config/config.json", "checkpoint_step_interval")


def test_a_file_that_is_not_there_is_a_warning_where_no_file_is_looked_for(workspace: Workspace) -> None:
    workspace.config["user_prompt_library"] = "gone.json"
    run = workspace.load_written(check_files=False)
    line = workspace.line("config/config.json", "user_prompt_library")
    assert f"config/config.json:{line}: user_prompt_library: gone.json is not there" in run.warnings
    [problem] = workspace.fails_written().problems
    places = f"{workspace.root / 'gone.json'} or {workspace.root / 'config/gone.json'}"
    assert (problem.key, problem.message) == ("user_prompt_library", '"gone.json": there is no file of this name')
    assert problem.allowed == f"file at {places}"
