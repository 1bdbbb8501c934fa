"""Every recipe in config/examples loads without a warning and reads its own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.launch import load_arguments

RECIPES = Path(__file__).parents[3] / "config" / "examples"
NAMES = sorted(path.parent.name for path in RECIPES.glob("*/config.json"))


def test_there_are_recipes():
    assert {"omnigen-lokr-24gb", "omnigen-lokr-subject"} <= set(NAMES)
    assert {path.name for path in RECIPES.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_accepted_as_it_stands(name: str):
    loaded = load_arguments([f"env=examples/{name}"], {}, RECIPES.parents[1], print, check_files=False)
    assert loaded.warnings == ()
    assert name.replace("-", "_").startswith(f"{loaded.config.model.model_family}_")
    own = [loaded.config_file, loaded.data_file, loaded.config.validation.user_prompt_library]
    own += (
        [loaded.lycoris_file]
        if loaded.config.model.model_type == "lora" and loaded.config.adapter.lora_type == "lycoris"
        else []
    )
    assert all(path is not None and path.parent == RECIPES / name for path in own)
    assert any(entry.dataset_type == "eval" for entry in loaded.datasets)


def test_recipes_write_into_folders_of_their_own():
    loaded = [
        load_arguments([f"env=examples/{name}"], {}, RECIPES.parents[1], print, check_files=False) for name in NAMES
    ]
    assert len({each.config.checkpoint.output_dir for each in loaded}) == len(NAMES)
