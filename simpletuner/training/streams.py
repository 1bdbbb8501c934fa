"""Copies beside the computation: a second stream on a GPU, and nothing of the kind elsewhere.

Two orders are all that is needed. A copy begins when what was queued before it has been computed, so it may write over
what that used and read what that made. And the computation waits for a copy where it needs one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from simpletuner.errors import DataError, Problem


class CopyLane(Protocol):
    """Where copies between main memory and a device run."""

    def copy(self, function: Callable[[], object]) -> Any:
        """Queue the copies that `function` makes behind what is queued to compute now; returns a mark of their end."""
        ...

    def wait(self, mark: Any) -> None:
        """What is queued to compute from now on begins when the copies of the mark are done."""
        ...


class StreamLane:
    """A CUDA stream of its own."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, function: Callable[[], object]) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            function()
            mark = torch.cuda.Event()
            mark.record(self.stream)
        return mark

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(mark)


class SameLane:
    """Copies run at once, in the order of the program."""

    def copy(self, function: Callable[[], object]) -> Any:
        function()

    def wait(self, mark: Any) -> None:
        """Nothing runs beside anything."""


def lane_of(device: torch.device) -> CopyLane:
    return StreamLane(device) if device.type == "cuda" else SameLane()


def pin_in_place(tensor: Tensor) -> Tensor:
    """Pin the memory of a large tensor where it is, to the byte; returns it.

    torch's own `pin_memory` takes blocks of powers of two: up to twice the memory, for a whole run.

    Raises:
        DataError: the system does not allow that much pinned memory.
    """
    if not tensor.numel():
        return tensor
    code = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(code) != 0:
        size = f"{tensor.nbytes / 2**30:.1f} GiB"
        message = f"{size} of main memory cannot be pinned for copies to the GPU (CUDA error {int(code)})"
        fix = "raise the limit of locked memory (ulimit -l unlimited), or swap fewer blocks"
        raise DataError(Problem(message, key="musubi_blocks_to_swap", fix=fix))
    return tensor
