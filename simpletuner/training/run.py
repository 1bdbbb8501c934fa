"""The parts of a run, built by `trainer.py` and used by `loop.py`: one place to see what a run consists of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.distributed.placement import Placement
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.models.family import ModelFamily
from simpletuner.optim.ema import EMA
from simpletuner.optim.schedules import scaled_learning_rate
from simpletuner.precision.mixed import autocast
from simpletuner.reporting.bus import EventBus
from simpletuner.training.batches import BatchSource
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.divergence import RECENT_STEPS
from simpletuner.training.evaluation import EvalResult, Evaluator, evaluations_without_gain
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.loss_scale import LossScale
from simpletuner.training.objective import Objective, build_objective
from simpletuner.training.rollout import Rollouts, build_rollouts
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from simpletuner.training.state import TrainState
from simpletuner.training.zeros import ZeroWatch
from simpletuner.validation.external import ExternalScript
from simpletuner.validation.validator import Validator


@dataclass
class Run:
    """Everything that a step of training touches.

    Args:
        loaded: the configuration and where it came from.
        seed: of all keyed randomness.
        family: the model family, bound to its weights.
        denoiser: the network; the adapter is a registered child of it.
        adapter: what trains; for full training the denoiser's own parameters.
        optimizer: over `adapter.trainable_parameters()`.
        lr_factor: optimizer step -> multiple of `peak_learning_rate`; a pure function.
        ema: average of the trainable parameters, or None.
        batches: windows of micro-batches.
        evaluator: None where there is no eval dataset or no interval.
        validator: None where validation is off.
        state: where the run stands.
        max_train_steps: optimizer steps at which the run ends.
        placement: whether each process holds all of the trained weights, or a part.
        world: the processes of the run; `Run` is the same in each but for its part of the batches.
        datasets: all of the run, for its report.
        recomputing: which blocks forget what they computed; None without gradient checkpointing.
        is_complete: an earlier process has brought it to its end.
        epochs_before: epochs done before the last step of this process.
        epochs_after: epochs done after it.
        saved_step: the step of the last checkpoint that this process has taken part in.
        owes_checkpoint: one was due at a step that was skipped.
        recent_skips: of the last steps of this process, whether they were skipped.
        last_update: the step whose update was the last one of this process.
        before_skips: state and loss scale before the first of the skipped steps that were the last ones.
        eval_losses: global_step -> pooled eval loss, of earlier processes too.
        eval_reference: the eval loss of the untouched base, once it is known.
        loss_bins: gathers the training loss by noise level.
        zero_watch: notices steps that train nothing.
    """

    loaded: LoadedRun
    seed: int
    output_dir: Path
    family: ModelFamily
    denoiser: nn.Module
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    ema: EMA | None
    batches: BatchSource
    evaluator: Evaluator | None
    validator: Validator | ExternalScript | None
    checkpoints: Checkpoints
    bus: EventBus
    stop: StopRequest
    state: TrainState
    max_train_steps: int
    placement: Placement
    process_group: ProcessGroup = SINGLE_PROCESS
    datasets: Sequence[Dataset] = ()
    recomputing: GradientCheckpointing | None = None
    is_complete: bool = False
    epochs_before: Fraction = Fraction(0)
    epochs_after: Fraction = Fraction(0)
    saved_step: int | None = None
    owes_checkpoint: bool = False
    last_update: int | None = None
    recent_skips: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    before_skips: tuple[TrainState, LossScale] | None = None
    eval_losses: dict[int, float] = field(default_factory=dict)
    eval_reference: EvalResult | None = None
    loss_bins: LossBins = field(default_factory=LossBins)
    zero_watch: ZeroWatch = field(default_factory=ZeroWatch)

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.config)

    @cached_property
    def rollouts(self) -> Rollouts:
        return build_rollouts(self.config, self.family.spec)

    @cached_property
    def guard(self) -> FolderGuard:
        """Notices that the output folder was renamed or deleted."""
        return FolderGuard(self.output_dir)

    @property
    def config(self) -> TrainConfig:
        return self.loaded.config

    @cached_property
    def trainable(self) -> list[nn.Parameter]:
        return list(self.adapter.trainable_parameters().values())

    @property
    def is_finished(self) -> bool:
        return self.state.global_step >= self.max_train_steps or self.is_stopped_early

    @property
    def is_stopped_early(self) -> bool:
        """Whether `early_stopping_patience` is used up; a function of the eval losses, so a resumed run knows too."""
        patience = self.config.early_stopping_patience
        return patience is not None and evaluations_without_gain(self.eval_losses) >= patience

    @cached_property
    def loss_scale(self) -> LossScale:
        return LossScale.of(self.config.mixed_precision)

    @cached_property
    def peak_learning_rate(self) -> float:
        """What `lr_factor` multiplies."""
        return scaled_learning_rate(self.config, self.process_group.size)

    def close(self) -> None:
        """Stop preparing windows, and write what was encoded on demand and is not in the caches yet."""
        self.batches.close()
        self.family.prompts.close()

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in `mixed_precision`; a no-op where it is `no`."""
        return autocast(self.family.device, self.config.mixed_precision)
