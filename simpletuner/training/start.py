"""How a run begins in its folder: fresh, from its own latest checkpoint, back at an earlier one, or from another run's.

Looking and acting are apart. `plan_start` only reads, so a start that is refused changes nothing; `begin_in_folder` is
called when nothing can be refused any more. It moves what the run does not go on with to `earlier-runs/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from simpletuner import storage, tempnames
from simpletuner.config.loading import LoadedRun
from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.training.checkpoint import Checkpoints, checkpoint_step, numbered_checkpoints, read_state
from simpletuner.training.earlier_runs import finish_move, move_earlier, write_run_history
from simpletuner.training.evaluate import write_eval_history
from simpletuner.training.identity import fixed_settings, refuse_changes
from simpletuner.training.planning.settings import keep_choice
from simpletuner.training.run import Run
from simpletuner.training.run_files import BEST, final_step, read_data_reports, step_of
from simpletuner.training.run_history import RunHistory, find_run_history

# A name or a path means that checkpoint, at each start.
LATER = "to continue it at the next start, set resume_from_checkpoint to latest"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Args:
        history: of the run from now on.
        resume_from: its checkpoint; None: at step 0.
        is_own: whether that checkpoint is this run's.
        moves: whether files of the folder are moved to `earlier-runs/`: those after the step that the run goes back to,
            all where it goes on with none.
        notices: what there is to report.
        reports: what the earlier start wrote about its data, by name.
    """

    history: RunHistory
    resume_from: Path | None = None
    is_own: bool = False
    moves: bool = True
    notices: tuple[str, ...] = ()
    reports: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps that are done already."""
        return int(read_state(self.resume_from)["state"]["global_step"]) if self.resume_from else 0


def plan_start(loaded: LoadedRun, output_dir: Path, process_group: ProcessGroup) -> Start:
    """Choose the checkpoint, the same in each process, and refuse what cannot be resumed before anything is loaded.

    Raises:
        ConfigError: there is no such checkpoint, only other runs', or it was trained with other fixed options.
        DataError: a process cannot see the checkpoint.
    """
    planned = _plan_here(loaded, output_dir) if process_group.is_main else None
    if process_group.size == 1:
        assert planned is not None
        return planned
    shared = planned and {
        "history": planned.history.to_json(),
        "resume_from": str(planned.resume_from) if planned.resume_from else None,
        "is_own": planned.is_own,
    }
    shared = process_group.from_main(shared)
    path = Path(shared["resume_from"]) if shared["resume_from"] else None
    if path is not None and not path.is_dir():
        message = f"{path} is not there for process {process_group.rank}"
        raise DataError(Problem(message, key="output_dir", fix="give all machines one shared output_dir"))
    return planned or Start(RunHistory.from_json(shared["history"]), path, shared["is_own"])


def _plan_here(loaded: LoadedRun, output_dir: Path) -> Start:
    config = loaded.config
    tempnames.clean_stale(output_dir)
    notices = [line for line in [finish_move(output_dir)] if line]
    best = output_dir / BEST
    committed = [*numbered_checkpoints(output_dir), *([best] if best.is_dir() else [])]
    history, found = find_run_history(output_dir, committed)
    checkpoints = Checkpoints(output_dir, config.checkpoint.checkpoints_total_limit, history)
    path, chosen = checkpoints.choose(
        config.checkpoint.resume_from_checkpoint.strip() if config.checkpoint.resumes else None
    )
    reports = read_data_reports(output_dir)
    if path is None:
        return Start(RunHistory.new(), notices=(*notices, *chosen), reports=reports)
    _refuse_other_options(loaded, path)
    step = int(read_state(path)["state"]["global_step"])
    # A checkpoint may be a link to another disk: the folder of the link counts.
    is_own = path.parent.resolve() == output_dir.resolve() and checkpoints.owns(path)
    if not is_own:
        text = f"starts from the checkpoint of another run: {path}; {LATER}"
        return Start(RunHistory.new(step), path, False, True, (*notices, *chosen, text), reports)
    goes_back = _has_later(checkpoints, step)
    if goes_back:
        text = f"goes back to {path.name}: a new branch of run {history.run_id} begins after step {step}; {LATER}"
        found = [*found, text]
        history = history.branched(step)
    return Start(history, path, True, goes_back, (*notices, *chosen, *found), reports)


def _refuse_other_options(loaded: LoadedRun, path: Path) -> None:
    """Compare what the configuration alone decides; shapes follow when the model is there.

    Raises:
        ConfigError: a difference that cannot be.
    """
    refuse_changes(read_state(path)["identity"]["fixed"], fixed_settings(keep_choice(loaded, path)), path)
    config = loaded.config
    saved = storage.read_json(path / "config.json", dict).get("lora_rank")
    if (
        config.model.model_type == "lora"
        and config.adapter.lora_type == "standard"
        and saved not in (None, config.adapter.lora_rank)
    ):
        message = f"{path} was trained with rank {saved}, the configuration says {config.adapter.lora_rank}"
        fix = "put the old value back, or choose another output_dir for a fresh start"
        raise ConfigError(Problem(message, key="lora_rank", fix=fix))


def _has_later(checkpoints: Checkpoints, step: int) -> bool:
    """Whether the run has been committed further than a step."""
    best = checkpoints.best()
    last = final_step(checkpoints.output_dir)
    numbered = [checkpoint_step(path) for path in checkpoints.found()]  # also of one whose manifest is damaged
    return max([*numbered, step_of(best) if best else 0, last or 0]) > step


def begin_in_folder(run: Run, start: Start) -> list[str]:
    """Make the folder this run's: move what it does not go on with; lines about it.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    output_dir = run.session.output_dir
    if not start.moves:
        write_run_history(output_dir, start.history)
        return []
    after_step = run.progress.global_step if start.is_own else None
    line = move_earlier(output_dir, start.history, after_step, {} if start.is_own else start.reports)
    if run.progress.eval_losses:  # less than before, where the run goes back
        write_eval_history(run.session, run.progress.eval_losses)
    return [line] if line else []
