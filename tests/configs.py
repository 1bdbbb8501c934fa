"""A whole configuration from the few options that a test is about."""

from __future__ import annotations

from typing import Any

from simpletuner.config.options import TrainConfig


def config_of(**options: Any) -> TrainConfig:
    """The declared defaults but for these options; no rule is asked."""
    return TrainConfig.from_values({"model_family": "omnigen", **options})
