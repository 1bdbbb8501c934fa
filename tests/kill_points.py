"""Kills a process at every I/O operation of the commit protocol, and looks at what is left.

Run as a program: it imports what is needed once and forks a child for every operation, so a kill costs milliseconds.
It must not use tensors itself: torch hangs when it is forked after a tensor operation with several threads. Prints one
JSON object: the number of kill points and everything that was found wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from simpletuner import storage, tempnames
from simpletuner.cache.store import TensorStore

NUM_ENTRIES = 3


def write_checkpoint(folder: Path, step: int) -> None:
    with storage.commit_dir(folder / f"checkpoint-{step}", {"global_step": step}) as temporary:
        storage.save_tensors(temporary / "adapter.safetensors", {"weight": torch.full((64,), float(step))}, {"a": "1"})
        storage.write_json(temporary / "state.json", {"global_step": step})
        (temporary / "logs").mkdir()
        (temporary / "logs" / "note.txt").write_text("x")


def save_and_rotate(folder: Path) -> None:
    """What a run does: save, point out the best, remove the oldest, save the same step again with other content."""
    write_checkpoint(folder, 2)
    storage.write_json(folder / "best.json", {"best": 2})
    storage.remove_dir(folder / "checkpoint-1")
    with storage.commit_dir(folder / "checkpoint-2", {"global_step": 2}) as temporary:
        storage.write_json(temporary / "state.json", {"global_step": 2, "again": True})


def begin_checkpoints(folder: Path) -> None:
    write_checkpoint(folder, 1)
    storage.write_json(folder / "best.json", {"best": 1})


def check_checkpoints(folder: Path) -> list[str]:
    """What a restart would trip over."""
    tempnames.clean_stale(folder)
    problems = [f"left over: {path.name}" for path in folder.iterdir() if path.name.startswith(".")]
    found = sorted(folder.glob("checkpoint-*"))
    problems += [problem for path in found for problem in storage.verify_dir(path)]
    if not found:
        problems.append("no checkpoint is left")
    if storage.read_json(folder / "best.json") not in ({"best": 1}, {"best": 2}):
        problems.append("best.json is neither the old nor the new one")
    return problems


def entries(prefix: str) -> dict[str, dict[str, torch.Tensor]]:
    return {f"{prefix}{i}": {"mean": torch.full((8,), float(i))} for i in range(NUM_ENTRIES)}


def begin_store(folder: Path) -> None:
    with TensorStore(folder / "store") as store:
        store.put_many(entries("old"))
        store.put_many({**entries("kept"), **entries("dropped")})


def fill_and_prune(folder: Path) -> None:
    with TensorStore(folder / "store") as store:
        store.put_many(entries("new"))
        store.prune([*entries("old"), *entries("kept"), *entries("new")])


def check_store(folder: Path) -> list[str]:
    """Runs in a child, since it reads tensors."""
    problems = []
    with TensorStore(folder / "store") as store:
        problems += [f"damaged: {key}" for key in store.verify()]
        for key, tensors in {**entries("old"), **entries("kept")}.items():
            if key not in store:
                problems.append(f"lost: {key}")
            elif not torch.equal(store.get(key)["mean"], tensors["mean"]):
                problems.append(f"changed: {key}")
        if len(store.missing(entries("new"))) not in (0, NUM_ENTRIES):
            problems.append("half of a shard is visible")
        store.put_many(entries("new"))
        if store.missing(entries("new")):
            problems.append("cannot be filled up")
    if (folder / "store" / "quarantine").exists():
        problems.append("something was moved to quarantine")
    problems += [f"left over: {path.name}" for path in (folder / "store").glob(".*")]
    return problems


def kill_at(operation: int) -> None:
    """Kill this process at its `operation`-th I/O operation, 1-based; tensors half written count as one more."""
    count = 0
    real_save = safetensors.torch.save_file

    def step(name: str) -> None:
        nonlocal count
        count += 1
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        nonlocal count
        real_save(tensors, path, metadata)
        count += 1
        if count == operation:
            os.truncate(path, Path(path).stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    storage._step = step
    storage._CHUNK_BYTES = 50
    safetensors.torch.save_file = save_file


def in_child(work: Callable[[], object]) -> tuple[int, str]:
    """(exit status or minus the signal, what it printed) of `work` in a fork."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        status = 1
        try:
            os.write(write_end, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        printed = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), printed


def enumerate_kills(begin: Callable, work: Callable, check: Callable, folder: Path) -> dict:
    """Kill `work` at its first operation, its second, ... until it ends untouched; `check` after each."""
    status, _ = in_child(lambda: begin(folder / "start"))
    assert status == 0, "the start could not be made"
    operation, wrong = 0, []
    while True:
        operation += 1
        place = folder / f"kill-{operation}"
        shutil.copytree(folder / "start", place)

        def killed(place: Path = place, operation: int = operation) -> None:
            kill_at(operation)
            work(place)

        status, _ = in_child(killed)
        checked, printed = in_child(lambda place=place: check(place))
        problems = json.loads(printed) if checked == 0 else [f"the check ended with {checked}"]
        wrong += [f"kill {operation}: {problem}" for problem in problems]
        shutil.rmtree(place)
        if status != -signal.SIGKILL:
            if status != 0:
                wrong.append(f"run {operation} ended with {status}")
            return {"num_kills": operation - 1, "wrong": wrong}


SCENARIOS = {
    "checkpoints": (begin_checkpoints, save_and_rotate, check_checkpoints),
    "store": (begin_store, fill_and_prune, check_store),
}

if __name__ == "__main__":
    scenario, place = sys.argv[1:]
    root = Path(place)
    (root / "start").mkdir(parents=True)
    print(json.dumps(enumerate_kills(*SCENARIOS[scenario], root)))
