"""Runs that die and go on, in every combination of what trains, what moves it, and where it dies.

Each combination trains five steps straight through, and again with a SIGKILL; an epoch has three steps of two
micro-batches, and each step is saved. Where several processes train, the machine dies: all are killed.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from simpletuner.config.optimizers import OPTIMIZERS as KNOWN
from simpletuner.errors import EXIT_CONFIG
from simpletuner.reporting.sinks.jsonl import read_records
from tests.faults import forks
from tests.runs import dataset, weights_of, write_images, write_run

STEPS = 5
WHAT = ("lokr", "lora", "full")
OPTIMIZERS = ("adamw", "adamw_bf16", "bnb-adamw8bit", "prodigy", "adamw_schedulefree")
MOMENTS = ("step boundary", "inside accumulation", "epoch edge")
AVERAGES = (False, True)
PLACES = ("1 process", "2 processes", "FSDP2", "DeepSpeed")
DIMENSIONS: tuple[Sequence[Any], ...] = (WHAT, OPTIMIZERS, MOMENTS, AVERAGES, PLACES)


@dataclass(frozen=True)
class Combination:
    """One row of the matrix."""

    what: str
    optimizer: str
    moment: str
    average: bool
    place: str

    def __str__(self) -> str:
        return f"{self.what}, {self.optimizer}, {self.moment}, {'EMA' if self.average else 'no EMA'}, {self.place}"

    @property
    def refusal(self) -> str | None:
        """A word of the message with which this is refused; None where it trains."""
        row = KNOWN[self.optimizer]
        if self.average and row.averages:
            return "averages the weights itself"
        if self.place == "FSDP2" and self.what == "full" and not row.elementwise:
            return "looks at whole weights"
        if self.place == "DeepSpeed" and (row.averages or not row.elementwise):
            return "laid end to end"
        return None

    def options(self) -> dict[str, Any]:
        rate = 1.0 if self.optimizer == "prodigy" else 1e-3
        options = {"optimizer": self.optimizer, "learning_rate": rate, "use_ema": self.average}
        options |= {"lora": {"model_type": "lora", "lora_type": "standard", "lora_rank": 4}}.get(self.what, {})
        options |= {"full": {"model_type": "full"}}.get(self.what, {})
        if self.optimizer == "bnb-adamw8bit":
            options["optimizer_config"] = {"min_8bit_size": 256}  # or the tiny weights would keep a 32-bit state
        if self.optimizer == "adamw_schedulefree":
            options["lr_scheduler"] = "constant_with_warmup"
        if self.optimizer == "adamw_bf16":
            options["mixed_precision"] = "bf16"
        if self.place != "1 process":
            options |= {"num_processes": 2, "train_batch_size": 1}
        options |= {"FSDP2": {"fsdp_enable": True}, "DeepSpeed": {"deepspeed_config": "deepspeed.json"}}.get(
            self.place, {}
        )
        if self.place == "DeepSpeed":
            options["grad_clip_method"] = "norm"
        return options


def whole() -> list[Combination]:
    """All combinations."""
    return [Combination(*row) for row in itertools.product(*DIMENSIONS)]


def refused() -> list[Combination]:
    """Combinations that end with a message before anything is cached."""
    return [row for row in whole() if row.refusal is not None]


def pairwise() -> list[Combination]:
    """Few combinations in which each two values of different dimensions meet, where they are not refused."""
    possible = [row for row in whole() if row.refusal is None]
    missing = set().union(*(pairs(row) for row in possible))
    chosen = []
    while missing:
        best = max(possible, key=lambda row: len(pairs(row) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(row: Combination) -> set[tuple[tuple[str, Any], ...]]:
    """All pairs of values in a row, with their dimensions."""
    return set(itertools.combinations(vars(row).items(), 2))


def write(folder: Path, model: Path, row: Combination) -> Path:
    """The run of a combination; its images are beside the folder."""
    images = folder.parent / "twelve"
    if not images.exists():
        write_images(images, 12, seed=5)
    options = {
        "max_train_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "checkpoint_step_interval": 1,
        "checkpoints_total_limit": 2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    }
    write_run(folder, model, [dataset("p", instance_data_dir=str(images))], **(options | row.options()))
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": "auto"}))
    return folder


def train(folder: Path, row: Combination, dies: bool = False) -> list[int]:
    """Train in the processes of a combination; their exit codes.

    Args:
        dies: the machine dies at the moment of the combination.
    """
    before = _Death(row.moment) if dies else None
    if row.place == "1 process":
        return _wait([forks.start(folder, before=before)])
    with _reserved_port() as port:
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return _wait(
            [
                forks.start(folder, variables=variables, before=before if number == 0 else None)
                for number, variables in enumerate(ranks)
            ]
        )


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A port that no other program gets meanwhile: it is bound here, and the main process may bind it as well.

    Processes of a fork server inherit no socket, so the main process cannot take over one that listens.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _wait(processes: Sequence[BaseProcess]) -> list[int]:
    """Their exit codes; all are killed once one is, or when they take too long."""
    deadline = time.monotonic() + forks.SECONDS
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(0.05)
        if time.monotonic() > deadline or any(process.exitcode == -signal.SIGKILL for process in processes):
            for process in processes:
                process.kill()
                process.join()
    return [int(process.exitcode or 0) for process in processes]


@dataclass(frozen=True)
class _Death:
    """Makes the process kill itself at a moment of training."""

    moment: str

    def __call__(self) -> None:
        from simpletuner.training import loop

        step = {"step boundary": 2, "epoch edge": 3, "inside accumulation": 4}[self.moment]
        name = "backward_micro_batch" if self.moment == "inside accumulation" else "maybe_checkpoint"
        real = getattr(loop, name)

        def die(run: Any, *arguments: Any) -> Any:
            done = real(run, *arguments)
            if run.progress.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(loop, name, die)


def check(row: Combination, model: Path, folder: Path) -> list[str]:
    """What is wrong with a combination; it may leave caches in `folder` for the next one."""
    shutil.rmtree(folder / "run" / "output", ignore_errors=True)
    place = write(folder / "run", model, row)
    codes = train(place, row)
    if row.refusal is not None:
        is_refused = codes[0] == EXIT_CONFIG and row.refusal in forks.terminal(place)
        return [] if is_refused else [f"{row}: is not refused with {row.refusal!r}: {codes}"]
    if any(codes):
        return [f"{row}: ended with {codes}: {forks.terminal(place)[-400:]}"]
    expected, losses = _end(place)
    shutil.rmtree(place / "output")
    died = train(place, row, dies=True)
    if died[0] != -signal.SIGKILL:
        return [f"{row}: did not die: {died}: {forks.terminal(place)[-400:]}"]
    again = train(place, row)
    if any(again):
        return [f"{row}: the next start ended with {again}: {forks.terminal(place)[-400:]}"]
    found, losses_found = _end(place)
    return [f"{row}: {line}" for line in _unequal(expected, found, losses, losses_found)]


def _end(place: Path) -> tuple[dict[str, bytes], list[tuple[int, float]]]:
    records = read_records(place / "output" / "metrics.jsonl")
    losses = [(record["step"], record["loss"]) for record in records if record["event"] == "step_done"]
    return weights_of(place / "output"), losses


def _unequal(
    expected: dict[str, bytes],
    found: dict[str, bytes],
    losses: list[tuple[int, float]],
    losses_found: list[tuple[int, float]],
) -> Iterator[str]:
    if len(losses) != STEPS or losses_found != losses:
        yield f"losses {losses} and {losses_found}"
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"{name} differs"


def main() -> None:
    """All combinations, one line each; the exit code is 1 where one is wrong. `python -m tests.faults.matrix [WORD]`"""
    from tests.memory_folder import memory_folder
    from tests.tiny import tiny_omnigen_folder

    with tempfile.TemporaryDirectory(dir=memory_folder()) as folder:
        model = tiny_omnigen_folder(Path(folder) / "model")
        words = sys.argv[1:]
        rows = (
            pairwise() if words == ["pairwise"] else [row for row in whole() if all(word in str(row) for word in words)]
        )
        wrong = 0
        for row in rows:
            found = check(row, model, Path(folder))
            wrong += bool(found)
            print(f"{'refused' if row.refusal else 'equal'}: {row}" if not found else "\n".join(found), flush=True)
        print(f"{len(rows)} combinations, {sum(row.refusal is not None for row in rows)} refused, {wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
