"""Where the trained weights are: a copy in every process, or a part in each. The loop need not know which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.distributed.process_group import ProcessGroup, require_equal

# Between a parameter's name and the name of an optimizer's state of it.
STATE_SEPARATOR = "//"


class Placement(ABC):
    """What the optimizer moves in this process.

    Args:
        parameters: by name; what this process holds of each.
        world: the processes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], process_group: ProcessGroup):
        self.parameters = dict(parameters)
        self.process_group = process_group

    def take_over(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027 - only DeepSpeed has something to do
        """Called once, when the optimizer is there and before weights are loaded from a checkpoint."""

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Backward pass of a micro-batch; `is_last` of its window."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Move the parameters."""
        optimizer.step()

    @property
    def norm_before_clipping(self) -> Tensor | None:
        """() where gradients were clipped already, else None."""
        return None

    def gathered(self) -> AbstractContextManager[Any]:
        """Inside the context the live parameters are whole, for reading."""
        return nullcontext()

    def writing(self) -> AbstractContextManager[Any]:
        """Inside the context values may be copied into `parameters`, the same on all processes."""
        return nullcontext()

    has_own_state = False

    def own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The optimizer's state with whole tensors, where it is not the optimizer that can tell."""
        return None

    def load_own_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `own_state` gave."""
        raise NotImplementedError

    @abstractmethod
    def collect_gradients(self) -> None:
        """After the last backward pass of a window: each parameter gets the gradient summed over all processes."""

    @abstractmethod
    def norm_of_all(self, norm: Tensor) -> Tensor:
        """() the joint 2-norm, from that of the gradients that this process holds."""

    @abstractmethod
    def largest_of_all(self, value: Tensor) -> Tensor:
        """() the largest, from that of what this process holds."""

    @abstractmethod
    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors like the parameters (`name` or `name//state`), put together from all processes.

        All processes call it; only the main process gets the tensors of parts, on the CPU. What is no part (a step
        counter) stays as it is.
        """

    @abstractmethod
    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this process holds of whole tensors: the inverse of `whole`."""

    @abstractmethod
    def shapes(self) -> dict[str, list[int]]:
        """Of the whole parameters."""

    @abstractmethod
    def check(self, when: str) -> None:
        """Raise RuntimeError where copies that should be equal are not."""

    @property
    @abstractmethod
    def is_spread(self) -> bool:
        """Whether processes hold parts."""


class Replicated(Placement):
    """Every process holds all trained weights and moves them in the same way."""

    is_spread = False

    def collect_gradients(self) -> None:
        self.process_group.sum_gradients(self.parameters.values())

    def norm_of_all(self, norm: Tensor) -> Tensor:
        return norm

    def largest_of_all(self, value: Tensor) -> Tensor:
        return value

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    def check(self, when: str) -> None:
        require_equal(self.process_group, self.parameters, when)


class Sharded(Placement):
    """Every process holds and moves a part of each weight: full fine-tuning of a spread denoiser.

    The optimizer sees plain tensors that share memory with the parts, so that any optimizer which treats each weight
    by itself works.

    Args:
        spread: `DTensor` parameters by name, frozen ones too.
        trained: names of those that train.
    """

    is_spread = True

    def __init__(self, spread: Mapping[str, nn.Parameter], process_group: ProcessGroup, trained: Collection[str]):
        self.spread: dict[str, Any] = dict(spread)
        local = {name: each.to_local().detach() for name, each in self.spread.items()}
        super().__init__({name: nn.Parameter(local[name]) for name in local if name in trained}, process_group)
        self.frozen = {name: tensor for name, tensor in local.items() if name not in trained}
        mesh = next(iter(self.spread.values())).device_mesh
        self.num_copies = mesh.size(0) if mesh.ndim == 2 else 1

    def collect_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            grad = self.spread[name].grad
            parameter.grad = None if grad is None else grad.to_local()
            self.spread[name].grad = None

    def norm_of_all(self, norm: Tensor) -> Tensor:
        squares = self.process_group.sum([float(norm) ** 2])[0] / self.num_copies
        return torch.tensor(squares**0.5, device=norm.device)

    def largest_of_all(self, value: Tensor) -> Tensor:
        # Not max(): of a list with NaN it may be anything.
        every = [float(text) for text in self.process_group.gather(repr(float(value)))]  # JSON has no NaN
        return torch.tensor(every, device=value.device).max()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gathered = {}
        for key, tensor in tensors.items():
            name = key.partition(STATE_SEPARATOR)[0]
            if tensor.shape != self.spread[name].to_local().shape:
                gathered[key] = tensor
                continue
            full = self._like(name, tensor).full_tensor()
            if self.process_group.is_main:
                gathered[key] = full.cpu()
        return gathered

    def part(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from torch.distributed.tensor import distribute_tensor

        parts = {}
        for key, tensor in tensors.items():
            name = key.partition(STATE_SEPARATOR)[0]
            like = self.spread[name]
            if tensor.shape == like.shape:
                tensor = tensor.to(like.to_local().device)
                tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
            parts[key] = tensor
        return parts

    def shapes(self) -> dict[str, list[int]]:
        return {name: list(self.spread[name].shape) for name in self.parameters}

    def check(self, when: str) -> None:
        """Nothing: no weight is held twice within a copy, and copies get one and the same sum of gradients."""

    def _like(self, name: str, tensor: Tensor) -> Any:
        from torch.distributed.tensor import DTensor

        like = self.spread[name]
        return DTensor.from_local(
            tensor, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )
