"""Checks of the outside world that need no torch: made before anything heavy is imported or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simpletuner.config.loading import LoadedRun
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_spec
from simpletuner.hub.access import check_access
from simpletuner.models.build import model_source
from simpletuner.models.local_check import check_local_model
from simpletuner.reporting.trackers.readiness import check_trackers


def check_model_folder(loaded: LoadedRun) -> None:
    """Raise where a local model folder is missing or incomplete.

    Raises:
        ConfigError: names the missing part and the key.
    """
    origin = loaded.origins.get("pretrained_model_name_or_path")
    file = str(origin.file) if origin is not None and origin.file else None
    problems = check_local_model(model_source(loaded.config.model), get_spec(loaded.config.model.model_family), file)
    if problems:
        raise ConfigError(problems)


def check_services(loaded: LoadedRun, environment: Mapping[str, str], working_dir: Path) -> list[str]:
    """Raise where a service that the run is to report to cannot work from here.

    Returns:
        What is worth a warning: a service that does not answer now.

    Raises:
        ConfigError: names the service and the remedy.
    """
    check_trackers(loaded.config.reporting, environment, working_dir)
    return check_access(loaded.config, environment)
