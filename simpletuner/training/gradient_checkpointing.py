"""Gradient checkpointing: which blocks forget what they computed, and where their inputs wait meanwhile.

Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174). Every block, every n-th one, or as many
as the memory that was measured demands: the result is the same, only time and memory differ. The last block never
forgets: the backward pass would compute it again at once, while all else is still kept.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import psutil
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.activation_memory.modules import ActivationMemory, set_activation_memory
from simpletuner.config.options import TrainConfig
from simpletuner.errors import bytes_text
from simpletuner.training.memory import peak_bytes
from simpletuner.training.streams import CopyLane, lane_of
from simpletuner.training.swapping import Swapped

# Of the memory that was free, what stays so: sizes of batches differ, and allocators leave gaps.
SPARE = 0.1
# Blocks of one kind keep about equally much: their class, and the rounded sizes of what they are given.
Kind: TypeAlias = tuple[type, tuple[int, ...]]
# Blocks whose inputs may be on their way to main memory at a time.
NUM_LEAVING = 2


class GradientCheckpointing:
    """Called by a denoiser's forward pass in place of each of its blocks.

    Args:
        device: where blocks compute.
        interval: recompute the first of every n blocks, except the last of all.
        is_measured: recompute only as many blocks as memory demands; `interval` has no effect then.
        offloads_inputs: inputs of recomputed blocks wait in main memory.
        limit: bytes that the run may take: see `Room.limit`; None: what the device has.
        may_offload: inputs go to main memory where a step finds too little memory with all blocks recomputed.
        level: what blocks keep that are not recomputed.
        may_keep_least: they keep less than that where not all of them fit.
    """

    def __init__(
        self,
        device: torch.device,
        interval: int = 1,
        is_measured: bool = False,
        offloads_inputs: bool = False,
        limit: int | None = None,
        may_offload: bool = False,
        level: ActivationMemory = "low",
        may_keep_least: bool = False,
    ):
        self.device = device
        self.level = level
        self.interval = interval
        self.offloading = Offloading(device) if offloads_inputs else None
        self.room = MeasuredMemory(device, limit, may_keep_least) if is_measured else None
        self.may_offload = may_offload and device.type == "cuda"
        self._index: dict[Any, int] = {}
        self._levels: dict[Any, ActivationMemory] = {}
        # By the tensors that it is given `checkpoint` finds out whose random state to restore; see `_OffloadedInputs`.
        self._of_device = torch.empty(0, device=device)

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        device: torch.device,
        limit: int | None = None,
        may_offload: bool = False,
        may_keep_least: bool = False,
    ) -> GradientCheckpointing | None:
        """As the configuration says; None without gradient checkpointing."""
        if not config.model.gradient_checkpointing:
            return None
        interval = config.model.gradient_checkpointing_interval or "1"
        return cls(
            device,
            1 if interval == "auto" else int(interval),
            is_measured=interval == "auto",
            offloads_inputs=config.model.gradient_checkpointing_backend == "unsloth",
            limit=limit,
            may_offload=may_offload,
            level=config.model.activation_memory or "low",
            may_keep_least=may_keep_least,
        )

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        is_known = block in self._index  # in the first pass nobody knows which is the last
        index = self._index.setdefault(block, len(self._index))
        if index == 0 and self.offloading is not None:
            self.offloading.begin()
        if self.room is not None:
            is_recomputed, count = self.room.ask(index, inputs, block)
            if count is not None:
                with count:
                    return self._run(block, False, *inputs)
        else:
            is_last = is_known and index == len(self._index) - 1
            is_recomputed = index % self.interval == 0 and not is_last
        if not is_recomputed:
            return self._run(block, False, *inputs)
        recomputing = partial(self._run, block, True)
        if self.offloading is not None:
            away = _OffloadedInputs(recomputing, inputs, self.offloading)
            return checkpoint(away, self._of_device, use_reentrant=False)
        return checkpoint(recomputing, *inputs, use_reentrant=False)

    def _run(self, block: Callable[..., Any], is_recomputed: bool, *inputs: Any) -> Any:
        """The block, which knows what becomes of this call: rows that go through it one by one may be treated
        differently, and the backward pass computes an earlier one again after a later one was kept.

        A recomputed block is not traced, since its own backward pass follows at once: tracing costs time and saves
        nothing.
        """
        if isinstance(forward := getattr(block, "forward", None), Swapped):
            forward.is_recomputed = is_recomputed
        kept: ActivationMemory = "lowest" if self.room is not None and self.room.keeps_least else self.level
        level: ActivationMemory = "high" if is_recomputed else kept
        if isinstance(block, nn.Module) and self._levels.get(block) != level:
            self._levels[block] = level
            set_activation_memory(block, level)
        return block(*inputs)

    def after_step(self) -> list[str]:
        """Called when an optimizer step is done: then the peak of its memory is known. What has changed, in words."""
        return self.room.after_step() if self.room is not None else []

    def recompute_more(self) -> bool:
        """Called when the memory of a step did not suffice; whether the step can be tried again with more blocks
        recomputed."""
        if self.room is not None and self.room.recompute_more():
            return True
        if not self.may_offload or self.offloading is not None:
            return False
        self.offloading = Offloading(self.device)
        return True


class _OffloadedInputs:
    """A block and its inputs, which go to main memory when the block has run, and come back when it runs again.

    The inputs are not arguments of `checkpoint`, which would keep them. So it is given an empty tensor of their device:
    without one it would not restore the device's random state, and dropout would draw another mask in the second run.
    """

    def __init__(self, block: Callable[..., Any], inputs: Sequence[Any], offloading: Offloading):
        self.block = block
        self.inputs: list[Any] | None = list(inputs)
        self.offloading = offloading
        self.offloaded: list[Any] = []

    def __call__(self, of_device: Tensor) -> Any:
        if self.inputs is None:
            return self.block(*self.offloading.back(self.offloaded))
        inputs, self.inputs = self.inputs, None
        self.offloaded = self.offloading.offload(inputs)
        return self.block(*inputs)


class Offloading:
    """Main memory where inputs of blocks wait. Copies run beside the computation, in both directions.

    Args:
        lane: where copies run; by default the device's own.
    """

    def __init__(self, device: torch.device, lane: CopyLane | None = None):
        self.lane = lane or lane_of(device)
        # Inputs whose copies may not be done. At most two blocks' at a time: then the computation waits for the first.
        self._leaving: deque[tuple[list[Any], Any]] = deque()
        self._offloaded: list[list[Any]] = []  # in the order of the blocks; the last ones come back first

    def offload(self, inputs: Sequence[Any]) -> list[Any]:
        """`inputs` with a copy in main memory in place of each tensor that is large and of this block alone."""
        moved = [value for value in inputs if _can_move(value)]
        away = {id(value): _OffloadedTensor(value) for value in moved}

        def copy_out() -> None:
            for value in moved:
                away[id(value)].take(value)

        if moved:
            self._leaving.append((moved, self.lane.copy(copy_out)))
        self._let_go(NUM_LEAVING)
        offloaded = [away.get(id(value), value) for value in inputs]
        self._offloaded.append(offloaded)
        return offloaded

    def back(self, offloaded: list[Any]) -> list[Any]:
        """The inputs as they were; those of the block before are sent for."""
        self._let_go(0)
        if any(offloaded is each for each in self._offloaded):
            while self._offloaded.pop() is not offloaded:
                pass  # what came later was never asked for
        self._send_for(offloaded)
        for value in offloaded:
            if isinstance(value, _OffloadedTensor):
                self.lane.wait(value.mark)
        inputs = [value.arrived() if isinstance(value, _OffloadedTensor) else value for value in offloaded]
        if self._offloaded:
            self._send_for(self._offloaded[-1])
        return inputs

    def begin(self) -> None:
        """A forward pass begins; of an earlier one nothing is fetched ahead any more."""
        self._offloaded.clear()

    def _send_for(self, offloaded: Sequence[Any]) -> None:
        for value in offloaded:
            if isinstance(value, _OffloadedTensor) and value.coming is None:
                # Made here, so that the allocator counts it to the stream that computes.
                value.coming = torch.empty_like(value.copy, device=value.device)
                value.mark = self.lane.copy(partial(value.coming.copy_, value.copy, non_blocking=True))

    def _let_go(self, num_kept: int) -> None:
        while len(self._leaving) > num_kept:
            _, mark = self._leaving.popleft()
            self.lane.wait(mark)


def _can_move(value: Any) -> bool:
    """Tensors that only this block holds; small ones, and what is no tensor, stay."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 2


class _OffloadedTensor:
    """A tensor's copy in main memory, and its way back."""

    def __init__(self, tensor: Tensor):
        # What a recomputation saves depends on whether its inputs ask for gradients.
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        # So it does on their strides: a product of transposed inputs is another kernel, which keeps other tensors.
        self.copy = torch.empty_like(tensor, device="cpu", requires_grad=False, pin_memory=self.device.type == "cuda")
        self.coming: Tensor | None = None
        self.mark: Any = None

    def take(self, tensor: Tensor) -> None:
        self.copy.copy_(tensor.detach(), non_blocking=True)

    def arrived(self) -> Tensor:
        tensor, self.coming = self.coming, None
        assert tensor is not None
        return tensor.requires_grad_(self.requires_grad)


class MeasuredMemory:
    """How many blocks of a batch of some size need not be recomputed.

    The first steps of each size recompute all blocks but the first of each kind, whose saved bytes are counted: text
    refiners, image blocks and the levels of a UNet keep very different amounts. What is free at the peak of such a step
    then says how many blocks may keep theirs. Those are the last ones: when the backward pass comes to the first, where
    it recomputes, it has freed them. The very first step of a run says nothing, since the optimizer makes its state at
    its end: only afterwards do activations and state exist together.

    Args:
        may_keep_least: where not all blocks can keep what they do, they keep least, and are measured again.
    """

    def __init__(self, device: torch.device, limit: int | None = None, may_keep_least: bool = False):
        self.device, self.limit = device, limit
        self.may_keep_least, self.keeps_least = may_keep_least, False
        # Place and kind of a block -> whether it is recomputed. The first blocks may see text alone, so that a pass is
        # known by all of its blocks and not by its beginning.
        self.recomputes: dict[tuple[int, Kind], bool] = {}
        self._counted: dict[Kind, int] = {}  # bytes that one block keeps
        self._pass: list[
            tuple[Kind, bool]
        ] = []  # kind of each block, and whether it is recomputed; as far as it has come
        self._measuring: list[list[tuple[Kind, bool]]] = []  # the passes of this step in which something is counted
        self._has_state = False

    def ask(self, index: int, inputs: Sequence[Any], block: Any = None) -> tuple[bool, CountSaved | None]:
        """(whether to recompute the block, a context that counts what it saves in place of that).

        Args:
            index: of the block in its forward pass.
            block: its weights do not count, since they are there anyway.
        """
        if index == 0:
            self._pass = []
        kind = type(block), tuple(_rounded(value.numel()) for value in inputs if isinstance(value, Tensor))
        known = self.recomputes.get((index, kind))
        is_recomputed = any(kind == other for other, _ in self._pass) if known is None else known
        self._pass.append((kind, is_recomputed))
        if known is not None:
            return known, None
        if self.device.type == "cuda" and not self._measuring:
            torch.cuda.reset_peak_memory_stats(self.device)  # once for all that is new in a step
        if not any(self._pass is each for each in self._measuring):
            self._measuring.append(self._pass)
        return is_recomputed, None if is_recomputed else CountSaved(self._counted, kind, weights_of(block))

    def after_step(self) -> list[str]:
        """What was free at the peak of a step that has counted says how many blocks of its passes are kept.

        Returns:
            Lines for the log: that blocks keep less, and, where the run has a limit, how many are recomputed.
        """
        lines = []
        for blocks in self._measuring if self._has_state else ():
            counts = [self._counted.get(kind, 0) for kind, _ in blocks]
            kept = sum(count for count, (_, is_recomputed) in zip(counts, blocks, strict=True) if not is_recomputed)
            free = self.free_bytes()
            num_recomputed = len(blocks) - count_fitting(free, counts, kept)
            if num_recomputed and self.may_keep_least:
                self.may_keep_least, self.keeps_least = False, True
                lines.append(
                    "memory: not all blocks fit with what they keep; with activation_memory lowest they are "
                    "measured again"
                )
                break
            if self.limit is not None:
                spare = f"{bytes_text(free)} were free" if free >= 0 else f"{bytes_text(-free)} were missing"
                lines.append(
                    f"memory: {spare} at the peak of the first step of this size; from now on {num_recomputed} of "
                    f"{len(blocks)} blocks are recomputed"
                )
            for index, (kind, _) in enumerate(blocks):
                # Text refiners are alike for images of all sizes: what one of them needs holds for all.
                place = (index, kind)
                self.recomputes[place] = self.recomputes.get(place, False) or index < num_recomputed
        self._has_state = True
        self._measuring.clear()
        return lines

    def recompute_more(self) -> bool:
        """Let fewer blocks of the present pass keep what they computed; False where none did."""
        places = [(index, kind) for index, (kind, _) in enumerate(self._pass)]
        kept = [place for place, (_, is_recomputed) in zip(places, self._pass, strict=True) if not is_recomputed]
        fewer = set(kept[-(-len(kept) // 2) :])
        self.recomputes.update({place: place not in fewer for place in places})
        self._pass = [(kind, place not in fewer) for place, (kind, _) in zip(places, self._pass, strict=True)]
        return bool(kept)

    def free_bytes(self) -> int:
        """Bytes that were free at the peak since the count began; of main memory, those that are free now."""
        if self.device.type != "cuda":
            free, taken = psutil.virtual_memory().available, peak_bytes()
        else:
            taken = torch.cuda.max_memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + max(torch.cuda.memory_reserved(self.device) - taken, 0)
        return free if self.limit is None else min(free, self.limit - taken)


def _rounded(size: int) -> int:
    """Sizes that differ by a sixteenth at most are one: captions of all lengths are not measured one by one."""
    step = max(size.bit_length() - 5, 0)
    return -(-size >> step) << step if step else size


def count_fitting(free: int, counts: Sequence[int], measured: int) -> int:
    """How many of the last blocks may keep what they computed; at least one, which the backward pass meets first.

    Args:
        free: bytes at the peak of a step in which some blocks did.
        counts: bytes that each block keeps.
        measured: of those that kept theirs in that step.
    """
    room = measured + int(max(free, 0) * (1 - SPARE))
    kept = list(accumulate(reversed(counts)))
    return max(bisect_right(kept, room), min(len(counts), 1))


class CountSaved:
    """Counts the bytes that autograd saves inside of the context, without those of weights.

    A weight is often saved as a view of itself (its transpose), hence by what it lies in.

    Args:
        counts: gets the sum under `key`.
        weights: what does not count.
    """

    def __init__(self, counts: dict[Any, int], key: Any, weights: Iterable[Tensor] = ()):
        self.counts, self.key = counts, key
        # Storages are held, so that none takes the identity of one that was freed.
        self._seen: dict[int, Any] = {}
        for weight in weights:
            self._is_new(weight)

    def __enter__(self) -> None:
        self.counts[self.key] = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        self._seen.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        if self._is_new(tensor):
            self.counts[self.key] += tensor.untyped_storage().nbytes()
        return tensor

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return False
        self._seen[storage._cdata] = storage
        return True


def weights_of(block: Any) -> list[Tensor]:
    """Parameters and buffers of a block and of the adapters that were put beside its layers (LyCORIS' hold them)."""
    if not isinstance(block, nn.Module):
        return []
    modules = [*block.modules(), *(owner for each in block.modules() if (owner := _adapter_of(each)) is not None)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def _adapter_of(layer: nn.Module) -> nn.Module | None:
    """The module whose forward pass stands in the place of a layer's own."""
    owner = getattr(layer.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, nn.Module) and owner is not layer else None
