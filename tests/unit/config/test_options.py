"""Every option is declared completely, and values are read as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from simpletuner.config.checking import is_neutral
from simpletuner.config.datasets import DATASET_CLASSES, dataset_options
from simpletuner.config.foreign_keys import RENAMED, RETIRED, UNBUILT
from simpletuner.config.names import ENV_FILE_NAMES
from simpletuner.config.options import GROUPS, OptionInfo, TrainConfig, all_options, planned_options
from simpletuner.config.values import Size, parse_sizes

EVERY = [*all_options().values(), *(info for kind in DATASET_CLASSES for info in dataset_options(kind).values())]


def config(**values: Any) -> TrainConfig:
    return TrainConfig.from_values({"model_family": "omnigen", **values})


def test_every_option_belongs_to_one_group() -> None:
    names = [name for group in GROUPS.values() for name in group.model_fields]
    assert sorted(names) == sorted(set(names)) == sorted(all_options())


@pytest.mark.parametrize("info", EVERY, ids=lambda info: f"{info.group}.{info.name}")
def test_a_declaration_is_complete(info: OptionInfo) -> None:
    assert info.help.endswith(".")
    assert info.help[0] == "`" or info.help[0].isupper()
    assert info.allowed
    assert info.type_name in (
        "true or false",
        "whole number",
        "number",
        "text",
        "choice",
        "list",
        "path",
        "object",
        "object, list or path",
    ) or (info.name == "instance_prompt")
    assert not (info.planned and info.planned_values)
    if info.type_name == "choice" and not info.planned:
        assert info.default is None or info.is_required or info.default in info.choices


def test_defaults_are_accepted_by_their_own_checks() -> None:
    defaults = {name: info.default for name, info in all_options().items() if not info.is_required}
    made = TrainConfig.from_values({"model_family": "omnigen", **defaults})
    assert made == config()


def test_old_names_lead_to_options_and_hide_none() -> None:
    assert set(RENAMED.values()) <= set(all_options())
    assert set(ENV_FILE_NAMES.values()) <= set(all_options())
    tables = [set(all_options()), set(RENAMED), set(RETIRED), set(UNBUILT)]
    assert len(set().union(*tables)) == sum(len(table) for table in tables)  # no name stands in two of them


def test_what_is_not_built_is_known() -> None:
    assert {"controlnet", "train_text_encoder"} <= set(planned_options())


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("learning_rate", "4e-5", 4e-5),
        ("max_train_steps", "20", 20),
        ("max_train_steps", 1e3, 1000),
        ("max_train_steps", "1e3", 1000),
        ("num_train_epochs", "0.5", 0.5),
        ("use_ema", "true", True),
        ("use_ema", "False", False),
        ("gradient_checkpointing", "false", False),
        ("gradient_checkpointing", 0, False),
        ("gradient_checkpointing", "1", True),
        ("validation_resolution", 512, "512"),
        ("report_to", "tensorboard", ("tensorboard",)),
        ("report_to", "tensorboard, none", ("tensorboard", "none")),
        ("optimizer_config", "weight_decay=0.1,fused=true", {"weight_decay": 0.1, "fused": True}),
        ("optimizer_config", {"eps": 1}, {"eps": 1}),
    ],
)
def test_values_are_read_as_people_write_them(key: str, written: Any, value: Any) -> None:
    read = config(**{key: written}).value(key)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("key", "written"),
    [
        ("max_train_steps", True),
        ("max_train_steps", 1.5),
        ("max_train_steps", -1),
        ("learning_rate", "nan"),
        ("learning_rate", "inf"),
        ("learning_rate", 0),
        ("learning_rate", True),
        ("learning_rate", "1e-4x"),
        ("use_ema", "maybe"),
        ("use_ema", 2),
        ("model_type", "lorra"),
        ("validation_prompt", ["a"]),
        ("validation_prompt", True),
        ("validation_resolution", "1024*1024"),
        ("validation_resolution", "4"),
        ("validation_resolution", ""),
        ("caption_dropout_probability", 1.1),
        ("optimizer_config", "weight_decay"),
        ("output_dir", 5),
        ("adam_beta1", 1.0),
        ("aspect_bucket_rounding", 10),
    ],
)
def test_values_that_mean_nothing_are_refused(key: str, written: Any) -> None:
    with pytest.raises(ValidationError):
        config(**{key: written})


def test_sizes_are_written_width_first_and_read_height_first() -> None:
    assert parse_sizes("1024, 1280x768") == [Size(1024, 1024), Size(height=768, width=1280)]
    assert str(Size(height=768, width=1280)) == "1280x768"


def test_truth_values_are_not_numbers_when_neutral_values_are_compared() -> None:
    assert is_neutral(0.0, (0,))
    assert not is_neutral(False, (0,))
    assert not is_neutral(1, (True,))
