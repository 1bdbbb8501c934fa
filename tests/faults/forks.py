"""The real command in forked processes: torch is imported once, so that a start or a kill costs milliseconds.

`disk.c` is loaded into each of them. It counts the operations that change files of the run, and can kill the process
or refuse at one of them.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import simpletuner

HERE = Path(__file__).parent
SECONDS = 120
HUNG = -1000
_LEFT_OVER = re.compile(r"\.(?:tmp|trash|aside)-[\w.-]+?(?=/|$)|\.tmp\w{6}(?=$)")


@dataclass(frozen=True)
class Fault:
    """What happens at one operation.

    Args:
        at: number of the operation, from 1.
        error: errno; 0 kills the process.
        persists: all later operations fail too.
    """

    at: int
    error: int = 0
    persists: bool = False


@dataclass(frozen=True)
class Operation:
    """An operation that changed a file.

    Args:
        call: `write`, `rename`, ...
        path: relative to the folder of the run.
        where: `file:line` of the innermost calls in the package, innermost first.
    """

    number: int
    call: str
    path: str
    where: tuple[str, ...]

    @property
    def site(self) -> tuple[str, ...]:
        """What is the same for another step, another image, another temporary name."""
        kind = re.sub(r"\d+", "#", _LEFT_OVER.sub("TMP", self.path))
        return (self.call, kind, *self.where)


@cache
def library() -> Path:
    """`disk.c`, compiled."""
    built = Path(tempfile.mkdtemp(prefix="faults-")) / "disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, HERE / "disk.c", "-ldl"], check=True)
    return built


@cache
def server() -> multiprocessing.context.ForkServerContext:
    """Forks processes in which torch is imported and `disk.c` is loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm"])
    set_for_it = {"LD_PRELOAD": str(library()), "PYTHONPATH": str(HERE.parent.parent)}
    before = {name: os.environ.get(name) for name in set_for_it}
    os.environ.update(set_for_it)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def start(
    folder: Path,
    arguments: Sequence[str] = ("train",),
    fault: Fault | None = None,
    record: Path | None = None,
    variables: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> multiprocessing.process.BaseProcess:
    """`simpletuner ARGUMENTS` in `folder`; what it prints goes to a file beside the folder.

    Args:
        record: gets one line of JSON for each operation.
        variables: of the environment, on top of this process's.
        before: called in the process first.
    """
    words = (folder, list(arguments), fault, record, dict(variables or {}), before)
    process = server().Process(target=_command, args=words)
    process.start()
    return process


def run(folder: Path, fault: Fault | None = None, record: Path | None = None) -> int:
    """Train in `folder` to the end; the exit code, minus the signal, or `HUNG`."""
    process = start(folder, fault=fault, record=record)
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return HUNG
    assert process.exitcode is not None
    return process.exitcode


def terminal(folder: Path) -> str:
    """What the last command of `folder` printed."""
    return _terminal_file(folder).read_text(errors="replace")


def operations(record: Path) -> list[Operation]:
    """What a recorded run did, in order."""
    rows = (json.loads(line) for line in record.read_text().splitlines())
    return [Operation(number, call, path, tuple(where)) for number, call, path, where in rows]


def _terminal_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".terminal")


def _command(
    folder: Path,
    arguments: list[str],
    fault: Fault | None,
    record: Path | None,
    variables: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    # Python says nothing where what it should import in advance cannot be imported.
    assert "tests.faults.warm" in sys.modules, "torch was not imported in advance"
    if before is not None:
        before()
    mode = os.O_TRUNC if variables.get("RANK", "0") == "0" else os.O_APPEND
    descriptor = os.open(_terminal_file(folder), os.O_WRONLY | os.O_CREAT | mode, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    for name in ("LD_PRELOAD", "PYTHONPATH"):
        os.environ.pop(name, None)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()} | variables)
    sys.argv = ["simpletuner", *arguments]
    disk = ctypes.CDLL(None)
    observer = _observer(folder, record) if record is not None else None
    if fault is not None or observer is not None:
        at, error, persists = (fault.at, fault.error, fault.persists) if fault is not None else (0, 0, False)
        disk.fault_arm(f"{folder}/".encode(), at, error, int(persists), observer)
    from simpletuner.cli import main

    main()


_Observer = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)


def _observer(folder: Path, record: Path) -> ctypes._CFunctionType:
    package = f"{Path(simpletuner.__file__).parent}/"
    out = record.open("w", buffering=1)

    def note(number: int, call: bytes, path: bytes) -> None:
        where = []
        frame = sys._getframe()
        while frame is not None and len(where) < 4:
            name = frame.f_code.co_filename
            if name.startswith(package):
                where.append(f"{name.removeprefix(package)}:{frame.f_lineno}")
            frame = frame.f_back
        inside = path.decode(errors="replace").removeprefix(f"{folder}/")
        out.write(json.dumps([number, call.decode(), inside, where]) + "\n")

    return _Observer(note)
