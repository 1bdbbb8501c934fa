"""A small block with all that transformers have in common, and what is compared of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

WIDTH, HEADS, TOKENS = 16, 2, 6


class Lora(nn.Module):
    """A frozen linear layer and a trained one of a low rank beside it."""

    def __init__(self, put_in: int, out: int):
        super().__init__()
        self.base = nn.Linear(put_in, out).requires_grad_(False)
        self.down, self.up = nn.Linear(put_in, 2, bias=False), nn.Linear(2, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 0.5


class Block(nn.Module):
    """What the transformers have in common: modulated norms, rotated queries and keys with norms, an MLP, gates."""

    def __init__(self, adapts_mlp: bool = True):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (Lora(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH // HEADS), nn.RMSNorm(WIDTH // HEADS)
        layer = Lora if adapts_mlp else nn.Linear
        self.up, self.down = layer(WIDTH, 4 * WIDTH), layer(4 * WIDTH, WIDTH)
        for module in (self.norm_q, self.norm_k, self.up, self.down):
            if not isinstance(module, Lora):
                module.requires_grad_(False)

    def forward(self, x: Tensor, shift: Tensor, cos: Tensor, sin: Tensor, text: Tensor) -> Tensor:
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + shift) + shift
        query, key, value = (layer(normed).unflatten(-1, (HEADS, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        query, key = torch.cat([text, self.norm_q(query)], 1), torch.cat([text, self.norm_k(key)], 1)
        value = torch.cat([text, value], 1)
        query, key = (self.rotate(each.float(), cos, sin).type_as(x) for each in (query, key))
        attention = F.scaled_dot_product_attention(*(each.transpose(1, 2) for each in (query, key, value)))
        attention = attention.transpose(1, 2).flatten(2)[:, text.shape[1] :].contiguous()
        x = x + shift * self.to_out(attention)
        normed = F.layer_norm(x, x.shape[-1:]) * (1 + shift) + shift
        return x + shift * self.down(F.gelu(self.up(normed), approximate="tanh"))

    @staticmethod
    def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        real, imaginary = states.reshape(*states.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        return states * cos + turned * sin


def inputs_of(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    angles = torch.randn(1, TOKENS + 2, 1, WIDTH // HEADS, device=device)
    shift = torch.randn(1, 1, WIDTH, dtype=dtype, device=device)
    text = torch.randn(2, 2, HEADS, WIDTH // HEADS, dtype=dtype, device=device)
    x = torch.randn(2, TOKENS, WIDTH, dtype=dtype, device=device, requires_grad=True)
    return x, shift, angles.cos(), angles.sin(), text


def results(block: Any, inputs: tuple[Tensor, ...], wraps: Callable[..., Any] | None = None) -> list[Tensor]:
    """The output, and gradients to the first input and to all that trains."""
    output = block(*inputs) if wraps is None else wraps(block, *inputs)
    trained = [each for each in block.parameters() if each.requires_grad]
    return [output, *torch.autograd.grad(output.float().square().sum(), [inputs[0], *trained])]


def kept_bytes(function: Callable[[], Any], weights: nn.Module) -> int:
    """What autograd saves meanwhile, without weights."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    for weight in weights.parameters():
        found.pop(weight.untyped_storage().data_ptr(), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())
