"""The whole configuration as one class, and the list of what is declared."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_type_hints

from simpletuner.config.options.adapter import AdapterOptions
from simpletuner.config.options.checkpoint import CheckpointOptions
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.declare import OptionGroup, OptionInfo, describe_field
from simpletuner.config.options.evaluation import EvaluationOptions
from simpletuner.config.options.model import ModelOptions
from simpletuner.config.options.objective import ObjectiveOptions
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.config.options.precision import PrecisionOptions
from simpletuner.config.options.processes import ProcessOptions
from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.config.options.training import TrainingOptions
from simpletuner.config.options.validation import ValidationOptions

V = TypeVar("V")


@dataclass(frozen=True)
class TrainConfig:
    """Every option of a run, with its final value, in groups. `config.loading.load_run` makes one and checks it.

    Files, the command line and what a run records of itself know no groups: there an option is a name and a value,
    which `from_values`, `values`, `as_json` and `with_values` read and write.
    """

    model: ModelOptions
    data: DataOptions
    training: TrainingOptions
    objective: ObjectiveOptions
    adapter: AdapterOptions
    optimizer: OptimizerOptions
    precision: PrecisionOptions
    processes: ProcessOptions
    validation: ValidationOptions
    evaluation: EvaluationOptions
    checkpoint: CheckpointOptions
    reporting: ReportingOptions

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration with these options, and defaults for all others.

        Raises:
            pydantic.ValidationError: a value is at fault; `config.checking` words that for users.
        """
        by_group = split_by_group(values)
        groups: dict[str, Any] = {name: group.model_validate(by_group[name]) for name, group in GROUPS.items()}
        return cls(**groups)

    def value(self, name: str) -> Any:
        """The value of an option that is known by its name alone."""
        return getattr(getattr(self, group_of_options()[name]), name)

    def values(self) -> dict[str, Any]:
        """Every option by name."""
        return {option: value for name in GROUPS for option, value in getattr(self, name)}

    def as_json(self) -> dict[str, Any]:
        """Every option with its value, as JSON holds it; secrets are stars, everything else can be read back."""
        groups = (getattr(self, name).model_dump(mode="json") for name in GROUPS)
        return {option: value for group in groups for option, value in group.items()}

    def with_values(self, values: Mapping[str, Any]) -> TrainConfig:
        """The same configuration with other values of some options, which are taken as they are."""
        changed = {name: options for name, options in split_by_group(values).items() if options}
        return replace(self, **{name: getattr(self, name).model_copy(update=new) for name, new in changed.items()})


# In this order pages and the wizard show them.
GROUPS: Mapping[str, type[OptionGroup]] = {name: group for name, group in get_type_hints(TrainConfig).items()}


@functools.cache
def group_of_options() -> Mapping[str, str]:
    """The name of each option's group."""
    return {option: name for name, group in GROUPS.items() for option in group.model_fields}


def split_by_group(values: Mapping[str, V]) -> dict[str, dict[str, V]]:
    """What is said of single options, group by group.

    Raises:
        KeyError: there is no such option.
    """
    groups: dict[str, dict[str, V]] = {name: {} for name in GROUPS}
    for option, value in values.items():
        groups[group_of_options()[option]][option] = value
    return groups


@functools.cache
def all_options() -> Mapping[str, OptionInfo]:
    """Every declared option by name, in the order of the groups."""
    return {
        name: describe_field(name, field, (group.__doc__ or "").strip())
        for group in GROUPS.values()
        for name, field in group.model_fields.items()
    }


def planned_options() -> dict[str, str]:
    """Options that are declared but not built, with the reason."""
    return {name: info.planned for name, info in all_options().items() if info.planned}
