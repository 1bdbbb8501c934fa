"""The training loop. The order of a step is written here, once, with its reasons.

1. data      the window of micro-batches that makes one optimizer step
2. losses    each micro-batch forward and backward, divided by the whole window's weight
3. update    check finite -> clip -> schedule -> optimizer -> EMA -> global_step + 1
4. report    numbers of this step
5. checkpoint before evaluation and images: a crash in those loses nothing
6. evaluate  eval loss on fixed noise
7. validate  images from the live weights

Nothing in 4 to 7 touches weights or randomness of training, so they can be switched on or off without changing a bit
of the result. A signal is answered between windows: parameters are then those of a whole number of steps.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.errors import DivergedError
from simpletuner.optim.clipping import clip_by_norm, clip_by_value, gradient_norm
from simpletuner.optim.optimizers import averaged_weights, set_learning_rate
from simpletuner.randomness import reseed_global
from simpletuner.reporting.events import CheckpointSaved, StepDone
from simpletuner.training.batches import Window
from simpletuner.training.device_failures import is_shortage
from simpletuner.training.divergence import explain, last_good_state, require_finite
from simpletuner.training.evaluate import evaluate
from simpletuner.training.loss_bins import INTERVAL as LOSS_BINS_INTERVAL
from simpletuner.training.losses.base import Change
from simpletuner.training.losses.perturbation import perturb
from simpletuner.training.losses.prior_preservation import aim_at_base
from simpletuner.training.memory import memory_gb
from simpletuner.training.rollout import train_from_rollout
from simpletuner.training.run import Model, Run
from simpletuner.training.step import Losses, compute_losses, sample_noise, sample_quantiles


@dataclass(frozen=True)
class StepOutcome:
    """Numbers of one optimizer step, the same in every process; `loss` is not finite where the step was skipped.

    Args:
        is_regularisation: all samples were regularization data.
        stops: a signal has reached one of the processes.
        samples: of all processes.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    regularisation_loss: float | None
    is_regularisation: bool = False
    stops: bool = False
    samples: int = 0

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def run_training(run: Run) -> None:
    """Train until `run.max_train_steps`, from wherever `run.progress` stands.

    Raises:
        DivergedError: too many steps in a row without finite gradients.
        Interrupted: a signal came; the state is saved.
    """
    run.model.denoiser.train()
    begin(run)
    while not run.is_finished:
        started = time.perf_counter()
        epoch = run.progress.epoch
        window = run.batches.window(run.progress.global_step, epoch, run.progress.position)
        outcome = train_window(run, window)
        report_step(run, window, outcome, epoch, time.perf_counter() - started)
        if run.progress.global_step % LOSS_BINS_INTERVAL == 0 or run.is_finished:
            report_loss_bins(run)

        if run.session.process_group.is_main:
            run.session.guard.require()
        maybe_checkpoint(run)
        if outcome.stops:
            run.session.stop.adopt()  # what is due is made up for by the next process
        else:
            maybe_evaluate(run)
            maybe_validate(run)
        if run.session.stop and (outcome.stops or run.session.process_group.size == 1):
            raise run.session.stop.error(saved=str(save_checkpoint(run)))


def begin(run: Run) -> None:
    """Evaluate and generate what is due at the step that this process starts from.

    Of a new run that is the base, of a resumed one what a kill or a signal has cost: the checkpoint of a step is
    older than its evaluation and images.

    Raises:
        Interrupted: a signal came.
    """
    step, sampler = run.progress.global_step, run.batches.sampler
    if step > 0:
        run.epochs_after = sampler.epochs_at(run.progress.epoch, run.progress.position)
        taken = Fraction(run.batches.accumulation, max(sampler.batches_in(run.progress.epoch), 1))
        run.epochs_before = max(run.epochs_after - taken, Fraction(0))
    if step == 0 or step not in run.progress.eval_losses:
        maybe_evaluate(run, always=step == 0)
    if run.validator is not None and (step == 0 or not run.validator.has_generated(step, run.model.ema)):
        maybe_validate(run, always=step == 0)
    if run.session.stop and run.session.process_group.size == 1:
        raise run.session.stop.error(saved=str(save_checkpoint(run)) if step else None)


def train_window(run: Run, window: Window) -> StepOutcome:
    """One optimizer step: all micro-batches of the window, then the update."""
    step, progress = window.step, run.progress
    weight = max(run.session.process_group.sum([window.weight])[0], 1e-12)
    set_learning_rate(run.model.optimizer, learning_rate_at(run, step))
    losses = backward_window(run, window, weight)
    run.model.placement.collect_gradients()
    run.progress.loss_scale.unscale(run.model.placement.parameters.values())
    outcome = summarize(run, window, losses)
    update_weights(run, step, outcome.is_finite)
    if not outcome.is_finite:
        require_finite(run, "weights", run.model.placement.parameters)  # no later step can be better
    progress.global_step, progress.epoch, progress.position = step + 1, window.next_epoch, window.next_position
    run.epochs_before, run.epochs_after = window.epochs_before, window.epochs_after
    trained = [each for each, batch in zip(losses, window.batches, strict=True) if not batch.is_regularisation]
    run.loss_bins.add(step + 1, trained)
    if run.model.gradient_checkpointing is not None:
        for line in run.model.gradient_checkpointing.after_step():
            run.session.inform(line)
    if run.skips.are_too_many:
        raise diverged(run, window, losses)
    return outcome


def backward_window(run: Run, window: Window, weight: float) -> list[Losses]:
    """Forward and backward of all micro-batches.

    Where memory does not suffice and blocks are recomputed by measure, a single process takes the step again with more
    of them recomputed. All draws are keyed, and a recomputed block gives the same bits, so nothing else changes.
    """
    while True:
        try:
            return [backward_micro_batch(run, window, micro_step, weight) for micro_step in range(len(window.batches))]
        except (RuntimeError, MemoryError) as error:
            is_helped = (
                run.session.process_group.size == 1
                and run.model.gradient_checkpointing is not None
                and is_shortage(error)
            )
            if not is_helped or not run.model.gradient_checkpointing.recompute_more():  # type: ignore[union-attr]
                raise
            reason = str(error).splitlines()[0]
        # Outside of the handler: the traceback holds the tensors of the pass that failed.
        run.model.optimizer.zero_grad(set_to_none=True)
        if run.model.family.device.type == "cuda":
            torch.cuda.empty_cache()
        text = f"step {window.step + 1} is taken again with more blocks recomputed: {reason}"
        run.session.warn(text)


def update_weights(run: Run, step: int, is_finite: bool) -> None:
    """Update weights and their average, and free the gradients; a step that is not finite moves nothing."""
    before = replace(run.progress, loss_scale=replace(run.progress.loss_scale))
    is_overflow = run.progress.loss_scale.update(is_finite)
    run.skips.note(before, is_skipped=not is_finite and not is_overflow)
    if is_finite:
        reseed_global(run.seed, "update", step)  # optimizers that round stochastically: the same in each process
        run.model.placement.step(run.model.optimizer)
        run.skips.last_update = step + 1
        if run.model.ema is not None:
            run.model.ema.update(run.model.placement.parameters, step + 1)
        run.skips.in_a_row = 0
    elif not is_overflow:
        run.skips.in_a_row += 1
    run.model.optimizer.zero_grad(set_to_none=True)


def backward_micro_batch(run: Run, window: Window, micro_step: int, weight: float) -> Losses:
    """Forward and backward of one micro-batch, its loss divided by `weight`, that of the window in all processes."""
    with run.autocast():
        losses = forward_micro_batch(run, window, micro_step)
    # Now, and not before the forward pass: a backward pass does not hold the interpreter, so a window can be built
    # beside it; beside a forward pass the two would wait for each other at each operation.
    run.batches.begin_next(window)
    scaled = losses.weighted_sum / weight * run.progress.loss_scale.scale
    run.model.placement.backward(scaled, is_last=micro_step == len(window.batches) - 1)
    return losses


def forward_micro_batch(run: Run, window: Window, micro_step: int) -> Losses:
    """The losses of one micro-batch; the same each time it is computed."""
    batch, step, seed = window.batches[micro_step], window.step, run.seed
    family, denoiser, objective = run.model.family, run.model.denoiser, run.objective
    noise = objective.offset_noise(sample_noise(batch, seed, step), batch.slots, seed, step)
    perturbed_noise = objective.perturbed_noise(noise, batch.slots, seed, step)
    depth = run.rollouts.depth(seed, step, micro_step)

    changes: list[Change] = []
    if perturbed_noise is not None:
        changes.append(partial(perturb, family=family, perturbed_noise=perturbed_noise))
    if batch.is_regularisation:
        changes.append(
            partial(aim_at_base, family=family, denoiser=denoiser, without_adapter=run.model.adapter.disabled)
        )
    elif depth:
        changes.append(
            partial(train_from_rollout, family=family, denoiser=denoiser, depth=depth, rollouts=run.rollouts)
        )
    # Dropout inside an adapter samples from the global generator.
    reseed_global(seed, "denoiser", step, micro_step, *run.session.process_group.key)
    quantiles = sample_quantiles(batch, seed, step, window.num_slots if objective.is_stratified else 1)
    return compute_losses(family, denoiser, batch, noise, quantiles, objective, changes)


def summarize(run: Run, window: Window, losses: list[Losses]) -> StepOutcome:
    """Clip the gradients and gather the step's numbers: the one place where the host waits for the device."""
    grad_norm = clip_gradients(run.model, run.config.optimizer)
    *sums, stops, samples = run.session.process_group.sum(
        [*weighted_sums(window, losses), bool(run.session.stop), window.num_samples]
    )
    loss, regularisation_loss = weighted_means(*sums)
    return StepOutcome(
        loss=loss,
        grad_norm=float(grad_norm),
        learning_rate=learning_rate_at(run, window.step),
        regularisation_loss=regularisation_loss,
        is_regularisation=all(batch.is_regularisation for batch in window.batches),
        stops=stops > 0,
        samples=int(samples),
    )


def learning_rate_at(run: Run, step: int) -> float:
    return run.peak_learning_rate * run.model.lr_factor(step)


def clip_gradients(model: Model, options: OptimizerOptions) -> Tensor:
    """() the joint norm of the gradients (largest absolute value where clipping is by value), before clipping."""
    if (norm := model.placement.norm_before_clipping) is not None:
        return norm
    if options.max_grad_norm and options.grad_clip_method == "value":
        return model.placement.largest_of_all(clip_by_value(model.trainable, options.max_grad_norm))
    norm = model.placement.norm_of_all(gradient_norm(model.trainable))
    return clip_by_norm(model.trainable, options.max_grad_norm, norm) if options.max_grad_norm else norm


def weighted_sums(window: Window, losses: list[Losses]) -> tuple[float, float, float, float]:
    """(loss, weight) of all samples of the window, and (loss, weight) of its regularization samples."""
    pairs = torch.stack([torch.stack([micro.weighted_sum.detach(), micro.weights.sum()]) for micro in losses]).tolist()
    sums, weights = zip(*pairs, strict=True)
    kept = [index for index, batch in enumerate(window.batches) if batch.is_regularisation]
    return sum(sums), sum(weights), sum(sums[i] for i in kept), sum(weights[i] for i in kept)


def weighted_means(loss: float, weight: float, kept_loss: float, kept_weight: float) -> tuple[float, float | None]:
    """(mean over all samples, mean over regularization samples or None) from `weighted_sums`."""
    return loss / max(weight, 1e-12), kept_loss / kept_weight if kept_weight else None


def diverged(run: Run, window: Window, losses: list[Losses]) -> DivergedError:
    """The error of a run whose numbers are no longer finite; names the last samples and, where it shows, the reason."""
    return explain(run, window, losses, partial(forward_micro_batch, run, window))


def report_step(run: Run, window: Window, outcome: StepOutcome, epoch: int, seconds: float) -> None:
    """Emit the numbers of a step."""
    extra = {"regularisation_loss": outcome.regularisation_loss} if outcome.regularisation_loss is not None else {}
    if run.model.ema is not None:
        extra["ema_decay"] = run.model.ema.decay_at(window.step + 1)
    if run.rollouts.max_depth:
        depths = [run.rollouts.depth(run.seed, window.step, number) for number in range(len(window.batches))]
        extra["rollout_depth"] = sum(depths) / len(depths)
    run.session.bus.emit(
        StepDone(
            step=run.progress.global_step,
            total_steps=run.max_train_steps,
            loss=outcome.loss,
            learning_rate=outcome.learning_rate,
            grad_norm=outcome.grad_norm,
            seconds=seconds,
            samples=outcome.samples,
            epoch=epoch + 1,
            memory_gb=memory_gb(run.model.family.device),
            extra=extra,
            is_regularisation=outcome.is_regularisation,
        )
    )
    if run.skips.in_a_row:
        run.session.warn(f"step {run.progress.global_step}: loss or gradients not finite, step skipped")
    zeros = run.zero_watch.add(
        outcome.loss, outcome.grad_norm, window.batches, run.config.precision.mixed_precision, run.is_finished
    )
    if zeros:
        run.session.warn(f"step {run.progress.global_step}: {zeros}")


def report_loss_bins(run: Run) -> None:
    """Emit the loss by noise level since the last time."""
    event = run.loss_bins.take(run.progress.global_step, run.session.process_group)
    if event is not None:
        run.session.bus.emit(event)


def is_due(run: Run, step_interval: int | None, epoch_interval: float | None = None) -> bool:
    """Whether the step just taken ends an interval of steps, or crossed an interval of epochs."""
    step = run.progress.global_step
    if step_interval and step % step_interval == 0:
        return True
    if not epoch_interval:
        return False
    interval = as_written(epoch_interval)
    return run.epochs_after // interval > run.epochs_before // interval


def as_written(number: float) -> Fraction:
    """The decimal number that somebody wrote: 0.1 is a tenth, which no float is, and 0.3 // 0.1 is 2."""
    return Fraction(str(number))


def save_checkpoint(run: Run) -> str:
    """Commit a checkpoint of the current state and report it, unless that is done; returns its path.

    After skipped steps it is that of the last good step, from which a resume takes them once more.

    Raises:
        DivergedError: weights or optimizer state are not finite; nothing is written.
    """
    with last_good_state(run):
        step = run.progress.global_step
        if run.saved_step != step:
            run.model.placement.check(f"after step {step}")
            saved = run.session.checkpoints.save(run)
            run.session.bus.emit(CheckpointSaved(step=step, path=saved.path, is_new=saved.is_new))
            run.saved_step = step
        return str(run.session.checkpoints.path_of(step))


def maybe_checkpoint(run: Run) -> None:
    """Save a checkpoint if one is due. One that is due at a skipped step is saved after the next good step."""
    options, is_skipped = run.config.checkpoint, run.skips.in_a_row > 0
    if not is_skipped and run.session.process_group.is_main:
        for notice in run.session.checkpoints.settle():
            run.session.bus.emit(notice)
    if is_due(run, options.checkpoint_step_interval, options.checkpoint_epoch_interval) or run.owes_checkpoint:
        if not is_skipped:
            save_checkpoint(run)
        elif not run.owes_checkpoint:
            text = f"checkpoint-{run.progress.global_step} is not saved, its step was skipped"
            run.session.warn(f"{text}: one is saved after the next step that is not")
        run.owes_checkpoint = is_skipped
    if run.is_finished:
        save_checkpoint(run)


def maybe_evaluate(run: Run, always: bool = False) -> None:
    options = run.config.evaluation
    if run.evaluator is None:
        return
    if always or run.is_finished or is_due(run, options.eval_steps_interval, options.eval_epoch_interval):
        evaluate(run)
        if run.is_stopped_early:
            save_checkpoint(run)


def maybe_validate(run: Run, always: bool = False) -> None:
    options, step = run.config.validation, run.progress.global_step
    if run.validator is None:
        return
    is_wanted = is_due(run, options.validation_step_interval, options.validation_epoch_interval)
    is_early = step < options.validate_after_step or run.epochs_after < as_written(options.validate_after_epoch)
    if always or run.is_finished or (is_wanted and not is_early):
        with averaged_weights(run.model.optimizer):
            run.validator.run(run.model.denoiser, run.model.adapter, run.model.ema, step)
        run.model.denoiser.train()
