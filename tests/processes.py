"""Several real processes of one run, for tests: forked, so that none has to import torch again."""

from __future__ import annotations

import json
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed.fsdp  # imported once, here, and not in each process

from simpletuner.distributed.launcher import listen
from simpletuner.distributed.lifeline import LISTENER
from simpletuner.distributed.process_group import ProcessGroup, joined

SECONDS = 240  # for one that hangs: on a machine with other work a start alone can take many


def in_processes(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns (as JSON holds it) in each of `size` processes that have joined as one run, by rank.

    Raises:
        AssertionError: one of them failed; its traceback is the message.
    """
    with TemporaryDirectory() as folder, listen() as listener:
        ranks = variables_of(size, listener)
        children = [_fork(Path(folder) / str(rank), variables, work) for rank, variables in enumerate(ranks)]
        listener.close()
        for child in children:
            os.waitpid(child, 0)
        answers = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(size)]
    failures = [answer["error"] for answer in answers if "error" in answer]
    assert not failures, "\n".join(failures)
    return [answer["value"] for answer in answers]


def variables_of(size: int, listener: socket.socket) -> list[dict[str, str]]:
    """The environment of each process of a run; the main one takes over the socket."""
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    main = {LISTENER: str(listener.fileno())}
    return [common | {"RANK": str(rank)} | (main if rank == 0 else {}) for rank in range(size)]


def _fork(answer: Path, variables: dict[str, str], work: Callable[[ProcessGroup], Any]) -> int:
    child = os.fork()
    if child:
        return child
    answer.write_text('{"error": "it ended without a word, or hung"}')
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    # OpenMP's threads do not come along, and a computation that is divided among them would wait for them for ever.
    torch.set_num_threads(1)
    code = 1
    try:
        os.environ.update(variables)
        with joined(os.environ) as process_group:
            answer.write_text(json.dumps({"value": work(process_group)}))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent raises it
        answer.write_text(json.dumps({"error": traceback.format_exc()}))
    finally:
        os._exit(code)
