"""Gradient clipping, over all trained parameters at once, and what the gradients were before it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_by_value(parameters: Iterable[nn.Parameter], max_value: float) -> Tensor:
    """Clamp every gradient element to [-max_value, max_value].

    Returns:
        () float32: the largest absolute value before clipping; NaN or infinite if any element was.
    """
    # Of a parameter with fewer rows than there are processes, some hold nothing.
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None and parameter.grad.numel()]
    if not grads:
        return torch.zeros(())
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, float("inf"))]).max()
    torch._foreach_clamp_min_(grads, -max_value)
    torch._foreach_clamp_max_(grads, max_value)
    return largest


@torch.no_grad()
def clip_by_norm(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor | None = None) -> Tensor:
    """Scale all gradients together so that their joint 2-norm is at most `max_norm`.

    Args:
        norm: () of all processes, where each holds a part; None where `parameters` are all.

    Returns:
        () float32: the norm before clipping; where it is NaN or infinite the gradients are unusable.
    """
    parameters = list(parameters)
    norm = gradient_norm(parameters) if norm is None else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """() float32: the joint 2-norm of all gradients, which are left as they are."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(grads).float() if grads else torch.zeros(())
