"""A new adapter is tried before it trains: perturbed, it must change its layer's output and get gradients.

An adapter on a layer that was replaced afterwards, or whose weights are packed, trains nothing without any error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError, Problem


def smoke_test(modules: Iterable[tuple[nn.Module, nn.Module, nn.Module]], key: str, file: str | None = None) -> None:
    """Try one adapter module of each kind.

    Args:
        modules: what is called in the model, the base layer in it, and the module that holds the adapter's parameters.
        key: the option to name in the error.

    Raises:
        ConfigError: one of them changes nothing, or gets no gradient.
    """
    kinds = {(type(module), type(base)): (called, base, module) for called, base, module in reversed(list(modules))}
    for called, base, module in kinds.values():
        if base.weight.is_meta:  # `simpletuner plan` counts parameters of a model without values
            continue
        # In a fork, because a later draw of the run must not depend on this check.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if not _reacts(called, base, module):
                raise ConfigError(
                    Problem(
                        f"a {type(module).__name__} on {type(base).__name__} changes nothing and would train nothing",
                        key=key,
                        file=file,
                        fix="choose another kind of adapter, or leave this layer out",
                    )
                )


def _reacts(called: nn.Module, base: nn.Module, module: nn.Module) -> bool:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in parameters]
    x = _example_input(base)
    was_training = module.training
    module.eval()  # dropout could hide or fake a change
    try:
        before = called(x).detach()
        _perturb(parameters)
        after = called(x)
        if not after.requires_grad:
            return False
        gradients = torch.autograd.grad(after.float().square().sum(), parameters, allow_unused=True)
        has_gradient = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        return has_gradient and not torch.equal(before, after.detach())
    finally:
        module.train(was_training)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _perturb(parameters: Sequence[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)


def _example_input(layer: Any) -> Tensor:
    """A small input of the layer's dtype; bfloat16 where its weights are packed."""
    device = layer.weight.device
    dtype = layer.weight.dtype if layer.weight.dtype.is_floating_point else torch.bfloat16
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return torch.randn(1, layer.in_channels, *(2 * size for size in layer.kernel_size)).to(device, dtype)
    if isinstance(layer, nn.GroupNorm):
        return torch.randn(2, layer.num_channels, 4).to(device, dtype)
    if isinstance(layer, nn.LayerNorm):
        return torch.randn(2, *layer.normalized_shape).to(device, dtype)
    return torch.randn(2, layer.in_features).to(device, dtype)
