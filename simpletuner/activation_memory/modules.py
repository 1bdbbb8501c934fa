"""The blocks and public modules that every family is made of, computing so that they keep little.

Parameters, keys and results stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from simpletuner.activation_memory.convolutions import frozen_conv2d
from simpletuner.activation_memory.norms import rms_norm
from simpletuner.activation_memory.recompute import is_worth_it
from simpletuner.activation_memory.rotation import rotate_as_one_product
from simpletuner.activation_memory.tracing import Trace

ActivationMemory: TypeAlias = Literal["high", "low", "lowest"]
_LEVEL = "_activation_memory"
# The forward pass of a module's class, bound to the module: a compiler cannot follow `type(self).forward`.
_OWN_FORWARD = "_own_forward"


def reduce_activation_memory(model: nn.Module, block_classes: Sequence[str]) -> nn.Module:
    """Let the blocks and the known modules in a model keep little between forward and backward pass; returns the model.

    Subclasses of known modules stay as they are, for they may compute something else.

    Args:
        block_classes: class names of the repeated blocks.
    """
    forwards = _forwards()
    for module in model.modules():
        is_block = type(module).__name__ in block_classes
        if is_block:
            setattr(module, _LEVEL, "low")
        if is_block or type(module) in forwards:
            setattr(module, _OWN_FORWARD, MethodType(type(module).forward, module))
            module.forward = MethodType(_traced if is_block else forwards[type(module)], module)
        rotate_as_one_product(module)
    return model


def set_activation_memory(module: nn.Module, level: ActivationMemory) -> None:
    """What the blocks in a module, or the block that it is, keep for the backward pass.

    Args:
        level: `high`: what torch saves. `low`: what is cheap to compute is computed again. `lowest`: the first products
            of their MLPs too, which takes a part of the time that it takes to forget a whole block.
    """
    for block in module.modules():
        if hasattr(block, _LEVEL):
            setattr(block, _LEVEL, level)


def _traced(self: nn.Module, *inputs: Any, **options: Any) -> Any:
    """The block's own forward pass, of which what is cheap is made again."""
    forward = getattr(self, _OWN_FORWARD)
    if torch.compiler.is_compiling():
        return forward(*inputs, **options)
    level: ActivationMemory = getattr(self, _LEVEL)
    tensors = [each for each in (*inputs, *options.values()) if isinstance(each, Tensor)]
    if level == "high" or not any(map(is_worth_it, tensors)) or _is_inside_another():
        return forward(*inputs, **options)
    with Trace(tensors[0].device.type, makes_products=level == "lowest"):
        return forward(*inputs, **options)


def _is_inside_another() -> bool:
    return any(isinstance(mode, Trace) for mode in _get_current_function_mode_stack())


def _own_forward(self: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = getattr(self, _OWN_FORWARD)(x)
    return output


def _forwards() -> Mapping[type[nn.Module], Callable[..., Tensor]]:
    from diffusers.models.normalization import RMSNorm

    return {nn.RMSNorm: _rms_norm, RMSNorm: _rms_norm, nn.Conv2d: _conv2d}


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    """Leaves to the module's own forward what differs: other number formats, a bias, several axes."""
    weight = self.weight
    is_plain = weight is None or (weight.dtype == x.dtype and weight.dim() == 1)
    if torch.compiler.is_compiling() or not is_plain or getattr(self, "bias", None) is not None:
        return _own_forward(self, x)
    # torch's RMSNorm means by None the smallest step of the number format it computes in.
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
    return rms_norm(x, weight, eps)


def _conv2d(self: nn.Conv2d, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or self.padding_mode != "zeros" or self.weight.requires_grad:
        return _own_forward(self, x)
    return frozen_conv2d(self, x)
