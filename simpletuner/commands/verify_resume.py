"""`simpletuner verify-resume`: proves on one's own configuration and machine that a killed run ends with the same bits.

The same few steps are trained twice, in processes of their own: once undisturbed, once killed (SIGKILL) between two
checkpoints and started again. Every tensor of the last checkpoints and every loss is compared. Where they differ, a
second undisturbed run tells whether this machine gives equal results at all: some kernels of accelerators do not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.config.loading import LoadedRun
from simpletuner.config.webhooks import Webhooks
from simpletuner.errors import ConfigError, DataError, Problem, SimpleTunerError
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records

Say = Callable[[str], None]

# Checkpoints fall on a third and two thirds of the steps, and the kill between them.
FEWEST_STEPS = 6
LAST_LINES = 12
_CHILD = "from simpletuner.commands.verify_resume import train_in_child; train_in_child()"


@dataclass(frozen=True)
class Difference:
    """How two runs differ: lines for people, empty where every bit is equal; and what was compared."""

    lines: tuple[str, ...]
    num_files: int
    num_losses: int


def verify_resume(loaded: LoadedRun, arguments: Sequence[str], steps: int, say: Say) -> bool:
    """Whether a killed and resumed run ends like an undisturbed one.

    Args:
        arguments: of the command line, from which the processes load the same configuration again.
        steps: that are trained.

    Raises:
        ConfigError: the configuration trains in several processes.
        DataError: a run failed by itself.
    """
    if loaded.config.num_processes and loaded.config.num_processes > 1:
        message = "this command proves runs of one process"
        raise ConfigError(Problem(message, key="num_processes", fix="add --num_processes=1"))
    parent = Path(loaded.config.output_dir).parent
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="verify-resume-", dir=parent))
    try:
        return _verify(arguments, steps, folder, say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(arguments: Sequence[str], steps: int, folder: Path, say: Say) -> bool:
    say(f"1. {steps} steps, undisturbed")
    straight = _run(arguments, steps, folder / "straight")
    say("2. the same steps, killed between two checkpoints and started again")
    killed = folder / "killed"
    died_at, resumed_at = _run_and_kill(arguments, steps, killed)
    say(f"   killed after step {died_at}, went on after step {resumed_at}")
    found = compare_runs(straight, killed, steps)
    if not found.lines:
        say(f"equal, bit for bit: {found.num_files} files of checkpoint-{steps}, {found.num_losses} losses")
        return True
    say("they differ:")
    for line in found.lines:
        say(f"  {line}")
    say(f"3. {steps} steps once more, undisturbed, to see whether this machine gives equal results at all")
    again = compare_runs(straight, _run(arguments, steps, folder / "again"), steps)
    for line in again.lines:
        say(f"  {line}")
    if again.lines:
        say("two undisturbed runs differ as well: kernels of this machine are not reproducible, resumed or not")
    else:
        say("two undisturbed runs are equal, so the resume is at fault: please report it with your configuration")
    return False


def compare_runs(one: Path, other: Path, steps: int) -> Difference:
    """Compare the checkpoints of the last step, tensor by tensor, and the losses of all steps."""
    lines: list[str] = []
    folders = [run / f"checkpoint-{steps}" for run in (one, other)]
    names = [{path.relative_to(each).as_posix() for path in each.rglob("*.safetensors")} for each in folders]
    lines += [f"{name} is only in one of them" for name in sorted(names[0] ^ names[1])]
    common = sorted(names[0] & names[1])
    for name in common:
        if (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes():
            lines += tensor_differences(name, folders[0] / name, folders[1] / name)
    losses = [
        {
            record["step"]: record["loss"]
            for record in read_records(run / METRICS_FILE)
            if record["event"] == "step_done"
        }
        for run in (one, other)
    ]
    unequal = [step for step in sorted(losses[0].keys() | losses[1]) if losses[0].get(step) != losses[1].get(step)]
    if unequal:
        lines.append(f"the loss of step {unequal[0]} and of {len(unequal) - 1} others")
    return Difference(tuple(lines), len(common), len(losses[0]))


def losses_of(output_dir: Path) -> dict[int, float]:
    """Step -> loss, as a run has recorded them."""
    records = read_records(output_dir / METRICS_FILE)
    return {record["step"]: record["loss"] for record in records if record["event"] == "step_done"}


def tensor_differences(name: str, one: Path, other: Path) -> Iterator[str]:
    """What differs in two files of tensors: how many, and by how much at most."""
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    unequal = [key for key in first.keys() & second.keys() if not first[key].equal(second[key])]
    if first.keys() != second.keys():
        yield f"{name}: other tensors"
    if unequal:
        largest = max(
            float((first[key].double() - second[key].double()).abs().max())
            for key in unequal
            if first[key].shape == second[key].shape
        )
        yield f"{name}: {len(unequal)} of {len(first)} tensors, by {largest:.3g} at most"
    elif first.keys() == second.keys():
        yield f"{name}: the header only; all tensors are equal"


def _run(arguments: Sequence[str], steps: int, output_dir: Path) -> Path:
    """Train to the end in a process of its own.

    Raises:
        DataError: it failed; with its last lines.
    """
    process = _start(arguments, steps, output_dir)
    if process.wait():
        raise _failed(output_dir, process.returncode)
    return output_dir


def _run_and_kill(arguments: Sequence[str], steps: int, output_dir: Path) -> tuple[int, int]:
    """Kill a run between two checkpoints, then let it end; (last step before the kill, step that it went on from).

    Raises:
        DataError: it failed, or was over before it could be killed.
    """
    wanted = _interval(steps) + 1
    process = _start(arguments, steps, output_dir)
    while process.poll() is None and _last_step(output_dir) < wanted:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    died_at = _last_step(output_dir)
    if process.returncode != -signal.SIGKILL:
        if process.returncode:
            raise _failed(output_dir, process.returncode)
        raise DataError(Problem("the run was over before it could be killed", fix="give more --steps"))
    _run(arguments, steps, output_dir)
    starts = [record["start_step"] for record in read_records(output_dir / METRICS_FILE) if "start_step" in record]
    if not starts or not 0 < starts[-1] < steps:
        raise DataError(Problem("the kill did not come between two checkpoints", fix="give more --steps"))
    return died_at, starts[-1]


def _interval(steps: int) -> int:
    return max(steps // 3, 1)


def _last_step(output_dir: Path) -> int:
    records = read_records(output_dir / METRICS_FILE)
    return max((record["step"] for record in records if record["event"] == "step_done"), default=0)


def _start(arguments: Sequence[str], steps: int, output_dir: Path) -> subprocess.Popen[bytes]:
    output_dir.mkdir(exist_ok=True)
    job = json.dumps({"arguments": list(arguments), "steps": steps, "output_dir": str(output_dir)})
    with (output_dir / "terminal.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-P", "-c", _CHILD, job], stdout=log, stderr=subprocess.STDOUT)


def _failed(output_dir: Path, code: int) -> DataError:
    lines = (output_dir / "terminal.log").read_text(errors="replace").splitlines()[-LAST_LINES:]
    return DataError(Problem(f"the run failed by itself (exit code {code}):\n" + "\n".join(lines)))


def train_in_child() -> None:
    """A run of the proof: that of the command line, but short, in its own folder, and told to nobody."""
    from simpletuner.launch import load_arguments
    from simpletuner.training.trainer import train

    job = json.loads(sys.argv[1])
    try:
        loaded = load_arguments(job["arguments"], os.environ, Path.cwd(), print)
        train(shortened(loaded, Path(job["output_dir"]), job["steps"]))
    except SimpleTunerError as error:
        print(error.render())
        sys.exit(error.exit_code)


def shortened(loaded: LoadedRun, output_dir: Path, steps: int) -> LoadedRun:
    """The run with everything that decides its weights, and nothing that shows them."""
    changes = {
        "output_dir": output_dir,
        "max_train_steps": steps,
        "num_train_epochs": 0,
        "checkpoint_step_interval": _interval(steps),
        "checkpoint_epoch_interval": None,
        "checkpoints_total_limit": None,
        "resume_from_checkpoint": "latest",
        "validation_disable": True,
        "eval_loss_disable": True,
        "report_to": ("none",),
        "push_to_hub": False,
        "push_checkpoints_to_hub": False,
        "webhook_config": None,
    }
    return replace(loaded, config=loaded.config.model_copy(update=changes), webhooks=Webhooks())
