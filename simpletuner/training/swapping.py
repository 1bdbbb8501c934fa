"""Blocks whose frozen weights stay in main memory and come to the device for as long as they are needed.

A block computes with copies. Under gradient checkpointing nothing of them is kept after the forward pass; the backward
pass fetches them again. On a GPU the next block's copies travel on a stream of their own while one computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from simpletuner.errors import ConfigError, Problem


class SwappedBlocks:
    """The swapped blocks of a denoiser, in the order in which they compute.

    Args:
        blocks: their trainable parameters stay on the device.
        device: where they compute.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device):
        self.device = device
        self.is_cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None
        self.weights = [_to_main_memory(block, self.is_cuda) for block in blocks]
        self._coming: dict[int, tuple[dict[str, Tensor], Any]] = {}
        self._last = -1
        for index, block in enumerate(blocks):
            block.forward = _Swapped(self, index, block, block.forward)

    def fetch(self, index: int) -> dict[str, Tensor]:
        """Copies of a block's weights on the device; the neighbour that is needed next is sent for as well."""
        if index not in self._coming:
            self._send_for(index)
        copies, arrived = self._coming.pop(index)
        if arrived is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            for tensor in copies.values():
                tensor.record_stream(current)
        is_forward = index == 0 or index > self._last
        following = index + 1 if is_forward else index - 1
        self._last = index
        self._coming = {key: value for key, value in self._coming.items() if key == following}
        if self.is_cuda and 0 <= following < len(self.weights):
            self._send_for(following)
        return copies

    def _send_for(self, index: int) -> None:
        if index in self._coming:
            return
        if self.stream is None:
            self._coming[index] = ({name: value.to(self.device) for name, value in self.weights[index].items()}, None)
            return
        with torch.cuda.stream(self.stream):
            copies = {name: value.to(self.device, non_blocking=True) for name, value in self.weights[index].items()}
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        self._coming[index] = (copies, arrived)


class _Swapped:
    """Takes the place of a block's forward pass."""

    def __init__(self, swap: SwappedBlocks, index: int, block: nn.Module, forward: Callable[..., Any]):
        self.swap, self.index, self.block, self.forward = swap, index, block, forward
        self.is_inside = False

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        if self.is_inside:
            return self.forward(*inputs, **options)
        self.is_inside = True
        try:
            return functional_call(self.block, self.swap.fetch(self.index), inputs, options)
        finally:
            self.is_inside = False


def _frozen(block: nn.Module) -> dict[str, Tensor]:
    """Parameters that do not train, and buffers, by name."""
    named = {name: parameter for name, parameter in block.named_parameters() if not parameter.requires_grad}
    return {**named, **dict(block.named_buffers())}


def _to_main_memory(block: nn.Module, pins: bool) -> dict[str, Tensor]:
    """Move a block's frozen weights to main memory, pinned where a GPU fetches them; they stay the block's own."""
    weights = {}
    for name, tensor in _frozen(block).items():
        kept = tensor.detach().to("cpu")
        tensor.data = kept.pin_memory() if pins else kept
        weights[name] = tensor
    return {name: tensor.detach() for name, tensor in weights.items()}


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
