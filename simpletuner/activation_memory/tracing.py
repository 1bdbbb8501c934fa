"""What a block need not keep for its backward pass, found while it computes.

Products and attention save what they must. Norms, modulation, activations, rotations, copies and casts make most of
what else autograd saves, and take next to no time to compute again. While a block runs, `Trace` notes how each large
tensor was made by such functions. At the end of the block it looks at what autograd saved, and lets go of every tensor
that the others suffice for. The backward pass calls the same functions on the same tensors again: bits are equal, and
every formula of a gradient is torch's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from simpletuner.activation_memory.recompute import is_large

# Functions by name, as `__torch_function__` is given them. Each makes a new tensor of its arguments alone: no random
# numbers, nothing written in place. Where one of them returns a view, nothing is noted.
# fmt: off
CHEAP = frozenset((
    "add", "sub", "rsub", "__rsub__", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "reciprocal", "addcmul",
    "lerp", "clamp", "clip", "where", "masked_fill", "float", "half", "bfloat16", "double", "to", "type", "type_as",
    "contiguous", "clone", "reshape", "flatten", "cat", "concat", "stack", "repeat", "repeat_interleave", "pad",
    "mean", "sum", "layer_norm", "rms_norm", "group_norm", "silu", "gelu", "sigmoid", "tanh", "relu", "softplus",
    "glu", "recomputed", "silu_gated", "rotate_pairs",
))
# fmt: on
# Products, which `makes_products` adds where they widen their input: the first layer of an MLP.
PRODUCTS = frozenset(("linear", "packed_product", "kron_linear"))


Made: TypeAlias = dict[int, Tensor]


class Layout(NamedTuple):
    """Where the elements of a tensor lie in its storage."""

    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        return cls(tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def view(self, other: Tensor) -> Tensor:
        """The tensor of this layout in the storage of another one."""
        if other.dtype == self.dtype:
            return other.as_strided(self.size, self.stride, self.offset)
        empty = torch.empty(0, dtype=self.dtype, device=other.device)
        return empty.set_(other.untyped_storage(), self.offset, self.size, self.stride)


class Kept:
    """A tensor that is kept until the backward pass, as hooks around the block say: they may recompute or move it."""

    def __init__(self, tensor: Tensor):
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._unpack: Callable[[Any], Tensor] | None = hooks[1] if hooks else None
        self._tensor: Any = hooks[0](tensor) if hooks else tensor

    def get(self) -> Tensor:
        if self._unpack is not None:  # gradient checkpointing allows it once
            self._tensor, self._unpack = self._unpack(self._tensor), None
        return self._tensor


class Input:
    """A tensor that a step was given.

    Args:
        tensor: held until the end of the block; None where `step` made it.
        step: that made it, if one did.
    """

    __slots__ = ("kept", "layout", "step", "storage", "tensor", "version")

    def __init__(self, tensor: Tensor, step: Step | None):
        self.storage = storage_of(tensor)
        self.layout = Layout.of(tensor)
        self.step = step
        self.tensor = None if step is not None else tensor
        self.version = tensor._version
        self.kept: Kept | None = None

    @property
    def costs_nothing(self) -> bool:
        """Weights are there anyway, and small tensors do not count."""
        return isinstance(self.tensor, nn.Parameter) or (self.tensor is not None and not is_large(self.tensor))

    def value(self, made_here: Made) -> Tensor:
        if self.kept is None:
            assert self.step is not None
            made = self.step.value(made_here)
            return made if self.layout == self.step.layout else self.layout.view(made)
        tensor = self.kept.get()
        if tensor.stride() != self.layout.stride and 0 not in self.layout.stride:  # a hook has moved it
            tensor = tensor.new_empty_strided(self.layout.size, self.layout.stride).copy_(tensor)
        return tensor


class Step:
    """How a tensor was made: a call of a function.

    Attributes:
        pending: saved places that will ask for the tensor.
    """

    # fmt: off
    __slots__ = (
        "_cached", "arguments", "function", "index", "is_again", "layout", "num_bytes", "options", "pending", "storage",
    )
    # fmt: on

    def __init__(self, index: int, function: Callable[..., Tensor], arguments: Any, options: Any, made: Tensor):
        self.index, self.function, self.arguments, self.options = index, function, arguments, options
        self.storage, self.layout, self.num_bytes = storage_of(made), Layout.of(made), made.untyped_storage().nbytes()
        self.is_again = False
        self.pending = 0
        self._cached: Tensor | None = None

    def inputs(self) -> Iterator[Input]:
        yield from _inputs_in(self.arguments)
        yield from _inputs_in(self.options)

    def value(self, made_here: Made) -> Tensor:
        """The tensor again.

        Args:
            made_here: what was made again for the same saved place, by the number of its step.
        """
        made = self._cached if self._cached is not None else made_here.get(self.index)
        if made is None:
            arguments, options = _with_values(self.arguments, made_here), _with_values(self.options, made_here)
            made = made_here[self.index] = self.function(*arguments, **options)
            if self.pending:
                self._cached = made
        return made

    def value_for_a_saved_place(self) -> Tensor:
        made = self.value({})
        self.pending -= 1
        if self.pending <= 0:
            self._cached = None
        return made


class Saved:
    """What autograd holds in place of a tensor."""

    __slots__ = ("context", "kept", "layout", "step", "storage", "tensor")

    def __init__(self, tensor: Tensor, storage: int, step: Step | None):
        self.tensor: Tensor | None = tensor
        self.storage = storage
        self.step = step
        self.layout: Layout | None = None
        self.kept: Kept | None = None
        self.context: Context | None = None

    def value(self) -> Tensor:
        if self.kept is not None:
            return self.kept.get()
        assert self.step is not None
        assert self.layout is not None
        assert self.context is not None
        with torch.no_grad(), self.context():
            made = self.step.value_for_a_saved_place()
            return made if self.layout == self.step.layout else self.layout.view(made)


class Context(NamedTuple):
    """Autocast as it was in the forward pass."""

    kind: str
    dtype: torch.dtype | None

    @classmethod
    def of(cls, kind: str) -> Context:
        is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        return cls(kind, torch.get_autocast_dtype(kind) if is_on else None)

    def __call__(self) -> AbstractContextManager[Any]:
        if self == Context.of(self.kind):
            return nullcontext()
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype is not None)


class _Made(NamedTuple):
    """The step that made a storage; while the weak references exist, no other storage gets its identity."""

    step: Step
    storage: StorageWeakRef
    tensor: weakref.ref[Tensor]
    version: int


class Trace(TorchFunctionMode):
    """Context of one call of a block.

    Args:
        kind: of the device.
        makes_products: products that widen their input are computed again, too.
    """

    def __init__(self, kind: str, makes_products: bool = False):
        super().__init__()
        self.context = Context.of(kind)
        self.makes_products = makes_products
        self._made: dict[int, _Made] = {}
        self._saved: list[Saved] = []
        self._num_steps = 0

    def __enter__(self) -> Trace:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, Saved.value)
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind: Any, *exc_info: Any) -> None:
        super().__exit__(kind, *exc_info)
        self._hooks.__exit__(kind, *exc_info)
        try:
            if kind is None:
                self._settle()
        finally:  # gradient checkpointing leaves off in the middle: a graph that holds its own tensors is never freed
            for saved in self._saved:
                saved.tensor = None
            self._made.clear()
            self._saved.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        is_noted = name in CHEAP or (self.makes_products and name in PRODUCTS)
        if is_noted and type(output) is Tensor and is_large(output):
            self._note(name, func, args, kwargs, output)
        return output

    def _note(self, name: str, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if output.shape[-1] <= args[0].shape[-1] if name in PRODUCTS else output._is_view():
            return
        if name == "type_as":  # of the other tensor only the type matters
            func, args = Tensor.to, (args[0], output.dtype)
        step = Step(self._num_steps, func, self._inputs(args), self._inputs(kwargs), output)
        self._num_steps += 1
        if any(each.storage == step.storage for each in step.inputs()):  # it returned or wrote what it was given
            return
        weak = StorageWeakRef(output.untyped_storage())
        # Views of the output hold its base, which shares its version.
        base = output if output._base is None else output._base
        self._made[step.storage] = _Made(step, weak, weakref.ref(base), output._version)

    def _inputs(self, value: Any) -> Any:
        if type(value) in (Tensor, nn.Parameter):
            return Input(value, self._step_of(value))
        if type(value) in (list, tuple):
            return type(value)(self._inputs(each) for each in value)
        if type(value) is dict:
            return {name: self._inputs(each) for name, each in value.items()}
        return value

    def _step_of(self, tensor: Tensor) -> Step | None:
        made = self._made.get(storage_of(tensor))
        if made is None:
            return None
        original = made.tensor()
        return made.step if original is not None and original._version == made.version else None

    def _pack(self, tensor: Tensor) -> Saved:
        if type(tensor) is not Tensor:
            saved = Saved(tensor, -1, None)
        else:
            saved = Saved(tensor, storage_of(tensor), self._step_of(tensor))
        self._saved.append(saved)
        return saved

    def _settle(self) -> None:
        """Decide what of the saved tensors stays, and hand that to the hooks around the block."""
        kept = {saved.storage: saved.tensor for saved in self._saved if saved.step is None}
        steps = {saved.step.index: saved for saved in self._saved if saved.step is not None}
        for _, saved in sorted(steps.items()):
            step = saved.step
            assert step is not None
            more: dict[int, Tensor] = {}
            if (
                _can_be_made(step, kept, more, set())
                and sum(_num_bytes(each) for each in more.values()) < step.num_bytes
            ):
                step.is_again = True
                kept.update(more)
            else:
                kept[step.storage] = saved.tensor
        keeper = _Keeper(kept)
        for saved in self._saved:
            if saved.step is None or not saved.step.is_again:
                saved.step, saved.kept = None, keeper.keep(saved.tensor)
            else:
                assert saved.tensor is not None
                saved.layout, saved.context = Layout.of(saved.tensor), self.context
                saved.step.pending += 1
                keeper.prepare(saved.step)
            saved.tensor = None


class _Keeper:
    """Keeps each tensor once."""

    def __init__(self, tensors: dict[int, Tensor | None]):
        self._tensors = tensors
        self._kept: dict[tuple[int, Layout], Kept] = {}
        self._prepared: set[int] = set()

    def keep(self, tensor: Tensor | None) -> Kept:
        assert tensor is not None
        if type(tensor) not in (Tensor, nn.Parameter):
            return Kept(tensor)
        key = storage_of(tensor), Layout.of(tensor)
        if key not in self._kept:
            self._kept[key] = Kept(tensor.detach())
        return self._kept[key]

    def prepare(self, step: Step) -> None:
        """Keep what a step is computed from."""
        if step.index in self._prepared:
            return
        self._prepared.add(step.index)
        for each in step.inputs():
            if each.tensor is not None:
                each.kept, each.tensor = self.keep(each.tensor), None
            elif each.storage in self._tensors and not _is_again(each.step):
                tensor = self._tensors[each.storage]
                assert tensor is not None
                each.kept, each.step = self.keep(each.layout.view(tensor)), None
            elif each.step is not None:
                self.prepare(each.step)


def _can_be_made(step: Step, kept: dict[int, Tensor | None], more: dict[int, Tensor], seen: set[int]) -> bool:
    """Whether a tensor can be made again; `more` gets what must be kept for it that is not kept anyway."""
    seen.add(step.index)
    for each in step.inputs():
        if each.tensor is not None:
            if each.tensor._version != each.version:
                return False
            if each.storage not in kept and not each.costs_nothing:
                more[each.storage] = each.tensor
            continue
        assert each.step is not None
        is_there = each.step.is_again or each.storage in kept or each.step.index in seen
        if not is_there and not _can_be_made(each.step, kept, more, seen):
            return False
    return True


def _is_again(step: Step | None) -> bool:
    return step is not None and step.is_again


def _num_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def storage_of(tensor: Tensor) -> int:
    """The identity of what a tensor lies in."""
    return tensor.untyped_storage()._cdata


def _inputs_in(value: Any) -> Iterator[Input]:
    if isinstance(value, Input):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _inputs_in(each)
    elif isinstance(value, dict):
        yield from _inputs_in(list(value.values()))


def _with_values(value: Any, made_here: Made) -> Any:
    if isinstance(value, Input):
        return value.value(made_here)
    if type(value) in (list, tuple):
        return type(value)(_with_values(each, made_here) for each in value)
    if type(value) is dict:
        return {name: _with_values(each, made_here) for name, each in value.items()}
    return value
