"""Blocks whose frozen weights stay in main memory and come to the device for as long as they are needed.

Two buffers on the device take turns, each of the size of the largest swapped block: while one block computes, the next
one's weights arrive in the other. A copy waits for the computation that used the buffer before, so however far the host
runs ahead, no third block is ever on the device. Autograd keeps no copies; the backward pass fetches them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from simpletuner.errors import ConfigError, Problem
from simpletuner.training.streams import CopyLane, lane_of, pin_in_place

NUM_BUFFERS = 2
ALIGNMENT = 256  # bytes, as torch's own allocator on a GPU: what kernels of products and attention ask for


class FlatWeights:
    """The frozen weights of one block, one behind the other in one piece of main memory; they stay the block's own."""

    def __init__(self, block: nn.Module, pins: bool):
        tensors = _frozen(block)
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        end = 0
        for name, tensor in tensors.items():
            self._places[name] = (end, tensor.dtype, tensor.shape)
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        self.flat = torch.empty(end, dtype=torch.uint8)
        if pins:
            pin_in_place(self.flat)
        for name, view in self.views(self.flat).items():
            view.copy_(tensors[name].detach())
            tensors[name].data = view

    @property
    def num_bytes(self) -> int:
        return self.flat.nbytes

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights by name, in a buffer that holds a copy."""
        found = {}
        for name, (start, dtype, shape) in self._places.items():
            found[name] = flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return found


class SwappedBlocks:
    """The swapped blocks of a denoiser, in the order in which they compute.

    Args:
        blocks: their trainable parameters stay on the device.
        device: where they compute.
        lane: where copies run; by default the device's own.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, lane: CopyLane | None = None):
        self.lane = lane or lane_of(device)
        self.weights = [FlatWeights(block, pins=device.type == "cuda") for block in blocks]
        size = max(weights.num_bytes for weights in self.weights)
        count = min(NUM_BUFFERS, len(blocks))
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self._held: list[int | None] = [None] * count  # which block's weights are in each buffer, or on the way there
        self._marks: list[Any] = [None] * count
        self._views: dict[tuple[int, int], dict[str, Tensor]] = {}
        self._last = -1
        for index, block in enumerate(blocks):
            block.forward = Swapped(self, index, block, block.forward)

    def fetch(self, index: int) -> dict[str, Tensor]:
        """A block's weights on the device; the neighbor that is needed next is sent for as well."""
        place = self._send_for(index, self._held.index(self._last) if self._last in self._held else None)
        self.lane.wait(self._marks[place])
        is_forward = index == 0 or index > self._last
        following = index + 1 if is_forward else index - 1
        self._last = index
        if 0 <= following < len(self.weights):
            self._send_for(following, place)
        if (index, place) not in self._views:
            self._views[index, place] = self.weights[index].views(self.buffers[place])
        return self._views[index, place]

    def buffer_of(self, index: int) -> Tensor:
        """The buffer that holds the weights of the block that was fetched last."""
        return self.buffers[self._held.index(index)]

    def _send_for(self, index: int, busy: int | None) -> int:
        """The buffer with the weights of a block, which may still be on their way.

        Args:
            busy: the buffer whose weights are used last of all.
        """
        if index in self._held:
            return self._held.index(index)
        place = next(place for place in range(len(self.buffers)) if place != busy or len(self.buffers) == 1)
        source = self.weights[index].flat
        target = self.buffers[place][: source.nbytes]
        self._held[place] = index
        with torch.no_grad():
            self._marks[place] = self.lane.copy(lambda: target.copy_(source, non_blocking=True))
        return place


class Swapped:
    """Takes the place of a block's forward pass.

    Attributes:
        is_recomputed: gradient checkpointing runs the block again in the backward pass, and keeps nothing of it till
            then. Of any other block autograd keeps places in the buffers, and the weights are fetched again for them.
    """

    def __init__(self, swap: SwappedBlocks, index: int, block: nn.Module, forward: Callable[..., Any]):
        self.swap, self.index, self.block, self.forward = swap, index, block, forward
        self.is_inside = self.is_recomputed = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self.is_inside:
            return self.forward(*inputs, **options)
        self.is_inside = True
        try:
            with nullcontext() if self.is_recomputed else saved_tensors_hooks(self._pack, self._unpack):
                return functional_call(self.block, self.swap.fetch(self.index), inputs, options)
        finally:
            self.is_inside = False

    def _pack(self, tensor: Tensor) -> Tensor | _Place:
        storage = tensor.untyped_storage()._cdata
        if all(buffer.untyped_storage()._cdata != storage for buffer in self.swap.buffers):
            return tensor
        return _Place(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Place) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self.swap.fetch(self.index)
        buffer = self.swap.buffer_of(self.index).view(saved.dtype)
        return buffer.as_strided(saved.size, saved.stride, saved.offset)


class _Place(NamedTuple):
    """Where a weight, or a view of one, lies in the buffer of its block."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def _frozen(block: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not train, and buffers, by name."""
    named = {name: parameter for name, parameter in block.named_parameters() if not parameter.requires_grad}
    return {**named, **dict(block.named_buffers())}


def repeated_blocks(denoiser: nn.Module, block_classes: Sequence[str]) -> list[nn.Module]:
    """The repeated blocks in the order of the denoiser."""
    return [module for module in denoiser.modules() if type(module).__name__ in block_classes]


def move_with_swap(
    denoiser: nn.Module, block_classes: Sequence[str], count: int, device: torch.device
) -> SwappedBlocks | None:
    """Move a denoiser with its adapter to the device, but for the frozen weights of its last `count` blocks.

    The last ones: their weights are needed first in the backward pass, right after the forward pass.

    Raises:
        ConfigError: there are not so many blocks.
    """
    if not count:
        denoiser.to(device)
        return None
    blocks = repeated_blocks(denoiser, block_classes)
    if count > len(blocks):
        message = f"{count} blocks cannot be swapped: {type(denoiser).__name__} has {len(blocks)}"
        raise ConfigError(Problem(message, key="musubi_blocks_to_swap", allowed=f"0 to {len(blocks)}"))
    swapped = blocks[len(blocks) - count :]
    stay = {id(tensor) for block in swapped for tensor in _frozen(block).values()}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        if id(tensor) not in stay:
            tensor.data = tensor.data.to(device)
    return SwappedBlocks(swapped, device)
