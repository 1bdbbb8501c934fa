"""What a run does with numbers that are not finite: never commit them, end in time, and say why as far as it shows.

Called by the loop where a step was skipped, and by each writer of a checkpoint. Everything here is the same in all
processes of a run, so that they end together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.batch import Batch
from simpletuner.errors import DivergedError, Problem
from simpletuner.precision.mixed import autocast

if TYPE_CHECKING:
    from simpletuner.training.batches import Window
    from simpletuner.training.progress import Progress
    from simpletuner.training.run import Model, Run
    from simpletuner.training.step import Losses

# Skipped steps in a row, and among the most recent ones, that end a run.
MAX_SKIPPED_STEPS = 5
RECENT_STEPS, MAX_SHARE = 50, 0.2
UNTOUCHED = "the checkpoints are untouched"

# Computes one micro-batch of a window forward, in whatever autocast surrounds it.
Forward = Callable[[int], "Losses"]


# ---- what is never committed ---------------------------------------------------------------------------------------


def non_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold NaN or an infinity; whole numbers and packed bits count as finite."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    if not floats:
        return []
    # One answer a tensor, and one wait for each device.
    answers: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in floats.items():
        answers.setdefault(tensor.device, []).append((name, _is_finite(tensor.detach())))
    return [
        name
        for pairs in answers.values()
        for (name, _), is_finite in zip(pairs, torch.stack([each for _, each in pairs]).tolist(), strict=True)
        if not is_finite
    ]


def _is_finite(tensor: Tensor) -> Tensor:
    if tensor.dtype.itemsize == 1:  # float8 has few operations
        tensor = tensor.to(torch.float16)
    return tensor.isfinite().all()


def require_finite(run: Run, what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise in all processes where one holds a value that is not finite: it would be committed.

    Args:
        what: the tensors are: `weights`.

    Raises:
        DivergedError: names the first of them.
    """
    found = non_finite(tensors)
    if run.session.process_group.any(bool(found)):
        raise DivergedError(_weights_problem(run, what, found, len(tensors)))


def _weights_problem(run: Run, what: str, found: Sequence[str], count: int) -> Problem:
    share = f"{len(found)} of {count} tensors, {found[0]} first" if found else "those of another process"
    if run.skips.last_update is None:
        message = f"the {what} that the run starts from are not finite ({share}); {UNTOUCHED}"
        return Problem(message, key="resume_from_checkpoint", fix=f"choose other ones{_from_where(run)}")
    rate = run.peak_learning_rate * run.model.lr_factor(run.skips.last_update - 1)
    return Problem(
        f"the {what} are not finite after the update of step {run.skips.last_update} ({share}); they are not saved, "
        f"and {UNTOUCHED}",
        key="learning_rate",
        fix=f"lower learning_rate (it was {rate:g} at this step){_from_where(run)}",
    )


@contextmanager
def last_good_state(run: Run) -> Iterator[None]:
    """Inside, the run stands where it stood before its latest skipped steps, which moved no weight."""
    if not run.skips.in_a_row or run.skips.before is None:
        yield
        return
    now = run.progress
    run.progress = run.skips.before
    try:
        yield
    finally:
        run.progress = now


# ---- when a run ends -----------------------------------------------------------------------------------------------


@dataclass
class Skips:
    """The steps of this process whose loss or gradients were not finite; a resume starts counting again.

    Args:
        in_a_row: steps that were skipped since the last good one.
        recent: of the last steps, whether they were skipped.
        last_update: the step whose update was the last one.
        before: the progress before the first of the skipped steps that were the last ones.
    """

    in_a_row: int = 0
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    last_update: int | None = None
    before: Progress | None = None

    def note(self, before: Progress, is_skipped: bool) -> None:
        """Count a step.

        Args:
            before: the progress before the step.
            is_skipped: and not for an overflow that the loss scale answers.
        """
        if is_skipped and self.in_a_row == 0:
            self.before = before
        elif not is_skipped:
            self.before = None
        self.recent.append(is_skipped)

    @property
    def are_too_many(self) -> bool:
        """Whether the run has diverged: in a row, or among the recent steps."""
        return self.in_a_row >= MAX_SKIPPED_STEPS or sum(self.recent) >= RECENT_STEPS * MAX_SHARE

    def __str__(self) -> str:
        if self.in_a_row >= MAX_SKIPPED_STEPS:
            return f"{MAX_SKIPPED_STEPS} steps in a row"
        return f"{sum(self.recent)} of the last {len(self.recent)} steps"


# ---- why -----------------------------------------------------------------------------------------------------------


def explain(run: Run, window: Window, losses: Sequence[Losses], forward: Forward) -> DivergedError:
    """The error of a run that skips too many steps: its samples, the reason, and what to change.

    Args:
        window: the last one that was skipped.
        losses: of its micro-batches.
        forward: computes one of them again.
    """
    samples = [name for each in run.session.process_group.gather(bad_samples(window, losses)) for name in each]
    where = (
        f"Samples of the last one: {'; '.join(samples[:4])}" if samples else "All losses of the last one were finite"
    )
    reasons = run.session.process_group.gather(_first(_reasons(run, window, losses, forward)))
    cause, key, fix = next((reason for reason in reasons if reason), None) or _unknown(run)
    return DivergedError(
        Problem(
            f"loss or gradients were not finite for {run.skips}, up to step {run.progress.global_step}; {UNTOUCHED}. "
            f"{cause}. {where}",
            key=key,
            fix=fix,
        )
    )


def bad_samples(window: Window, losses: Sequence[Losses]) -> list[str]:
    """Samples of this process whose loss is not finite: path and caption of each."""
    return [
        _sample_name(batch, row)
        for batch, micro in zip(window.batches, losses, strict=True)
        for row, is_finite in enumerate(micro.per_sample.detach().isfinite().tolist())
        if not is_finite
    ]


def _sample_name(batch: Batch, row: int) -> str:
    caption = f'"{batch.captions[row]}"' if batch.captions else ""
    path = f"{batch.dataset_id}/{batch.samples[row].path}" if batch.samples else ""
    return " ".join(part for part in (path, caption) if part)


Reason = tuple[str, str, str]


def _first(reasons: Iterable[Reason]) -> list[str] | None:
    return next((list(reason) for reason in reasons), None)


def _reasons(run: Run, window: Window, losses: Sequence[Losses], forward: Forward) -> Iterator[Reason]:
    """What may be the cause, most certain first: (cause, option, fix)."""
    yield from _bad_data(window)
    yield from _bad_base(run.model, run.config.precision.base_model_precision)
    if run.model.placement.is_spread or run.session.process_group.size > 1:
        return  # a trial would need all processes at the same place
    yield from _overflow(run, window, forward)
    yield from _grown_weights(run, window, losses, forward)


def _bad_data(window: Window) -> Iterator[Reason]:
    for batch in window.batches:
        for row, latents in enumerate(batch.latents):
            tensors = {"latents": latents, **batch.prompt_embeds[row].tensors}
            if found := non_finite(tensors):
                name = _sample_name(batch, row)
                yield (
                    f"What was cached for it is not finite: {found[0]} of {name}",
                    "cache_dir",
                    "remove the image from the dataset, or choose another cache_dir, so that it is encoded again",
                )


def _bad_base(model: Model, precision: str) -> Iterator[Reason]:
    trained = {id(parameter) for parameter in model.trainable}
    frozen = {name: each for name, each in model.denoiser.named_parameters() if id(each) not in trained}
    if found := non_finite({**frozen, **dict(model.denoiser.named_buffers())}):
        is_packed = precision != "no_change"
        fix = "set base_model_precision to no_change" if is_packed else "fetch the model's files again"
        text = f"{len(found)} tensors of the frozen base model are not finite, {found[0]} first"
        yield (f"{text} ({precision})" if is_packed else text, "base_model_precision", fix)


def _overflow(run: Run, window: Window, forward: Forward) -> Iterator[Reason]:
    if run.config.precision.mixed_precision == "fp16" and (loss := _trial(run, window, "bf16", forward)) is not None:
        yield (
            f"fp16 overflows: the same samples have a loss of {loss:.4g} and finite gradients in bf16",
            "mixed_precision",
            f"set mixed_precision to bf16, or to no where the device has no bf16{_from_where(run)}",
        )


def _trial(run: Run, window: Window, precision: str, forward: Forward) -> float | None:
    """The loss of a window that is computed once more in another number format; None where it is not finite."""
    total = weight = 0.0
    try:
        for micro_step in range(len(window.batches)):
            with autocast(run.model.family.device, precision):
                losses = forward(micro_step)
            losses.weighted_sum.backward()
            total, weight = total + float(losses.weighted_sum.detach()), weight + float(losses.weights.sum())
        grads = {str(index): each.grad for index, each in enumerate(run.model.trainable) if each.grad is not None}
        is_finite = math.isfinite(total) and not non_finite(grads)
    except RuntimeError:  # a device without this format, or without the memory for it: then nothing is known
        return None
    finally:
        run.model.optimizer.zero_grad(set_to_none=True)
    return total / max(weight, 1e-12) if is_finite else None


def _grown_weights(run: Run, window: Window, losses: Sequence[Losses], forward: Forward) -> Iterator[Reason]:
    if not run.model.adapter.can_be_disabled or not bad_samples(window, losses):
        return
    with torch.no_grad(), run.model.adapter.disabled(), run.autocast():
        without = [forward(micro_step).weighted_sum for micro_step in range(len(window.batches))]
    if torch.stack(without).isfinite().all():
        largest = max(float(parameter.detach().abs().max()) for parameter in run.model.trainable)
        yield (
            f"The trained weights are the reason: without them the loss is finite: they are as large as {largest:.3g}",
            "learning_rate",
            f"{_lower_rate(run)}{_from_where(run)}",
        )


def _unknown(run: Run) -> Reason:
    return "The reason is not known", "learning_rate", f"{_lower_rate(run)}{_from_where(run)}"


def _lower_rate(run: Run) -> str:
    limit = " or max_grad_norm" if run.config.optimizer.max_grad_norm else ""
    return f"lower learning_rate ({run.peak_learning_rate:g}){limit}"


def _from_where(run: Run) -> str:
    """How to go on: from the newest checkpoint whose weights are known to give finite losses."""
    found = run.session.checkpoints.found()
    if not found:
        return " and start again"
    # No finite step came after a save that is not settled: its weights may be what is wrong.
    good = found if run.session.checkpoints.is_settled else found[:-1]
    if not good:
        return " and start again with resume_from_checkpoint= (empty)"
    if good[-1] is found[-1]:
        return f" and start again: the run continues from {good[-1].name}"
    return f" and start again with resume_from_checkpoint={good[-1].name}"
