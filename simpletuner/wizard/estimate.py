"""Memory, time and disk on the review page, from `simpletuner plan`, while the screens stay quick.

A plan needs torch, which takes seconds to import and would hold the screens up even in a thread. So it is worked out in
a process of its own, which is reported the unsaved files and answers in lines of JSON: first without time, then with it
where steps can be measured. Nothing is fetched for it; of a model that is not here yet, `rough_lines` says what the
registry knows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.config.loading import LoadedRun
from simpletuner.config.options.data import DataOptions
from simpletuner.errors import SimpleTunerError, bytes_text
from simpletuner.families.registry import get_spec
from simpletuner.hardware import Hardware
from simpletuner.reporting.progress import duration_text
from simpletuner.text import count_text

if TYPE_CHECKING:
    from simpletuner.wizard.project import Project

# Of a card of the middle class in bfloat16, well below what makers promise; of a CPU of eight cores.
ASSUMED_OPERATIONS, ON_A_CPU = 50e12, 0.3e12
PROMPT_TOKENS = 100


@dataclass(frozen=True)
class Estimate:
    """What a run takes, or why that is not known.

    Args:
        memory: bytes of the device while training.
        disk: bytes that the run writes; `free_disk` where it writes.
        steps: optimizer steps.
        seconds: of training, and of encoding before it; None where they were not measured.
        why_no_time: then the reason; empty while it is still being measured.
        error: why there is no estimate at all; everything else is empty then.
    """

    memory: int = 0
    disk: int = 0
    free_disk: int = 0
    steps: int = 0
    seconds: tuple[float, float] | None = None
    why_no_time: str = ""
    error: str = ""


def estimate_lines(found: Estimate, hardware: Hardware) -> list[tuple[str, bool]]:
    """(line, whether all is well) for the review page."""
    memory = f"memory  {bytes_text(found.memory)} of {bytes_text(hardware.device_bytes)}"
    disk = f"disk    {bytes_text(found.disk)}, {bytes_text(found.free_disk)} free"
    lines = [(memory, found.memory < hardware.device_bytes), (disk, found.disk < found.free_disk)]
    steps = f"time    {count_text(found.steps, 'step')}"
    if found.seconds is None:
        return [*lines, (f"{steps}; {found.why_no_time or 'measuring a few of them ...'}", True)]
    training, encoding = found.seconds
    each = f"{training / max(found.steps, 1):.3g} s each"
    return [*lines, (f"{steps}, {each}: {duration_text(training)}; encoding: {duration_text(encoding)}", True)]


def rough_lines(run: LoadedRun, hardware: Hardware) -> list[tuple[str, bool]]:
    """(line, whether all is well) of a model that is not on this machine: its weights, the arithmetic of a step."""
    config, spec = run.config, get_spec(run.config.model.model_family)
    flavour = spec.flavours[config.model.model_flavour or spec.default_flavour]
    if config.model.pretrained_model_name_or_path or not flavour.parameters:
        return []
    bits = _bits_of(config.precision.base_model_precision, config.precision.mixed_precision)
    weights, room = flavour.weight_bytes(bits), hardware.device_bytes
    memory = f"memory  at least {bytes_text(weights)} for the weights of {spec.title}, of {bytes_text(room)}"
    disk = f"disk    about {bytes_text(flavour.weight_bytes())} are fetched from the hub at the first start"
    lines = [(memory, weights < room), (disk, True)]
    if config.training.max_train_steps:
        rate = ON_A_CPU if hardware.device == "cpu" else ASSUMED_OPERATIONS
        tokens = run_tokens(config.data, spec.size_multiple) + PROMPT_TOKENS
        # Forward, and backward through frozen weights; checkpointing runs forward once more.
        passes = 3 if config.model.gradient_checkpointing else 2
        images = (
            config.training.train_batch_size
            * config.training.gradient_accumulation_steps
            * config.training.max_train_steps
        )
        operations = 2.0 * flavour.parameters * tokens * passes * images
        duration = duration_text(operations / rate)
        lines.append((f"time    not measured; about {duration} at {rate / 1e12:g} trillion operations a second", True))
    return lines


def run_tokens(options: DataOptions, multiple: int) -> int:
    """Tokens of an image at the resolution of `config.json`."""
    area = options.resolution * 1e6 if options.resolution_type == "area" else options.resolution**2
    return round(area / multiple**2)


def _bits_of(base_precision: str, mixed_precision: str) -> int:
    """Bits of a frozen weight; formats name them (`int8-quanto`, `nf4-bnb`)."""
    digits = "".join(letter for letter in base_precision.partition("-")[0] if letter.isdigit())
    return int(digits) if digits else 32 if mixed_precision == "no" else 16


# ---- the process ---------------------------------------------------------------------------------------------------


class Estimating:
    """The other process. It imports torch at once and then waits: started before the review, it answers there in a
    second or two. `ask` gives it the run; iterating gives what it says, as it says it; `stop` ends it.

    Args:
        working_dir: of the run.
    """

    def __init__(self, working_dir: Path):
        self._asked: dict[str, Any] = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "simpletuner.wizard.estimate"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=working_dir,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, project: Project, texts: Mapping[Path, str], other_gpu: int | None) -> None:
        """Say which run is meant.

        Args:
            texts: of files that are not saved.
            other_gpu: bytes of the GPU of another machine, where the run is to train.
        """
        places = project.places
        self._asked = {
            "config": str(places.config),
            "working_dir": str(places.working_dir),
            "unsaved": {str(path): text for path, text in {**project.texts, **texts}.items()},
            "other_gpu": other_gpu,
        }

    def __iter__(self) -> Iterator[Estimate]:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with process, suppress(BrokenPipeError):  # it was stopped before it was asked
            with process.stdin:
                json.dump(self._asked, process.stdin)
            for line in process.stdout:
                if line.startswith("{"):
                    yield Estimate(**json.loads(line))

    def stop(self) -> None:
        self._process.kill()


def main() -> None:
    """The other process: a run on stdin, estimates on stdout."""
    import simpletuner.commands.plan  # noqa: F401 - what takes long is imported before anybody asks

    asked = json.load(sys.stdin)
    try:
        run = _load(asked)
        for probe in (False, None):
            print(json.dumps(asdict(_estimate(run, probe, asked["other_gpu"]))), flush=True)
    except SimpleTunerError as error:
        print(json.dumps(asdict(Estimate(error=error.problems[0].message))), flush=True)


def _load(asked: Mapping[str, Any]) -> LoadedRun:
    from simpletuner.config.discovery import ConfigSource
    from simpletuner.config.loading import load_source

    unsaved = {Path(path): text for path, text in asked["unsaved"].items()}
    source = ConfigSource(Path(asked["config"]), "json")
    return load_source(source, (), {}, Path(asked["working_dir"]), unsaved=unsaved, variables=os.environ)


def _estimate(run: LoadedRun, probe: bool | None, other_gpu: int | None) -> Estimate:
    from simpletuner.commands.plan import make_plan

    found = make_plan(run, probe, other_gpu)
    reasons = [note.partition(": ")[2] for note in found.notes if note.startswith("time was not measured")]
    why_no_time = f"not measured: {reasons[0]}" if probe is None and reasons else ""
    return Estimate(found.memory_bytes, found.disk_bytes, found.free_disk, found.steps, found.seconds, why_no_time)


if __name__ == "__main__":
    main()
