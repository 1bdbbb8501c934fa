"""Shipped examples: their configurations are accepted, and copies are independent of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.errors import ConfigError
from simpletuner.examples import DEFAULT_EXAMPLE, copy_example, example_dir, example_names, example_summary
from simpletuner.launch import load_arguments


def test_the_default_example_is_shipped():
    assert DEFAULT_EXAMPLE in example_names()


def test_an_unknown_example_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="omnigen-tiny"):
        example_dir("omingen-tiny")


@pytest.mark.parametrize("name", example_names())
def test_every_example_has_a_configuration_that_is_accepted(name: str, tmp_path: Path):
    loaded = load_arguments([f"example={name}"], {}, tmp_path, print, check_files=False)
    assert loaded.warnings == ()
    assert loaded.datasets
    assert loaded.config.model.model_family in example_summary(name)


def test_output_of_an_example_goes_to_the_working_folder_and_not_into_the_package(tmp_path: Path):
    loaded = load_arguments([f"example={DEFAULT_EXAMPLE}"], {}, tmp_path, print, check_files=False)
    assert loaded.config.checkpoint.output_dir.is_relative_to(tmp_path)
    assert loaded.config.data.cache_dir.is_relative_to(tmp_path)


def test_a_copy_is_a_run_of_its_own(tmp_path: Path):
    folder = copy_example(DEFAULT_EXAMPLE, tmp_path / "mine")
    shipped = {path.name for path in example_dir(DEFAULT_EXAMPLE).glob("*.json")}
    assert {path.name for path in folder.glob("*.json")} == {*shipped, "config.schema.json"}
    environment = {"CONFIG_PATH": str(folder / "config.json")}
    assert load_arguments([], environment, tmp_path, print, check_files=False).config_file == folder / "config.json"


def test_nothing_is_copied_over_what_is_there(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something"):
        copy_example(DEFAULT_EXAMPLE, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
