"""Between two reports of a step the host only queues work: it neither reads from the device nor waits for a copy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.training.losses.huber import Huber
from simpletuner.training.losses.reflexflow import ReflexFlow
from simpletuner.training.objective import Objective
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.rollout import Rollouts, train_from_rollout
from simpletuner.training.step import compute_losses, sample_noise
from tests.tiny_folders import TINY_FOLDERS


class Replicated(TorchDispatchMode):
    """Gathers copies to another device that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        is_copy = function is torch.ops.aten._to_copy.default and device not in (None, args[0].device)
        if is_copy and not kwargs.get("non_blocking"):
            self.waiting.append(f"{tuple(args[0].shape)} to {device}")
        return function(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("name", family_names())
def test_a_micro_batch_never_waits_for_the_device(name: str, tmp_path: Path) -> None:
    """On torch's meta device, where there is nothing to read: what asks for a value raises."""
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](tmp_path)))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    embeds = family.encode_prompts(["a red star", "a moon"])
    batch = empty_batch(family, 64, 64, embeds)
    family.device = torch.device("meta")
    denoiser = family.empty_denoiser()
    attach_lora(denoiser, LoraSettings(rank=2), spec, torch.float32, seed=0)
    objective = Objective(loss=Huber(), snr_gamma=5.0)
    rollouts = Rollouts(max_depth=2, reflex=ReflexFlow())
    quantiles = torch.tensor([0.3, 0.7], dtype=torch.float64)
    with Replicated() as copies:
        losses = compute_losses(
            family,
            denoiser,
            batch,
            sample_noise(batch, 0, 0),
            quantiles,
            objective,
            [partial(train_from_rollout, family=family, denoiser=denoiser, depth=2, rollouts=rollouts)],
        )
        losses.weighted_sum.backward()
    assert copies.waiting == []
