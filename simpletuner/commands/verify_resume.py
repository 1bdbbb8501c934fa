"""`simpletuner verify-resume`: proves on one's own configuration and machine that a killed run ends with the same bits.

The same few steps are trained twice from a copy of the output folder, with all processes, evaluations and images of the
run: once undisturbed, once killed (SIGKILL) at several points of a step and of what follows a step (the save, the
evaluation, the images), and started again each time. Then every tensor, image, loss and evaluation is compared. Where
they differ, a second undisturbed run shows whether this machine gives equal results at all: some kernels of
accelerators do not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import storage
from simpletuner.commands.run_differences import Difference, compare_runs
from simpletuner.commands.text import Say
from simpletuner.config.loading import LoadedRun
from simpletuner.config.webhooks import Webhooks
from simpletuner.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from simpletuner.training.run import Run


# Checkpoints fall on each second step.
INTERVAL = 2
LAST_LINES = 12
# Of the operations on files until a checkpoint has its name: the first, some in between, the last. One more kill comes
# at the end of the evaluation and images, after which the step is not taken again.
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
POINTS = ("in a micro-batch", "before the update", "after the update")


@dataclass(frozen=True)
class Death:
    """Where a run kills itself.

    Args:
        step: after which step.
        point: of `POINTS`, in the next step; None at an operation on files.
        operation: which of those that follow the step, from 1.
    """

    step: int
    point: str | None = None
    operation: int = 0

    def __str__(self) -> str:
        if self.point:
            return f"step {self.step + 1}: {self.point}"
        return f"after step {self.step}: file operation {self.operation} of its checkpoint, evaluation and images"


@dataclass(frozen=True)
class Job:
    """What a process of the proof is given.

    Args:
        arguments: of the command line, from which it loads the same configuration.
        output_dir: a folder of its own.
        last_step: where it ends.
        counts: gets the numbers of file operations after each step, until its checkpoint has its name and in all.
        death: where it kills itself.
    """

    arguments: Sequence[str]
    output_dir: str
    last_step: int
    counts: str
    death: Death | None = None

    @classmethod
    def read(cls, path: Path) -> Job:
        raw = storage.read_json(path)
        death = Death(**raw.pop("death")) if raw["death"] else raw.pop("death")
        return cls(**raw, death=death)


def verify_resume(loaded: LoadedRun, arguments: Sequence[str], steps: int, say: Say) -> bool:
    """Whether a killed and resumed run ends like an undisturbed one.

    Args:
        arguments: of the command line, from which the processes load the same configuration again.
        steps: that are trained, from the newest checkpoint of the run if it has one.

    Raises:
        ConfigError: the configuration trains on several machines.
        DataError: a run failed by itself.
    """
    if loaded.config.processes.num_machines > 1:
        message = "this command tests runs on one machine"
        raise ConfigError(Problem(message, key="num_machines", fix="add --num_machines=1"))
    output_dir = Path(loaded.config.checkpoint.output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=output_dir.parent))
    try:
        return _Proof(loaded, tuple(arguments), steps, folder).run(say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Proof:
    """Runs of the proof in `folder`."""

    def __init__(self, loaded: LoadedRun, arguments: Sequence[str], steps: int, folder: Path):
        self.loaded = loaded
        self.arguments = arguments
        self.folder = folder
        self.steps = steps
        self.start_step = 0
        self.counts: dict[str, tuple[int, int]] = {}

    def run(self, say: Say) -> bool:
        straight = self.new_folder("straight")
        origin = f", from step {self.start_step}" if self.start_step else ""
        say(f"1. {self.steps} steps{origin}, undisturbed")
        self.train(straight)
        self.counts = storage.read_json(self.folder / "counts.json")
        deaths = self.deaths()
        say(f"2. the same steps, killed {len(deaths)} times and resumed")
        killed = self.new_folder("killed")
        for death in deaths:
            self.train(killed, death)
            say(f"   killed at: {death}")
        self.train(killed)
        found = compare_runs(straight, killed, self.start_step)
        if not found.lines:
            say(f"equal, bit for bit: {found.counted()}")
            return True
        say("they differ, first in:")
        self.explain(found, straight, say)
        return False

    def explain(self, found: Difference, straight: Path, say: Say) -> None:
        for line in found.lines:
            say(f"  {line}")
        say(f"3. {self.steps} steps once more, uninterrupted, to see whether this machine is deterministic")
        again = self.new_folder("again")
        self.train(again)
        repeated = compare_runs(straight, again, self.start_step)
        for line in repeated.lines:
            say(f"  {line}")
        if repeated.lines:
            say("two uninterrupted runs differ as well: kernels of this machine are not reproducible, resumed or not")
        else:
            say("two uninterrupted runs are equal, so the resume is at fault: please report it with your configuration")

    def deaths(self) -> list[Death]:
        """The points of one step between checkpoints, then operations that follow the step of a checkpoint."""
        middle = (self.start_step // INTERVAL + 1) * INTERVAL  # the first checkpoint of the proof
        saved = middle + INTERVAL
        committed, last = self.counts[str(saved)]
        numbers = sorted({1 + round((committed - 1) * fraction) for fraction in FRACTIONS} | {last})
        return [
            *(Death(middle, point) for point in POINTS),
            *(Death(saved, operation=number) for number in numbers),
        ]

    def new_folder(self, name: str) -> Path:
        """A folder with what the run has so far: its newest checkpoint, by links, and its history."""
        from simpletuner.training.checkpoint import Checkpoints, checkpoint_step

        folder = self.folder / name
        folder.mkdir()
        source = Path(self.loaded.config.checkpoint.output_dir)
        newest = Checkpoints(source, None).newest() if self.loaded.config.checkpoint.resumes else None
        if newest is not None:
            self.start_step = checkpoint_step(newest)
            shutil.copytree(newest, folder / newest.name, copy_function=_link)
            for path in source.glob("*.json*"):
                shutil.copyfile(path, folder / path.name)
        return folder

    def train(self, output_dir: Path, death: Death | None = None) -> None:
        """Train in processes of their own, to the end or to a death.

        Raises:
            DataError: they failed by themselves, with their last lines; or they did not die.
        """
        last_step = self.start_step + self.steps
        job = Job(self.arguments, str(output_dir), last_step, str(self.folder / "counts.json"), death)
        file = self.folder / "job.json"
        storage.write_json(file, asdict(job))
        log = output_dir.with_suffix(".log")
        with log.open("ab") as out:
            command = [sys.executable, "-P", "-m", "simpletuner", "verify-resume", "--run", str(file)]
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False).returncode
        if death is not None and code in KILLED:
            return
        if code == 0 and death is None:
            return
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])
        if code == 0:
            raise DataError(Problem(f"the run was over before it was killed at: {death}:\n{lines}"))
        raise DataError(Problem(f"the run failed before it was killed (exit code {code}):\n{lines}"))


def _link(source: str, target: str) -> None:
    """Committed files are never changed in place, so a copy of a checkpoint takes no room."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ---- in the processes of the proof ---------------------------------------------------------------------------------


def prepared_run(file: Path, load: Callable[[Sequence[str]], LoadedRun]) -> LoadedRun:
    """The short run of a job, in a process that counts its operations and dies where the job says."""
    job = Job.read(file)
    if os.environ.get("RANK", "0") == "0":
        _Watch(job).begin()
    return shortened(load(job.arguments), Path(job.output_dir), job.last_step)


class _Watch:
    """Counts the operations on files that follow each step, and kills the process at one point."""

    def __init__(self, job: Job):
        self.job = job
        self.death = job.death
        self.step = 0
        self.counts: dict[int, tuple[int, int]] = {}

    def begin(self) -> None:
        """Stand before the functions of the loop and each operation on files."""
        from simpletuner.training import loop

        for point, name in zip(POINTS, ("backward_micro_batch", "update_weights", "report_step"), strict=True):
            setattr(loop, name, self._before(point, getattr(loop, name)))
        storage._step = self.operation

    def _before(self, point: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(run: Run, *arguments: Any, **keywords: Any) -> Any:
            is_reported = point == "after the update"
            if self.death and self.death.point == point and run.progress.global_step - is_reported == self.death.step:
                os.kill(os.getpid(), signal.SIGKILL)
            if is_reported:
                self.step = run.progress.global_step
                self.counts[self.step] = (0, 0)
            return call(run, *arguments, **keywords)

        return watched

    def operation(self, name: str) -> None:
        if self.step not in self.counts:
            return
        committed, number = self.counts[self.step]
        number += 1
        if not (Path(self.job.output_dir) / f"checkpoint-{self.step}").exists():
            committed = number
        self.counts[self.step] = (committed, number)
        death = self.death
        if death and not death.point and (self.step, number) == (death.step, death.operation):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.death is None:
            Path(self.job.counts).write_text(json.dumps(self.counts))


def shortened(loaded: LoadedRun, output_dir: Path, last_step: int) -> LoadedRun:
    """The run with everything that decides its weights, and what it shows at each second step; nothing leaves it."""
    config = loaded.config
    changes = {
        "output_dir": output_dir,
        "max_train_steps": last_step,
        "num_train_epochs": 0,
        "checkpoint_step_interval": INTERVAL,
        "checkpoint_epoch_interval": None,
        "checkpoints_total_limit": None,
        "resume_from_checkpoint": "latest",
        "report_to": ("none",),
        "push_to_hub": False,
        "push_checkpoints_to_hub": False,
        "webhook_config": None,
        "early_stopping_patience": None,
    }
    if config.evaluation.eval_steps_interval or config.evaluation.eval_epoch_interval:
        changes |= {"eval_steps_interval": INTERVAL, "eval_epoch_interval": None}
    if config.validation.validation_method == "external-script":  # the program may send what it makes
        changes["validation_disable"] = True
    elif not config.validation.validation_disable:
        changes |= {"validation_step_interval": INTERVAL, "validation_epoch_interval": None}
        changes |= {"validation_num_inference_steps": min(config.validation.validation_num_inference_steps, 2)}
    return replace(loaded, config=config.with_values(changes), webhooks=Webhooks())
