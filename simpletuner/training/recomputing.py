"""Gradient checkpointing: which blocks forget what they computed, and where their inputs wait meanwhile.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). Every block, every n-th one, or as many
as the memory that was measured demands: the result is the same, only time and memory differ. The last block never
forgets: the backward pass would compute it again at once, while all else is still kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.config.options import TrainConfig

# Of the memory that was free, what stays so: sizes of batches differ, and allocators leave gaps.
SPARE = 0.1


class Recomputing:
    """Called by a denoiser's forward pass in place of each of its blocks.

    Args:
        device: where blocks compute.
        interval: recompute the first of every n blocks, except the last of all.
        is_measured: recompute only as many blocks as memory demands; `interval` has no effect then.
        parks_inputs: inputs of recomputed blocks wait in main memory.
    """

    def __init__(self, device: torch.device, interval: int = 1, is_measured: bool = False, parks_inputs: bool = False):
        self.device = device
        self.interval = interval
        self.parks_inputs = parks_inputs
        self.room = MeasuredRoom(device) if is_measured else None
        self._index: dict[Any, int] = {}

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> Recomputing | None:
        """As the configuration says; None without gradient checkpointing."""
        if not config.gradient_checkpointing:
            return None
        interval = config.gradient_checkpointing_interval or "1"
        return cls(
            device,
            1 if interval == "auto" else int(interval),
            is_measured=interval == "auto",
            parks_inputs=config.gradient_checkpointing_backend == "unsloth",
        )

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        is_known = block in self._index  # in the first pass nobody knows which is the last
        index = self._index.setdefault(block, len(self._index))
        if self.room is not None:
            is_recomputed, count = self.room.ask(index, inputs, len(self._index))
            if count is not None:
                with count:
                    return block(*inputs)
        else:
            is_last = is_known and index == len(self._index) - 1
            is_recomputed = index % self.interval == 0 and not is_last
        if not is_recomputed:
            return block(*inputs)
        if self.parks_inputs:
            return checkpoint(_Parked(block, inputs), use_reentrant=False)
        return checkpoint(block, *inputs, use_reentrant=False)

    def after_step(self) -> None:
        """Told when an optimizer step is done: then the peak of its memory is known."""
        if self.room is not None:
            self.room.after_step(len(self._index))


class _Parked:
    """A block and its inputs, which go to main memory when the block has run, and come back when it runs again."""

    def __init__(self, block: Callable[..., Any], inputs: Sequence[Any]):
        self.block = block
        self.inputs: list[Any] | None = list(inputs)
        self.parked: list[Any] = []

    def __call__(self) -> Any:
        if self.inputs is None:
            return self.block(*(value.back() if isinstance(value, _Away) else value for value in self.parked))
        inputs, self.inputs = self.inputs, None
        self.parked = [_Away(value) if _can_move(value) else value for value in inputs]
        return self.block(*inputs)


def _can_move(value: Any) -> bool:
    """Tensors that only this block holds; small ones, and what is no tensor, stay."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2


class _Away:
    """A copy in main memory, made while the device goes on; the way back waits for it on the same stream."""

    def __init__(self, tensor: Tensor):
        # What a recomputation saves depends on whether its inputs ask for gradients.
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        is_pinned = tensor.device.type == "cuda"
        self.copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
        self.copy.copy_(tensor.detach(), non_blocking=is_pinned)

    def back(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=True, copy=True).requires_grad_(self.requires_grad)


class MeasuredRoom:
    """How many blocks of a batch of some size need not be recomputed.

    The first step of each size recomputes all blocks but one, whose saved bytes are counted; what is free at the peak
    of that step then says how many blocks may keep theirs. Those are the last ones: when the backward pass comes to the
    first, where it recomputes, it has freed them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.plain_blocks: dict[int, int] = {}  # size of a block's input -> blocks that keep what they computed
        self._counted: dict[int, int] = {}  # size -> bytes of one block
        self._size = 0
        self._is_measuring = False

    def ask(self, index: int, inputs: Sequence[Any], num_blocks: int) -> tuple[bool, CountSaved | None]:
        """(whether to recompute the block, a context that counts what it saves in place of that).

        Args:
            num_blocks: that are known so far, which is all of them from the second step on.
        """
        if index == 0:
            self._size = sum(value.numel() for value in inputs if isinstance(value, Tensor))
            if self._size not in self._counted:
                # Once for all sizes that are new in a step: the peak is that of the largest.
                if self.device.type == "cuda" and not self._is_measuring:
                    torch.cuda.reset_peak_memory_stats(self.device)
                self._is_measuring = True
                return False, CountSaved(self._counted, self._size)
        if self._size not in self.plain_blocks:
            return True, None
        return index < num_blocks - self.plain_blocks[self._size], None

    def after_step(self, num_blocks: int) -> None:
        self._is_measuring = False
        for size, num_bytes in self._counted.items():
            if size not in self.plain_blocks and num_bytes:
                self.plain_blocks[size] = count_fitting(self.free_bytes(), num_bytes, num_blocks)

    def free_bytes(self) -> int:
        """Bytes that were free at the peak since the count began; of main memory, those that are free now."""
        if self.device.type != "cuda":
            return psutil.virtual_memory().available
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.max_memory_allocated(self.device)
        return free + max(kept, 0)


def count_fitting(free: int, num_bytes: int, num_blocks: int) -> int:
    """How many blocks may keep what they computed.

    Args:
        free: bytes at the peak of a step in which one block did.
        num_bytes: that one block keeps.
    """
    return min(num_blocks, 1 + int(max(free, 0) * (1 - SPARE) / max(num_bytes, 1)))


class CountSaved:
    """Counts the bytes that autograd saves inside of the context, without those of parameters."""

    def __init__(self, counts: dict[int, int], key: int):
        self.counts, self.key = counts, key
        self._seen: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.counts[self.key] = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        self._seen.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.counts[self.key] += storage.nbytes()
        return tensor
