"""A tracker of one's own, found by `custom_tracker: "package.module:Class"`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from simpletuner.errors import ConfigError, Problem
from simpletuner.reporting.trackers.base import Tracker


def load_custom_tracker(name: str) -> type[Tracker]:
    """The class that `name` means; modules in the working folder are found as well as installed ones.

    Raises:
        ConfigError: there is no such module or class, or it is no `Tracker`.
    """
    module_name, _, class_name = name.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file there never hides an installed package
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            _problem(f'"{name}" cannot be imported ({error})', f"install it, or put it into {folder}")
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Tracker)):
        what = f"{module.__file__ or module_name} has no class {class_name} that is a Tracker"
        raise ConfigError(_problem(what, f"derive {class_name} from {Tracker.__module__}.Tracker"))
    return found


def _problem(message: str, fix: str) -> Problem:
    return Problem(message, key="custom_tracker", allowed="package.module:Class", fix=fix)
