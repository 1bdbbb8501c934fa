"""What each value of `base_model_precision` costs in precision: errors of weight, output and gradient against float64.

A layer of 1024 x 1024 normally distributed weights (standard deviation 0.02) and 256 tokens of normally distributed
activations and gradients, in bf16; the root of the mean square error, relative. On a CPU, where 8-bit products
are made by the same arithmetic as on a GPU.

    python benchmarks/number_formats.py

The table is that of `documentation/MEMORY.md`, which a test compares. The last line is one JSON object.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor, nn

from simpletuner.config.options import all_options
from simpletuner.config.rules.precision import EIGHT_BITS
from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.quantize import NO_CHANGE, get_format

SIZE, TOKENS = 1024, 256


def errors(precision: str, quantizes_activations: bool = False) -> tuple[float, float, float]:
    """(of the weight, of the output, of the gradient to the input) of one format."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, SIZE, generator=generator).bfloat16()

    plain = nn.Linear(SIZE, SIZE, bias=False)
    plain.weight.data = draw(SIZE) * 0.02
    x, gradient = draw(TOKENS).requires_grad_(), draw(TOKENS)
    exact, weight = x.detach().double(), plain.weight.detach().double()
    layer: nn.Linear = plain
    if precision != NO_CHANGE:
        layer = QuantizedLinear(plain, get_format(precision), "", quantizes_activations)
    output = layer(x)
    [found] = torch.autograd.grad(output, x, gradient)
    return (
        _relative(layer.weight, weight),
        _relative(output, exact @ weight.T),
        _relative(found, gradient.double() @ weight),
    )


def _relative(found: Tensor, right: Tensor) -> float:
    return float((found.detach().double() - right).norm() / right.norm())


def rows() -> dict[str, tuple[float, float, float]]:
    """Format -> errors; with quantized activations where a format goes with them."""
    found = {name: errors(name) for name in all_options()["base_model_precision"].choices}
    return found | {
        f"{name}, quantize_activations": errors(name, True) for name in EIGHT_BITS if name != "int8dq-torchao"
    }


def main() -> None:
    found = rows()
    for name, values in found.items():
        print(f"| {name} | {' | '.join(f'{100 * value:.2g} %' for value in values)} |")
    print(json.dumps({name: [round(value, 5) for value in values] for name, values in found.items()}))


if __name__ == "__main__":
    main()
