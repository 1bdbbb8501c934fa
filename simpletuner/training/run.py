"""The parts of a run, built by `build.py` and used by `loop.py`: one place to see what a run consists of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from simpletuner.adapters.assistant import Assistant
from simpletuner.adapters.base import Adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.distributed.placement import Placement
from simpletuner.models.family import ModelFamily
from simpletuner.optim.ema import EMA
from simpletuner.optim.schedules import scaled_learning_rate
from simpletuner.precision.mixed import autocast
from simpletuner.training.batches import BatchSource
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.divergence import Skips
from simpletuner.training.evaluation import EvalResult, Evaluator, evaluations_without_gain
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.objective import Objective, build_objective
from simpletuner.training.process import Process
from simpletuner.training.progress import Progress
from simpletuner.training.rollout import Rollouts, build_rollouts
from simpletuner.training.zeros import ZeroWatch
from simpletuner.validation.external import ExternalScript
from simpletuner.validation.validator import Validator


@dataclass
class Model:
    """What is trained, and what moves it.

    Args:
        family: the model family, bound to its weights.
        denoiser: the network; the adapter is a registered child of it.
        adapter: what trains; for full training the denoiser's own parameters.
        placement: whether each process holds all of the trained weights, or a part.
        optimizer: over `adapter.trainable_parameters()`.
        lr_factor: optimizer step -> multiple of `Run.peak_learning_rate`; a pure function.
        ema: average of the trainable parameters, or None.
        assistant: the frozen LoRA that is on while training, or None.
        gradient_checkpointing: which blocks are recomputed in the backward pass; None without gradient checkpointing.
    """

    family: ModelFamily
    denoiser: nn.Module
    adapter: Adapter
    placement: Placement
    optimizer: torch.optim.Optimizer
    lr_factor: Callable[[int], float]
    ema: EMA | None = None
    assistant: Assistant | None = None
    gradient_checkpointing: GradientCheckpointing | None = None

    @cached_property
    def trainable(self) -> list[nn.Parameter]:
        return list(self.adapter.trainable_parameters().values())


@dataclass(kw_only=True)
class Session(Process):
    """This process of a run, which may save its state.

    Args:
        cache_dir: beside `output_dir` the other folder that it writes to.
        checkpoints: of the run, in `output_dir`.
        pauses_on_full_disk: wait for space where a checkpoint finds none.
    """

    cache_dir: Path
    checkpoints: Checkpoints
    pauses_on_full_disk: bool = False


@dataclass
class Run:
    """A run: its model, where it stands, this process of it, and where its batches come from.

    Args:
        loaded: the configuration and where it came from.
        seed: of all keyed randomness.
        batches: windows of micro-batches.
        evaluator: None where there is no eval dataset or no interval.
        validator: None where validation is off.
        max_train_steps: optimizer steps at which the run ends.
        datasets: all of the run, for its report.
        is_complete: an earlier process has brought it to its end.
        epochs_before: epochs done before the last step of this process.
        epochs_after: epochs done after it.
        saved_step: the step of the last checkpoint that this process has taken part in.
        owes_checkpoint: one was due at a step that was skipped.
        skips: steps of this process that were skipped.
        eval_reference: the eval loss of the untouched base, once it is known.
        loss_bins: gathers the training loss by noise level.
        zero_watch: notices steps that train nothing.
    """

    loaded: LoadedRun
    seed: int
    model: Model
    progress: Progress
    session: Session
    batches: BatchSource
    evaluator: Evaluator | None
    validator: Validator | ExternalScript | None
    max_train_steps: int
    datasets: Sequence[Dataset] = ()
    is_complete: bool = False
    epochs_before: Fraction = Fraction(0)
    epochs_after: Fraction = Fraction(0)
    saved_step: int | None = None
    owes_checkpoint: bool = False
    skips: Skips = field(default_factory=Skips)
    eval_reference: EvalResult | None = None
    loss_bins: LossBins = field(default_factory=LossBins)
    zero_watch: ZeroWatch = field(default_factory=ZeroWatch)

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.config)

    @cached_property
    def rollouts(self) -> Rollouts:
        return build_rollouts(self.config, self.model.family.spec)

    @property
    def config(self) -> TrainConfig:
        return self.loaded.config

    @property
    def is_finished(self) -> bool:
        return self.progress.global_step >= self.max_train_steps or self.is_stopped_early

    @property
    def place(self) -> str:
        """Where the run stands, for messages; it may have been trained further than it is to be now."""
        step, end = self.progress.global_step, self.max_train_steps
        return f"step {step} of {end}" if step <= end else f"step {step}, beyond the {end} of the configuration"

    @property
    def is_stopped_early(self) -> bool:
        """Whether `early_stopping_patience` is used up; a function of the eval losses, so a resumed run knows too."""
        patience = self.config.evaluation.early_stopping_patience
        return patience is not None and evaluations_without_gain(self.progress.eval_losses) >= patience

    @cached_property
    def peak_learning_rate(self) -> float:
        """What `lr_factor` multiplies."""
        return scaled_learning_rate(self.config, self.session.process_group.size)

    def close(self) -> None:
        """Stop preparing windows, and write what was encoded on demand and is not in the caches yet."""
        self.batches.close()
        self.model.family.prompts.close()

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in `mixed_precision`; a no-op where it is `no`."""
        return autocast(self.model.family.device, self.config.precision.mixed_precision)
