"""What is just allowed is taken, and what just is not is refused: by rules of images, of uploads, of DeepSpeed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.json_reader import parse_json
from simpletuner.config.prompt_library import read_prompt_library

from .conftest import Workspace


def refused(workspace: Workspace, library: dict[str, Any], **changes: Any) -> list[str]:
    workspace.put("config/library.json", library)
    workspace.config |= {"user_prompt_library": "config/library.json", **changes}
    return [problem.key or "" for problem in workspace.fails_written().problems]


def test_no_side_of_an_image_of_a_library_is_longer_than_the_family_takes(workspace: Workspace) -> None:
    library = {name: {"prompt": "x", "resolution": size} for name, size in (("tall", "512x4096"), ("wide", "4096x512"))}
    assert refused(workspace, {**library, "largest": {"prompt": "x", "resolution": "2048x512"}}) == [
        *("tall.resolution", "wide.resolution")
    ]


def test_without_an_adapter_its_strength_is_one(workspace: Workspace) -> None:
    library = {name: {"prompt": "x", "adapter_strength": number} for name, number in (("whole", 1), ("half", 0.5))}
    changes = {"model_type": "full", "lycoris_config": None}
    assert refused(workspace, library, **changes) == ["half.adapter_strength"]


@pytest.mark.parametrize(("steps", "is_taken"), [(5, False), (6, True)])
def test_layers_are_skipped_at_a_step_that_lies_between_the_limits(
    workspace: Workspace, steps: int, is_taken: bool
) -> None:
    """They are skipped before 0.2 of the steps: of 5 the second is at 0.2, and of 6 before it."""
    workspace.config |= {"model_family": "sd3", "validation_guidance_skip_layers": "7,8,9"}
    workspace.config["validation_num_inference_steps"] = steps
    if is_taken:
        assert workspace.load_written().config.validation.validation_num_inference_steps == steps
    else:
        assert "no sampling step of 5 lies between" in workspace.fails_written().render()


@pytest.mark.parametrize("is_off", [False, True])
def test_an_eval_loss_that_is_turned_off_is_not_missed(workspace: Workspace, is_off: bool) -> None:
    workspace.config |= {"eval_holdout": 0.1, "eval_loss_disable": is_off}
    lines = [line for line in workspace.load_written().warnings if "no eval loss is computed" in line]
    assert len(lines) == (0 if is_off else 1)


@pytest.mark.parametrize("name", ["me/a..b", "a--b", "me/" + "x" * 94])
def test_a_name_that_the_hub_refuses_is_refused_before_the_run(workspace: Workspace, name: str) -> None:
    workspace.config |= {"push_to_hub": True, "hub_model_id": name}
    [problem] = workspace.fails_written().problems
    assert (problem.key, problem.message) == ("hub_model_id", f'"{name}" cannot name a repository on the Hub')


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_a_text_encoder_that_is_not_there_cannot_be_packed(workspace: Workspace, number: int) -> None:
    """The family has none, and options for four."""
    workspace.config[f"text_encoder_{number}_precision"] = "int8-quanto"
    [problem] = workspace.fails_written().problems
    assert (problem.key, problem.message) == (f"text_encoder_{number}_precision", "Toy has no text encoder")


ZERO = {"deepspeed_config": "zero.json", "num_processes": 2, "mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"grad_clip_method": "value", "max_grad_norm": 0, "optimizer": "adamw_bf16"}, []),
        ({"grad_clip_method": "value", "max_grad_norm": 0.01, "optimizer": "adamw_bf16"}, ["grad_clip_method"]),
        ({"grad_clip_method": "norm", "optimizer": "adamw_schedulefree", "lr_scheduler": "constant"}, ["optimizer"]),
    ],
)
def test_deepspeed_takes_what_it_can_train(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], keys: list[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # it is there
    workspace.put("zero.json", {"zero_optimization": {"stage": 2}})
    workspace.config |= ZERO | changes
    found = [problem.key for problem in workspace.fails_written().problems] if keys else []
    assert found == keys
    if not keys:
        assert workspace.load_written().config.optimizer.grad_clip_method == "value"


@pytest.mark.parametrize(
    ("nickname", "is_taken"),
    [("x" * 100, True), ("x" * 101, False), ("Validation", False), ("UNCONDITIONAL", False), ("validations", True)],
)
def test_a_nickname_names_a_file_that_no_other_image_has(nickname: str, is_taken: bool) -> None:
    """On some disks names that differ in capitals only are one."""
    prompts, problems = read_prompt_library(parse_json(json.dumps({nickname: "a prompt"}), "library.json"))
    assert (list(prompts) == [nickname], not problems) == (is_taken, is_taken)


@pytest.mark.parametrize(
    ("changes", "entry", "key", "message"),
    [
        (
            {"eval_holdout": 0.1, "eval_steps_interval": 10},
            {"dataset_type": "eval"},
            "eval_holdout",
            'there is an eval dataset already ("e")',
        ),
        (
            {"eval_steps_interval": 10},
            {"dataset_type": "eval", "is_regularisation_data": True},
            "e.is_regularisation_data",
            "an eval dataset is never trained on",
        ),
        (
            {"model_family": "sana", "validation_preview": True},
            {},
            "validation_preview",
            "there is no tiny autoencoder for Sana",
        ),
        (
            {"validation_prompt": None, "evaluation_type": "clip"},
            {},
            "evaluation_type",
            "clip scores validation images, and validation generates none",
        ),
    ],
)
def test_what_has_nothing_to_work_on_is_refused(
    workspace: Workspace, changes: dict[str, Any], entry: dict[str, Any], key: str, message: str
) -> None:
    workspace.config |= changes
    if entry:
        workspace.datasets.append({"id": "e", "instance_data_dir": "datasets/images", **entry})
    assert (key, message) in [(problem.key, problem.message) for problem in workspace.fails_written().problems]
