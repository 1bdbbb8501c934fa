"""The options of `config.json`: one declaration each, grouped by what they concern."""

from __future__ import annotations

from simpletuner.config.options.catalog import (
    GROUPS,
    TrainConfig,
    all_options,
    group_of_options,
    planned_options,
    split_by_group,
)
from simpletuner.config.options.declare import OptionInfo

__all__ = [
    "GROUPS",
    "OptionInfo",
    "TrainConfig",
    "all_options",
    "group_of_options",
    "planned_options",
    "split_by_group",
]
