"""The whole configuration as one class, and the list of what is declared."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from pydantic import ConfigDict

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
from simpletuner.config.values import Size, parse_sizes


class TrainConfig(
    ModelOptions,
    DataOptions,
    TrainingOptions,
    ObjectiveOptions,
    AdapterOptions,
    OptimizerOptions,
    PrecisionOptions,
    ProcessOptions,
    ValidationOptions,
    EvaluationOptions,
    CheckpointOptions,
    ReportingOptions,
):
    """Every option of a run, with its final value. `config.loading.load_run` makes one and checks it."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=False)

    @property
    def validation_sizes(self) -> list[Size]:
        """`validation_resolution` as sizes, height first."""
        return parse_sizes(self.validation_resolution)

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint is to be continued, if there is one."""
        return self.resume_from_checkpoint.strip().lower() not in ("", "none")


# In this order pages and the wizard show them.
GROUPS: tuple[type[OptionGroup], ...] = TrainConfig.__bases__


@functools.cache
def all_options() -> Mapping[str, OptionInfo]:
    """Every declared option by name, in the order of the groups."""
    titles = {name: (group.__doc__ or "").strip() for group in GROUPS for name in group.__annotations__}
    fields = TrainConfig.model_fields
    return {name: describe_field(name, fields[name], titles[name]) for name in titles}


def planned_options() -> dict[str, str]:
    """Options that are declared but not built, with the reason."""
    return {name: info.planned for name, info in all_options().items() if info.planned}
