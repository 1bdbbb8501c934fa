"""Which configuration, family and model a command works on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from simpletuner import launch
from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError
from simpletuner.examples import example_dir
from simpletuner.launch import (
    chosen_environment,
    generation_options,
    load_arguments,
    require_number_format,
    spec_of_model,
    spec_of_name,
    split_arguments,
)
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.spec import OMNIGEN


def test_example_and_env_are_taken_out_of_the_options():
    assert split_arguments(["example=a", "--seed=1"]) == ({"example": "a"}, ["--seed=1"])
    assert split_arguments(["--use_ema", "env=b"]) == ({"env": "b"}, ["--use_ema"])


def test_a_value_that_holds_an_equals_sign_stays_a_value():
    assert split_arguments(["--validation_prompt", "1 + 1 = 2"]) == ({}, ["--validation_prompt", "1 + 1 = 2"])


def test_two_choices_of_a_configuration_are_refused():
    with pytest.raises(ConfigError, match="both choose"):
        split_arguments(["example=a", "env=b"])


def test_the_command_line_s_choice_replaces_the_environment_s():
    environment = {"ENV": "other", "CONFIG_PATH": "x.json", "CONFIG_BACKEND": "toml", "HOME": "/home"}
    assert chosen_environment({"env": "mine"}, environment) == {"ENV": "mine", "HOME": "/home"}
    assert chosen_environment({}, environment) == environment
    example = str(example_dir("omnigen-tiny") / "config.json")
    assert chosen_environment({"example": "omnigen-tiny"}, environment) == {"CONFIG_PATH": example, "HOME": "/home"}


def test_the_example_is_the_last_resort_only(tmp_path: Path):
    said: list[str] = []
    loaded = load_arguments([], {}, tmp_path, said.append, check_files=False)
    assert loaded.config_file == example_dir("omnigen-tiny") / "config.json"
    assert said == [f"no configuration in {tmp_path}: using the shipped example omnigen-tiny"]
    load_arguments(["example=omnigen-tiny"], {}, tmp_path, said.append, check_files=False)
    assert len(said) == 1


def test_the_example_is_not_trained_where_other_configurations_wait_to_be_chosen(tmp_path: Path):
    for name in ("luna", "sol"):
        (tmp_path / "config" / name).mkdir(parents=True)
        (tmp_path / "config" / name / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no configuration was chosen") as caught:
        load_arguments([], {}, tmp_path, print, check_files=False)
    assert caught.value.problems[0].allowed == "env=luna, env=sol, example=omnigen-tiny"
    (tmp_path / "config").rename(tmp_path / "elsewhere")
    recipes = tmp_path / "config" / "examples" / "some-recipe"  # as a clone has them
    recipes.mkdir(parents=True)
    (recipes / "config.json").write_text("{}")
    assert load_arguments([], {}, tmp_path, print, check_files=False).config.model.model_family == "omnigen"


def test_the_family_of_a_model_folder_is_reported_by_its_pipeline(tmp_path: Path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "OmniGenPipeline"}')
    assert spec_of_model(ModelSource(str(tmp_path))) is OMNIGEN
    (tmp_path / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    with pytest.raises(ConfigError) as caught:
        spec_of_model(ModelSource(str(tmp_path)))
    [problem] = caught.value.problems
    assert problem.message == f"cannot tell the family of {tmp_path} from its model_index.json"
    assert (problem.key, problem.fix) == ("--model-family", "add --model-family")
    assert {"omnigen", "flux", "sdxl"} <= set(problem.allowed.split(", "))
    assert spec_of_name("Shitao/OmniGen-v1-diffusers") is OMNIGEN


def test_a_file_chosen_by_an_option_replaces_the_environment_s(tmp_path: Path):
    environment = {"CONFIG_PATH": "x", "ENV": "a", "SIMPLETUNER_ENV": "b", "SIMPLETUNER_ENVIRONMENT": "c"}
    environment |= {"SIMPLETUNER_CONFIG_BACKEND": "toml", "CONFIG_BACKEND": "env", "CONFIG_TYPE": "json", "HOME": "/h"}
    assert chosen_environment({"config": "my.json"}, environment) == {"CONFIG_PATH": "my.json", "HOME": "/h"}
    config = example_dir("omnigen-tiny") / "config.json"
    loaded = load_arguments(["--seed=9"], environment, tmp_path, print, config, check_files=False)
    assert (loaded.config_file, loaded.config.training.seed) == (config, 9)


@pytest.mark.parametrize("word", ["seed=1", "=1"])
def test_an_option_without_its_dashes_is_refused_with_them(word: str):
    with pytest.raises(ConfigError) as caught:
        split_arguments(["--use_ema=true", word])
    [problem] = caught.value.problems
    assert problem.message == f'"{word}" is not understood'
    assert (problem.allowed, problem.fix) == (
        "example=NAME, env=NAME, --key=value",
        f"to set an option, write --{word}",
    )


def test_a_number_format_is_one_of_the_option_s():
    require_number_format("int8-quanto")
    with pytest.raises(ConfigError) as caught:
        require_number_format("int9")
    [problem] = caught.value.problems
    assert (problem.message, problem.key) == ('"int9" is not a number format', "--base-precision")
    assert {"no_change", "int8-quanto"} <= set(problem.allowed.split(", "))


def test_the_model_of_an_adapter_is_that_of_the_run_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the run took from elsewhere comes along; of another model only what does not belong to a checkpoint."""
    asked: list[tuple[tuple[str | None, ...], dict[str, object]]] = []
    monkeypatch.setattr(launch, "family_of_model", lambda *given, **options: asked.append((given, options)))
    folder = tmp_path / "output" / "checkpoint-4"
    folder.mkdir(parents=True)
    adapter = folder / "adapter.safetensors"
    with pytest.raises(ConfigError) as caught:
        launch.family_of_export(adapter, None, "sdxl")
    [problem] = caught.value.problems
    assert problem.message == f"no run.lock.json near {adapter} says which model it belongs to"
    assert (problem.key, problem.fix) == ("--model", "add --model")
    config = {"model_family": "flux", "revision": "v2", "variant": "fp16", "tokenizer_max_length": 77, "seed": 1}
    config |= {"pretrained_vae_model_name_or_path": "vae", "text_encoder_paths": {"a": "b"}}
    (tmp_path / "output" / "run.lock.json").write_text(
        json.dumps({"config": config, "base": {"model": "base", "file": "one.safetensors"}})
    )
    launch.family_of_export(adapter, None, None)
    launch.family_of_export(adapter, "other", "sdxl")
    kept = {"pretrained_vae_model_name_or_path": "vae", "text_encoder_paths": {"a": "b"}, "tokenizer_max_length": 77}
    kept |= {"pretrained_transformer_model_name_or_path": "one.safetensors"}
    assert asked == [
        (("base", "flux"), {**kept, "revision": "v2", "variant": "fp16"}),
        (("other", "sdxl"), kept),
    ]


def test_a_model_by_name_computes_in_bfloat16_on_an_accelerator_and_whole_elsewhere(
    omnigen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ConfigError) as caught:
        launch.family_of_model("./nowhere", None)
    [problem] = caught.value.problems
    assert (problem.message, problem.key) == ("there is no model folder at ./nowhere", "--model")
    assert problem.allowed == "a folder, or a hub id"
    configs: list[TrainConfig] = []
    monkeypatch.setattr("simpletuner.models.build.build_family", configs.append)
    for device, precision in (("cpu", None), ("cuda", "int8-quanto")):
        monkeypatch.setattr("simpletuner.models.devices.pick_device", lambda device=device: torch.device(device))
        launch.family_of_model(str(omnigen_folder), "omnigen", precision, revision="v2")
    found = [(each.precision.mixed_precision, each.precision.base_model_precision) for each in configs]
    assert found == [("no", "no_change"), ("bf16", "int8-quanto")]
    assert {(each.model.model_family, each.model.revision) for each in configs} == {("omnigen", "v2")}
    (tmp_path / "model_index.json").write_text('{"_class_name": "OmniGenPipeline"}')
    with pytest.raises(ConfigError):  # of a folder without weights
        launch.family_of_model(str(tmp_path), None)


def test_generation_without_a_configuration_takes_the_family_s_defaults(tmp_path: Path):
    options = generation_options(OMNIGEN)
    assert (options.validation_resolution, options.validation_guidance) == ("1024x1024", 2.5)
    assert options.validation_noise_scheduler is None


def test_the_run_of_an_average_in_a_checkpoint_is_found_and_no_further_folder_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "family_of_model", lambda model, family, **options: (model, family, options))
    adapter = tmp_path / "output" / "checkpoint-4" / "ema" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    config = {"model_family": "flux", "clip_skip": 2}
    lock = json.dumps({"config": config, "base": {"model": "base"}})
    (tmp_path / "run.lock.json").write_text(lock)
    with pytest.raises(ConfigError, match=r"no run\.lock\.json near"):
        launch.family_of_export(adapter, None, None)
    (tmp_path / "output" / "run.lock.json").write_text(lock)
    model, family, options = launch.family_of_export(adapter, None, None)
    assert (model, family, options["clip_skip"]) == ("base", "flux", 2)


def test_a_number_format_of_the_command_line_wins_over_that_of_the_run(monkeypatch: pytest.MonkeyPatch):
    import simpletuner.models.build
    import simpletuner.training.preflight

    monkeypatch.setattr(simpletuner.training.preflight, "check_model_folder", lambda loaded: None)
    monkeypatch.setattr(simpletuner.models.build, "build_family", lambda config: config.precision.base_model_precision)
    arguments = ["example=omnigen-tiny", "--base_model_precision=int8-quanto"]
    loaded = load_arguments(arguments, {}, Path(), print, check_files=False)
    assert launch.family_of_run(loaded) == "int8-quanto"
    assert launch.family_of_run(loaded, "nf4-bnb") == "nf4-bnb"
