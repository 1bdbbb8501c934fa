"""What follows from an eval loss: the best checkpoint, and the end of a run that learns no more.

Both are functions of the eval losses so far. They are kept in `eval_losses.json`, written at each evaluation, since the
checkpoint of the same step is older than its evaluation: a resumed run knows what the killed one knew.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.optim.optimizers import averaged_weights
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import CheckpointSaved, EvalDone, Notice
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records
from simpletuner.training.checkpoint import read_state
from simpletuner.training.divergence import last_good_state
from simpletuner.training.earlier_runs import move_aside
from simpletuner.training.evaluation import EvalResult, best_step, losses_as_json, losses_from_json
from simpletuner.training.run import Run, Session
from simpletuner.training.run_files import BEST, EVAL_FILE
from simpletuner.training.run_history import Mark, RunHistory


def evaluate(run: Run) -> None:
    """Compute the eval loss of the live weights, tell it, and keep the state if it is the best so far."""
    assert run.evaluator is not None
    step, started = run.progress.global_step, time.monotonic()
    with averaged_weights(run.model.optimizer), run.autocast():
        result = run.evaluator.run(run.model.denoiser)
        if result is None:
            run.session.inform(f"no eval loss at step {step}: the run is asked to stop")
            return
        reference = reference_result(run, result)
    # The processes compute the same; the last bit of one of them shall not make them disagree on the end of the run.
    run.progress.eval_losses[step] = run.session.process_group.from_main(result.pooled)
    run.session.bus.emit(
        EvalDone(
            step=step,
            losses={} if run.config.evaluation.eval_dataset_pooling else dict(result.by_dataset),
            pooled=result.pooled,
            per_quantile=tuple(result.by_quantile),
            seconds=time.monotonic() - started,
            reference=reference.pooled if reference else None,
            reference_per_quantile=tuple(reference.by_quantile) if reference else (),
        )
    )
    if keeps_best(run) and step > 0 and best_step(run.progress.eval_losses) == step:
        with last_good_state(run):
            path = run.session.checkpoints.save_best(run, run.progress.eval_losses[step])
        run.session.bus.emit(CheckpointSaved(step=step, path=path, eval_loss=run.progress.eval_losses[step]))
    if run.session.process_group.is_main:  # after the checkpoint: a best one that is recorded is there
        write_eval_history(run.session, run.progress.eval_losses)
    if run.is_stopped_early:
        count = run.config.evaluation.early_stopping_patience
        text = f"the run ends at step {step}: {count} evaluations in a row brought no eval loss below "
        best = best_step(run.progress.eval_losses)
        run.session.inform(f"{text}{run.progress.eval_losses[best]:.4f} of step {best} (early_stopping_patience)")


def reference_result(run: Run, result: EvalResult) -> EvalResult | None:
    """The untouched base on the same images: computed once in a process.

    Full training has its base before its first step only; a resumed run has no reference then, nor has one that is
    asked to stop meanwhile.
    """
    assert run.evaluator is not None
    if run.eval_reference is None:
        if run.progress.global_step == 0 and run.config.adapter.init_lora is None:
            run.eval_reference = result  # an adapter starts as no change at all
        elif run.model.adapter.can_be_disabled:
            with run.model.adapter.disabled():
                run.eval_reference = run.evaluator.run(run.model.denoiser)
    return run.eval_reference


def write_eval_history(session: Session, eval_losses: Mapping[int, float]) -> None:
    """Keep the eval losses; a disk that refuses them costs a warning, for the next checkpoint holds them too."""
    mark, losses = session.checkpoints.history.mark, losses_as_json(eval_losses)
    try:
        storage.write_json(session.output_dir / EVAL_FILE, {**mark.to_json(), "losses": losses})
    except DataError as error:
        session.warn(f"{error.problems[0].render()}; the next checkpoint keeps the eval losses")


def read_eval_history(output_dir: Path, history: RunHistory, bus: EventBus) -> dict[str, float | None]:
    """The eval losses that earlier processes of this run wrote, as JSON has them; where the file is damaged, those that
    `metrics.jsonl` has, for `early_stopping_patience` and the best checkpoint must not start from the beginning."""
    path = output_dir / EVAL_FILE
    try:
        noted = storage.read_json(path) if path.is_file() else {}
        mark = Mark.from_json(noted)
        losses = noted["losses"] if mark else noted
        losses_from_json(losses)
        return {step: loss for step, loss in losses.items() if history.owns(mark, int(step))}
    except (DataError, ValueError, TypeError, AttributeError, KeyError):
        recorded = recorded_losses(output_dir / METRICS_FILE)
        text = f"{path} is damaged: {len(recorded)} eval losses are read from {METRICS_FILE} instead"
        bus.emit(Notice("warning", text))
        return recorded


def recorded_losses(metrics: Path) -> dict[str, float | None]:
    """Step -> eval loss of a metrics file, as `losses_as_json` has them; the last one of a step counts."""
    losses: dict[str, float | None] = {}
    for record in read_records(metrics):
        loss = record.get("pooled")
        if record.get("event") == "eval_done" and isinstance(record.get("step"), int):
            losses[str(record["step"])] = float(loss) if isinstance(loss, int | float) else None
    return losses


def keeps_best(run: Run) -> bool:
    """Whether the state with the lowest eval loss is kept: unless `checkpoint_keep_best` says no."""
    return run.evaluator is not None and run.config.evaluation.checkpoint_keep_best is not False


def is_comparable(run: Run, checkpoint: Path) -> bool:
    """Whether the eval losses of a checkpoint are of the images and noise levels of now; where it does not say, yes."""
    before = read_state(checkpoint).get("evaluated")
    return run.evaluator is None or before is None or before == run.evaluator.identity


def evaluate_anew(run: Run, resumed: Path) -> None:
    """What is evaluated has changed: forget the losses of before, and move the checkpoint that was the best then to
    `earlier-runs/`, unless the run has just resumed from it."""
    text = "the eval images or timesteps are not those of before: eval losses and the best checkpoint start anew"
    best = run.session.output_dir / BEST
    if run.session.checkpoints.best_evaluation() is not None and best != resumed and not is_comparable(run, best):
        text += f"; the best of before is now in {move_aside(run.session.output_dir, best)}"
    write_eval_history(run.session, {})
    run.session.warn(text)


def restore_best(run: Run) -> None:
    """Bring the record of eval losses and `checkpoint-best` together after a kill or a full disk came between them.

    The checkpoint is committed first. One that the record lacks is added to it; where the lowest loss of the record has
    no `checkpoint-best` (it was lost, or the run went back), the numbered checkpoint of that step becomes it.
    """
    best = run.session.checkpoints.best_evaluation()
    if best is not None and not is_comparable(run, run.session.output_dir / BEST):
        best = None
    if best is not None and best[0] <= run.progress.global_step and best[0] not in run.progress.eval_losses:
        run.progress.eval_losses[best[0]] = best[1]
        write_eval_history(run.session, run.progress.eval_losses)
    if not run.progress.eval_losses or not keeps_best(run):
        return
    step = best_step(run.progress.eval_losses)
    if step > 0 and (best is None or best[0] != step) and run.session.checkpoints.has(step):
        try:
            run.session.checkpoints.link_best(step, run.progress.eval_losses[step])
        except DataError as error:
            run.session.warn(f"{error.problems[0].render()}; the best checkpoint is not kept")
            return
        run.session.inform(f"checkpoint-best is checkpoint-{step}, eval loss {run.progress.eval_losses[step]:.4f}")
