"""The processes of a run, seen from one of them.

Gradients go over the accelerators' own links (NCCL), everything else over gloo on the CPU: the few numbers of a
step then need no wait for the device, and a process that encodes images for an hour cannot run into NCCL's time
limit. Messages are JSON and plain numbers, never a pickle. A single process is a group of one, in which nothing is
sent and torch's distributed package is never started.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from simpletuner.distributed.heartbeat import Heartbeat, store_of_run, wait_for
from simpletuner.distributed.lifeline import LISTENER
from simpletuner.errors import ConfigError, Problem, SimpleTunerError

Item = TypeVar("Item")

# A process may encode a whole cache while the others wait. One that dies is noticed by its closed connections and by
# whoever started it, not by this limit.
PATIENCE = timedelta(days=2)
# NCCL's kernels turn on the GPUs while they wait, and one that hangs hangs for ever: nothing of ours takes so long.
LINK_PATIENCE = timedelta(minutes=30)
BUCKET_BYTES = 64 * 2**20


@dataclass(frozen=True)
class ProcessGroup:
    """Which process this is, and of how many.

    Args:
        rank: 0 is the main process: it alone writes.
        size: processes of all machines together.
        local_rank: place among those of this machine; chooses the accelerator.
        heartbeat: tells whether the others live; None in a world of one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    heartbeat: Heartbeat | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def key(self) -> tuple[int, ...]:
        """What tells the draws of this process from those of the others; nothing where it is alone."""
        return () if self.size == 1 else (self.rank,)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every `size`-th item: this process's part of work that can be divided in any way."""
        return items[self.rank :: self.size]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number, summed over all processes in float64; the same bits everywhere."""
        if self.size == 1:
            return [float(value) for value in values]
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64)
        with _connected():
            self._wait(dist.all_reduce(total, async_op=True))
        return total.tolist()

    def _wait(self, work: Any) -> None:
        """Wait for a collective on the CPU, and name in messages which function of the caller does."""
        if self.heartbeat is None:
            work.wait()
            return
        frame = sys._getframe(2)
        while frame.f_back is not None and not _is_of_a_caller(frame.f_globals["__name__"]):
            frame = frame.f_back
        wait_for(work, self.heartbeat, frame.f_code.co_name)

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, in the order of ranks, for all of them.

        Args:
            value: what JSON can hold.
        """
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with _connected():
            self._wait(dist.all_gather(lengths, torch.tensor([len(content)]), async_op=True))
        longest = max(int(length) for length in lengths)
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        with _connected():
            padded = torch.cat([content, torch.zeros(longest - len(content), dtype=torch.uint8)])
            self._wait(dist.all_gather(rows, padded, async_op=True))
        return [json.loads(bytes(row[: int(length)].tolist())) for row, length in zip(rows, lengths, strict=True)]

    def from_main(self, value: Any) -> Any:
        """What the main process gave; what JSON can hold."""
        return self.gather(value)[0]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does the block alone, then the others do: what it wrote is there for them to read."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    @contextmanager
    def in_turns(self) -> Iterator[None]:
        """The processes of a machine do the block one after the other."""
        for turn in range(max(self.gather(self.local_rank)) + 1):
            if turn == self.local_rank:
                yield
            self.barrier()

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of all processes, in float32; one that a process does not have counts as zeros there.

        Not torch's DistributedDataParallel: it wraps the network, so that families could no longer ask it for its
        attributes, refuses parameters that a step left out, and averages where this trainer divides by the weight of
        the whole window. What is lost is the overlap with the backward pass; an adapter's gradients are small.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for bucket in _buckets(list(parameters)):
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
            flat = torch.cat([grad.reshape(-1).float() for grad in grads])
            with _connected():
                if flat.device.type == "cpu":
                    self._wait(dist.all_reduce(flat, async_op=True))
                else:
                    dist.all_reduce(flat)
            pieces = flat.split([grad.numel() for grad in grads])
            torch._foreach_copy_(grads, [piece.view_as(grad) for piece, grad in zip(pieces, grads, strict=True)])


SINGLE_PROCESS = ProcessGroup()


class ConnectionLost(SimpleTunerError):
    """Another process of the run has ended; its own message says why."""


@contextmanager
def _connected() -> Iterator[None]:
    """Tell a connection that broke as what it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # says what it is, and of this process
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        message = f"another process of this run has ended, and reports the reason itself; here it looks like: {reason}"
        raise ConnectionLost(message) from error


def _is_of_a_caller(module: str) -> bool:
    """Whether a function of this module, not ours and not one that torch puts around it, is worth naming."""
    return module != __name__ and not module.startswith("torch.") and module != "contextlib"


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of parameters of at most `BUCKET_BYTES` in float32 together, or one larger parameter alone."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() * 4 > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * 4
    if bucket:
        yield bucket


def process_group_of(environment: Mapping[str, str]) -> ProcessGroup:
    """What `RANK`, `WORLD_SIZE` and `LOCAL_RANK` say: our launcher sets them, and so does torchrun.

    Raises:
        ConfigError: they contradict each other.
    """
    size = int(environment.get("WORLD_SIZE") or 1)
    rank = int(environment.get("RANK") or 0)
    if not 0 <= rank < size:
        raise ConfigError(
            Problem(
                f"RANK is {rank} and WORLD_SIZE is {size}",
                key="RANK",
                allowed=f"0 to {size - 1}",
                fix="let `simpletuner train` or torchrun set both, or unset both",
            )
        )
    return ProcessGroup(rank, size, int(environment.get("LOCAL_RANK") or 0))


@contextmanager
def joined(environment: Mapping[str, str], timeout_minutes: float = 10.0) -> Iterator[ProcessGroup]:
    """Join the processes of this run, and leave them afterwards.

    Args:
        timeout_minutes: without a sign of another process, after which it is given up.

    Raises:
        ConfigError: this machine has no accelerator for this process.
    """
    process_group = process_group_of(environment)
    if process_group.size == 1:
        yield process_group
        return
    import torch.distributed as dist

    backend, device = "gloo", None
    if torch.cuda.is_available():
        if process_group.local_rank >= torch.cuda.device_count():
            raise ConfigError(_too_few_devices(process_group))
        torch.cuda.set_device(process_group.local_rank)
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cuda", process_group.local_rank)
    dist.init_process_group(
        backend,
        store=_own_store(environment, process_group.size),
        rank=process_group.rank,
        world_size=process_group.size,
        timeout=PATIENCE,
        device_id=device,
    )
    world = dist.group.WORLD
    if device is not None and world is not None:
        limit_links(world._get_backend(device))
    heartbeat = Heartbeat(process_group.rank, process_group.size, timeout_minutes * 60)
    heartbeat.start(store_of_run())
    try:
        yield replace(process_group, heartbeat=heartbeat)
    finally:
        heartbeat.stop()
        # After an error the others may be anywhere: destroying the group would wait for them.
        if _is_leaving_well():
            dist.destroy_process_group()


def _own_store(environment: Mapping[str, str], size: int) -> Any:
    """The store of the run, in the main process of our launcher, which has handed over the socket for it; None
    elsewhere: torch finds it by address and port.
    """
    import torch.distributed as dist

    if LISTENER not in environment:
        return None
    descriptor, port = int(environment[LISTENER]), int(environment["MASTER_PORT"])
    store = dist.TCPStore(
        environment["MASTER_ADDR"], port, size, True, PATIENCE, multi_tenant=True, master_listen_fd=descriptor
    )
    return dist.PrefixStore("default_pg", store)  # as torch calls it in the others


def limit_links(backend: Any) -> None:
    """Give the links between accelerators their own limit: only ever gradients and weights wait there."""
    backend._set_default_timeout(LINK_PATIENCE)


def _is_leaving_well() -> bool:
    return sys.exc_info()[0] is None


def _too_few_devices(process_group: ProcessGroup) -> Problem:
    return Problem(
        f"process {process_group.local_rank} of this machine has no accelerator: "
        f"{torch.cuda.device_count()} are visible",
        key="num_processes",
        allowed=f"1 to {torch.cuda.device_count()}",
        fix="start fewer processes, or let CUDA_VISIBLE_DEVICES name more devices",
    )


def require_equal(process_group: ProcessGroup, tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise where the processes do not hold the same bits.

    Raises:
        RuntimeError: a fault of the program or of the hardware; going on would train as many models as processes.
    """
    if process_group.size == 1:
        return
    sums = [float(tensor.detach().double().sum()) for tensor in tensors.values()]
    for rank, other in enumerate(process_group.gather(sums)):
        differing = [name for name, mine, theirs in zip(tensors, sums, other, strict=True) if mine != theirs]
        if differing:
            raise RuntimeError(f"{what}: process {rank} holds another {differing[0]} than process {process_group.rank}")
