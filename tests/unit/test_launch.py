"""Which configuration, family and model a command works on."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.errors import ConfigError
from simpletuner.examples import example_dir
from simpletuner.launch import chosen_environment, generation_options, load_arguments, spec_of_model, split_arguments
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
    assert len(said) == 1
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
    with pytest.raises(ConfigError, match="--model-family"):
        spec_of_model(ModelSource(str(tmp_path)))


def test_generation_without_a_configuration_takes_the_family_s_defaults(tmp_path: Path):
    options = generation_options(OMNIGEN)
    assert (options.validation_resolution, options.validation_guidance) == ("1024x1024", 2.5)
    assert options.validation_noise_scheduler is None
