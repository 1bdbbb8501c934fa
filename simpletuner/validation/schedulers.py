"""`validation_noise_scheduler`: another sampler of diffusers in place of the model's own, with its noise schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.importing import import_class

# Name of the option's value -> class of diffusers, and its arguments beyond the model's own configuration.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
}


def use_scheduler(pipeline: Any, name: str) -> None:
    """Give the pipeline another sampler over the same noise schedule, prediction type and spacing of steps."""
    class_name, options = SCHEDULERS[name]
    scheduler_class = import_class(f"diffusers.{class_name}")
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **options)
