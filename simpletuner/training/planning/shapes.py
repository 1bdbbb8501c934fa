"""Memory of training from shapes alone: the real modules and the real step, on torch's `meta` device, without values.

A step on `meta` computes shapes only, in seconds for a model of billions of parameters. What autograd keeps for the
backward pass is counted as it is saved, block by block, and what the backward pass makes besides as it is made: one
step tells the need with and without gradient checkpointing.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.models.family import ModelFamily
from simpletuner.optim.state import optimizer_tensors
from simpletuner.training.gradient_checkpointing import NUM_LEAVING
from simpletuner.training.step import compute_losses

# Weights that the optimizer is tried on: 8-bit optimizers keep small ones in full precision, so not too few.
PROBED_WEIGHTS = 1 << 16


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps between forward and backward.

    Args:
        outside: of all blocks.
        inside: per block, in their order.
        inputs: per block, what it is called with.
        num_tokens: rows of the first block's input, all samples together.
        working: per block, the most that its backward pass makes besides: gradients, and what is made again.
        working_outside: the same of all that lies outside of the blocks.
        making: per block, the most that there is of it in its forward pass, which tracing only then sorts.
    """

    outside: int
    inside: tuple[int, ...]
    inputs: tuple[int, ...]
    num_tokens: int
    working: tuple[int, ...] = ()
    working_outside: int = 0
    making: tuple[int, ...] = ()

    def peak(self, recomputed: Container[int] = (), offloads_inputs: bool = False) -> int:
        """The most that there is at a time.

        Args:
            recomputed: blocks that keep their input alone, until the backward pass comes to them.
            offloads_inputs: not even that; it waits in main memory, but for those of two blocks that are on their way.
        """
        kept = [
            (0 if offloads_inputs else put_in) if index in recomputed else inside
            for index, (inside, put_in) in enumerate(zip(self.inside, self.inputs, strict=True))
        ]
        num_offloaded = sum(index in recomputed for index in range(len(kept))) if offloads_inputs else 0
        on_their_way = min(NUM_LEAVING, num_offloaded) * max(self.inputs, default=0)
        alive = self.outside + sum(kept) + on_their_way
        peak = alive + self.working_outside
        none = (0,) * len(kept)
        working, making = self.working or none, self.making or none
        for index in reversed(range(len(kept))):
            again = self.inside[index] if index in recomputed else 0
            computed = making[index] - (0 if index in recomputed else kept[index])  # of the others, in the forward pass
            peak = max(peak, alive + again + working[index], alive + computed)
            alive -= kept[index]
        return peak


@dataclass(frozen=True)
class Load:
    """One kind of micro-batch: images, their size in pixels, whether it is regularization, the references of each."""

    batch_size: int
    height: int
    width: int
    is_regularisation: bool = False
    references: tuple[tuple[int, int], ...] = ()

    @property
    def num_pixels(self) -> int:
        return self.batch_size * sum(height * width for height, width in ((self.height, self.width), *self.references))


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


Sizes = Sequence[tuple[int, int]]


def empty_batch(
    family: ModelFamily, height: int, width: int, embeds: Sequence[PromptEmbeds], references: Sizes = ()
) -> Batch:
    """A batch of latents without content for images of `height` x `width` pixels, on `family.device`.

    Args:
        references: (height, width) in pixels of the reference images that each sample has.
    """
    spec, count = family.spec, len(embeds)
    seen = [
        torch.zeros(spec.latent_channels, tall // spec.vae_factor, wide // spec.vae_factor, device=family.device)
        for tall, wide in references
    ]
    shape = (count, spec.latent_channels, height // spec.vae_factor, width // spec.vae_factor)
    return Batch(
        latents=torch.zeros(shape, device=family.device),
        prompt_embeds=list(embeds),
        slots=list(range(count)),
        digests=[""] * count,
        loss_weights=torch.ones(count),
        dataset_id="",
        references=[seen] * count if seen else [],
    )


def measure_activations(
    family: ModelFamily,
    denoiser: nn.Module,
    height: int,
    width: int,
    embeds: Sequence[PromptEmbeds],
    references: Sizes = (),
    counter: SavedBytes | None = None,
    has_backward: bool = True,
) -> Activations:
    """Count what a forward pass of the training step saves, and what the backward pass makes besides.

    Args:
        family: on the `meta` device, its dtype that of the computation.
        denoiser: on `meta`, adapter attached, everything in the dtype of the computation.
        embeds: the prompts of the micro-batch.
        references: see `empty_batch`.
        counter: of the denoiser; for who wants to know more of what is saved.
        has_backward: without it only what is saved is counted.
    """
    counter = counter or SavedBytes(denoiser, family.spec.block_classes)
    peaks = BackwardPeaks(denoiser)
    if has_backward:
        counter.peaks = peaks
    denoiser.train()
    with FusedAttention(), peaks:
        batch = empty_batch(family, height, width, embeds, references)
        noise, quantiles = torch.zeros_like(batch.latents), torch.full((len(batch),), 0.5, dtype=torch.float64)
        with counter:  # not of the backward pass: what is made again there saves tensors for a moment
            loss = compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum
        peaks.begin(None)
        if has_backward:
            loss.backward()
        peaks.begin(None)
    denoiser.zero_grad(set_to_none=True)
    saved = Activations(
        outside=counter.saved.get(None, 0),
        inside=tuple(counter.saved.get(block, 0) for block in counter.inputs),
        inputs=tuple(counter.inputs.values()),
        num_tokens=counter.num_tokens,
    )
    if not has_backward:
        return saved
    working = [
        max(peaks.of.get(block, 0) - saved.outside - kept, 0)
        for block, kept in zip(counter.inputs, accumulate(saved.inside), strict=True)
    ]
    outside = max(peaks.of.get(None, 0) - saved.outside - sum(saved.inside), 0)
    making = tuple(peaks.made_in.get(block, 0) for block in counter.inputs)
    return replace(saved, working=tuple(working), working_outside=outside, making=making)


class SavedBytes:
    """Context that counts the bytes which autograd saves, apart for each block; weights are not counted.

    Attributes:
        saved: block -> bytes saved while it ran; None -> outside of all blocks.
        inputs: block -> bytes of the tensors that it was called with.
        num_tokens: rows of the first block's input, over the batch.
        peaks: is told where the backward pass has come to.
    """

    def __init__(self, module: nn.Module, block_classes: Sequence[str]):
        self.saved: dict[nn.Module | None, int] = {}
        self.inputs: dict[nn.Module, int] = {}
        self.num_tokens = 0
        self._module = module
        self._blocks = [child for child in module.modules() if type(child).__name__ in block_classes]
        self._current: nn.Module | None = None
        self._seen: set[int] = set()  # storages that there are; another one may take the identity of one that was freed
        self.peaks: BackwardPeaks | None = None

    def __enter__(self) -> SavedBytes:
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            self._is_new(tensor)
        self._handles = [block.register_forward_pre_hook(self._enter_block, with_kwargs=True) for block in self._blocks]
        self._handles += [block.register_forward_hook(self._leave_block) for block in self._blocks]
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._hooks.__exit__(*exc_info)
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    def _enter_block(self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._current = block
        if self.peaks is not None:
            self.peaks.begin(None)
        tensors = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor)]
        self.inputs[block] = num_bytes(tensors)
        if not self.num_tokens and tensors:
            self.num_tokens = tensors[0].shape[:-1].numel()

    def _leave_block(self, block: nn.Module, inputs: object, output: object) -> None:
        self._current = None
        if self.peaks is not None:
            self.peaks.end_forward(block)
        for tensor in tree_leaves(output) if self.peaks is not None else ():
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(self._enter_backward, block))

    def _enter_backward(self, block: nn.Module, gradient: Tensor) -> None:
        assert self.peaks is not None, "_leave_block asks"
        self.peaks.begin(block)

    def _count(self, tensor: Tensor) -> Tensor:
        if self._is_new(tensor):
            size = tensor.untyped_storage().nbytes()
            self.saved[self._current] = self.saved.get(self._current, 0) + size
        return tensor

    def _is_new(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return False
        self._seen.add(storage._cdata)
        weakref.finalize(storage, self._seen.discard, storage._cdata)
        return True


class FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels of accelerators keep it: inputs, output, one number per query, and the mask.

    On `meta` torch would take it apart into products, and count a matrix of all pairs of tokens.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args, strict=False)) | kwargs
        return _FusedShapes.apply(*(given.get(name) for name in names))


class _FusedShapes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, _ = query.shape
        # The kernels write the heads of a token side by side, so that joining them copies nothing.
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        # A mask of booleans becomes numbers to be added, again in each layer.
        added = None if mask is None else query.new_empty(mask.shape) if mask.dtype == torch.bool else mask
        ctx.save_for_backward(query, key, value, output, sums, added)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def optimizer_bytes(parameters: Mapping[str, nn.Parameter], make_optimizer: Any) -> int:
    """What the optimizer keeps for `parameters`: measured on a few of their shapes and scaled up.

    Args:
        parameters: on any device, `meta` too.
        make_optimizer: parameters by name -> the optimizer.
    """
    total = sum(parameter.numel() for parameter in parameters.values())
    if not total:
        return 0
    tried: dict[str, nn.Parameter] = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: -item[1].numel()):
        shape = _cut_shape(parameter.shape)
        tried[name] = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
        if len(tried) == 4:
            break
    with torch.compiler.set_stance("force_eager"):  # compiling a step takes longer than all else that is counted
        optimizer = make_optimizer(tried)
        for parameter in tried.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    kept, _ = optimizer_tensors(optimizer, tried)
    return round(num_bytes(kept.values()) * total / sum(parameter.numel() for parameter in tried.values()))


def step_bytes(parameters: Mapping[str, nn.Parameter], make_optimizer: Any) -> int:
    """The most that a step of the optimizer makes besides what it keeps, from shapes alone; 0 where only values tell.

    On a GPU torch's own optimizers move all weights at once, which here they are asked for: that makes more. An adapter
    has hundreds of weights of a few shapes: one and two of each say what all of them take.
    """
    some = _some_of_each_shape(parameters, 1)
    made = _made_by_a_step(some, make_optimizer)
    if len(some) == len(parameters):
        return made
    more = _some_of_each_shape(parameters, 2)
    growth = (_made_by_a_step(more, make_optimizer) - made) / (num_bytes(more.values()) - num_bytes(some.values()))
    return made + round(growth * (num_bytes(parameters.values()) - num_bytes(some.values())))


def _some_of_each_shape(parameters: Mapping[str, nn.Parameter], count: int) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    taken: Counter[tuple[torch.Size, torch.dtype]] = Counter()
    for name, parameter in parameters.items():
        taken[parameter.shape, parameter.dtype] += 1
        if taken[parameter.shape, parameter.dtype] <= count:
            found[name] = parameter
    return found


def _made_by_a_step(parameters: Mapping[str, nn.Parameter], make_optimizer: Any) -> int:
    from torch._subclasses.fake_tensor import FakeTensorMode

    made = PeakBytes()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.compiler.set_stance("force_eager"):
            tried = {
                name: nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
                for name, parameter in parameters.items()
            }
            optimizer = make_optimizer(tried)
            for group in optimizer.param_groups:
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True
            for parameter in tried.values():
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()
            with torch.no_grad(), made:
                optimizer.step()
    except RuntimeError:  # it asks for a value: bitsandbytes in 8 bits, Prodigy
        return 0
    return made.peak


class PeakBytes(TorchDispatchMode):
    """Counts what the tensors that are made inside take at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage_of(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and _storage_of(tensor) not in given:  # no view, and not written in place
                storage = tensor.untyped_storage()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._free, storage.nbytes())  # autograd keeps it without its tensor
        return output

    def _free(self, size: int) -> None:
        self.alive -= size


class BackwardPeaks(PeakBytes):
    """As `PeakBytes`, apart for the backward pass of each block; gradients of weights are not counted.

    Attributes:
        of: block -> the most that there was in its backward pass; None -> outside of the blocks.
        made_in: block -> the most that its forward pass made.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.of: dict[nn.Module | None, int] = {}
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.made_in: dict[nn.Module, int] = {}
        self._current: nn.Module | None = None
        self._gradients = self._before = 0

    def begin(self, block: nn.Module | None) -> None:
        """What is made from now on belongs to this block."""
        self.of[self._current] = max(self.of.get(self._current, 0), self.peak - self._gradients)
        self._current, self.peak, self._before = block, self.alive, self.alive
        self._gradients = num_bytes(each.grad for each in self._trained if each.grad is not None)

    def end_forward(self, block: nn.Module) -> None:
        """What was made since `begin` was of the forward pass of this block."""
        self.made_in[block] = max(self.made_in.get(block, 0), self.peak - self._before)
        self.peak = self.alive


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _cut_shape(shape: torch.Size) -> list[int]:
    """`shape` with its longest sides halved until it has no more than `PROBED_WEIGHTS` elements."""
    sides = list(shape)
    while torch.Size(sides).numel() > PROBED_WEIGHTS:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return sides
