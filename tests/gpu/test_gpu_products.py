"""On a GPU: products in 8 bits give the numbers of the CPU's, and the trial takes only kernels that do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.product_trials import choose_products
from simpletuner.precision.quantize import get_format

CUDA = torch.device("cuda", 0)


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = layer(x)
    [found] = torch.autograd.grad(output, x, gradient)
    return output.detach().float().cpu(), found.float().cpu()


@pytest.mark.parametrize("num_tokens", [1, 17, 77, 4096])
@pytest.mark.parametrize("precision", ["int8dq-torchao", "fp8-torchao"])
def test_products_in_8_bits_are_those_of_the_processor(precision: str, num_tokens: int) -> None:
    if precision.startswith("fp8") and torch.cuda.get_device_capability(CUDA) < (8, 9):
        pytest.skip("no float8 products before compute capability 8.9")
    torch.manual_seed(0)
    layer = QuantizedLinear(nn.Linear(512, 768).bfloat16(), get_format(precision), "", quantizes_activations=True)
    x, gradient = torch.randn(num_tokens, 512).bfloat16(), torch.randn(num_tokens, 768).bfloat16()
    expected = step(layer, x, gradient)
    layer.to(CUDA)
    choose_products(layer, CUDA, torch.bfloat16, {}, is_timed=False)
    assert "unpacked" not in layer.ways
    for found, right in zip(step(layer, x.to(CUDA), gradient.to(CUDA)), expected, strict=True):
        assert (found - right).norm() < 5e-3 * right.norm()  # bfloat16 rounds the result


def test_a_trial_says_how_each_shape_is_computed() -> None:
    layer = QuantizedLinear(nn.Linear(3072, 3072).bfloat16().to(CUDA), get_format("int8dq-torchao"))
    lines = choose_products(layer, CUDA, torch.bfloat16, {}, is_timed=True)
    assert lines[0].count(" ms unpacked") == 2
