"""Measured seconds of a training step and of encoding: the real weights, the real step, on images without content."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.build import attach_adapter
from simpletuner.batch import PromptEmbeds
from simpletuner.cache.encoding import BatchEncoder
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.models.family import ModelFamily
from simpletuner.optim.clipping import clip_by_norm
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.mixed import autocast
from simpletuner.training.device_placement import place_denoiser
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.kernels import compile_blocks
from simpletuner.training.losses.prior_preservation import aim_at_base
from simpletuner.training.planning.memory import may_keep_least
from simpletuner.training.planning.shapes import Load, empty_batch
from simpletuner.training.step import compute_losses, sample_noise

TIMED_BATCHES = 2
# What is slow needs no second look: after so long no further batch is begun.
PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class StepTimes:
    """What was measured.

    Args:
        micro_batch: seconds of forward and backward, by kind of batch.
        passes: seconds of one pass without gradients, by kind of batch; empty where no rollouts take them.
        update: seconds of clipping and optimizer.
        peak_bytes: of the accelerator's memory; None on the CPU.
    """

    micro_batch: Mapping[Load, float]
    passes: Mapping[Load, float]
    update: float
    peak_bytes: int | None


def time_steps(
    loaded: LoadedRun,
    family: ModelFamily,
    loads: Sequence[Load],
    embeds: Sequence[PromptEmbeds],
    has_rollouts: bool = False,
) -> StepTimes:
    """Take real steps on each kind of batch, or as many as there is time for; the weights are thrown away afterwards.

    Args:
        embeds: prompts to draw on, in turn.
        has_rollouts: passes without gradients are timed too.
    """
    config = loaded.config
    denoiser: Any = family.load_base()
    adapter = attach_adapter(loaded, family, denoiser)
    place_denoiser(config, family, denoiser, adapter, SINGLE_PROCESS)
    denoiser.train()
    recomputing = GradientCheckpointing.of(config, family.device, may_keep_least=may_keep_least(loaded))
    if recomputing is not None:
        denoiser.enable_gradient_checkpointing(recomputing)
    sizes = {(load.height, load.width) for load in loads}
    compile_blocks(denoiser, family.spec.block_classes, config.precision.dynamo_backend, len(sizes) > 1)
    parameters = adapter.trainable_parameters()
    optimizer = build_optimizer(config.optimizer, parameters, config.training.seed)
    if family.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(family.device)

    def update() -> None:
        clip_by_norm(list(parameters.values()), config.optimizer.max_grad_norm or 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if recomputing is not None:
            recomputing.after_step()

    micro_batch: dict[Load, float] = {}
    passes: dict[Load, float] = {}
    update_seconds = 0.0
    begun = _now(family)
    for load in loads:
        if micro_batch and _now(family) - begun > PROBE_SECONDS:
            break
        seconds: list[float] = []
        for index in range(1 + TIMED_BATCHES):
            if index and _now(family) - begun > PROBE_SECONDS:
                break
            started = _now(family)
            _losses(config, family, denoiser, adapter, load, embeds).backward()
            middle = _now(family)
            update()
            seconds.append(middle - started)
            update_seconds = _now(family) - middle
        micro_batch[load] = min(seconds)  # the first one warms up
        if has_rollouts:
            started = _now(family)
            with torch.no_grad():
                _losses(config, family, denoiser, adapter, replace(load, is_regularisation=False), embeds)
            passes[load] = _now(family) - started
    peak = torch.cuda.max_memory_allocated(family.device) if family.device.type == "cuda" else None
    return StepTimes(micro_batch, passes, update_seconds, peak)


def time_encoding(family: ModelFamily, height: int, width: int, batch_size: int) -> float:
    """Seconds per image of the VAE alone, in batches of `batch_size`."""
    encoder = BatchEncoder(family, family.load_vae(), batch_size)
    images = [torch.zeros(3, height, width)] * batch_size
    seconds: list[float] = []
    while len(seconds) < 2 and sum(seconds) <= PROBE_SECONDS:  # the first one warms up
        started = _now(family)
        encoder.encode(images)
        seconds.append(_now(family) - started)
    return min(seconds) / batch_size


def _losses(
    config: TrainConfig,
    family: ModelFamily,
    denoiser: torch.nn.Module,
    adapter: Adapter,
    load: Load,
    embeds: Sequence[PromptEmbeds],
) -> Tensor:
    """() the loss of one micro-batch of this kind."""
    prompts = [embeds[index % len(embeds)] for index in range(load.batch_size)]
    batch = empty_batch(family, load.height, load.width, prompts, load.references)
    batch = replace(batch, is_regularisation=load.is_regularisation)
    quantiles = torch.full((len(batch),), 0.5, dtype=torch.float64)
    aim = partial(aim_at_base, family=family, denoiser=denoiser, without_adapter=adapter.disabled)
    changes = [aim] if load.is_regularisation else []
    with autocast(family.device, config.precision.mixed_precision):
        losses = compute_losses(family, denoiser, batch, sample_noise(batch, 0, 0), quantiles, changes=changes)
    return losses.weighted_sum


def _now(family: ModelFamily) -> float:
    if family.device.type == "cuda":
        torch.cuda.synchronize(family.device)
    return time.perf_counter()
