"""What LoKr costs: its forward and backward over the same frozen layers without an adapter.

Six frozen 3072-wide linears in a row, factor 16, float32 on the CPU, 1024 tokens; the gradient to the input is taken in
every case. Measured in one run against the least that two plain matrix products per layer can cost, and against
LyCORIS' own two ways. The last line is JSON; the exit code is 1 when the cost is above `--limit` of the two products.

    python benchmarks/lokr_cost.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from simpletuner.adapters.lokr import use_structured_forward
from simpletuner.adapters.lycoris import isolated_lycoris

LAYERS, WIDTH, TOKENS, FACTOR = 6, 3072, 1024, 16
LIMIT = 1.03

Layer = Callable[[Tensor], Tensor]


class TwoProducts(nn.Module):
    """The yardstick: a frozen layer plus w2 within blocks and w1 across them, written as two `matmul`."""

    def __init__(self, layer: nn.Linear, module: LokrModule):
        super().__init__()
        self.layer, self.w1, self.w2 = layer, module.lokr_w1, module.lokr_w2

    def forward(self, x: Tensor) -> Tensor:
        within = F.linear(x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1])), self.w2)
        return self.layer(x) + torch.matmul(self.w1, within).flatten(-2)


def build_cases() -> dict[str, list[Layer]]:
    """The same frozen layers and the same LoKr weights, computed in each way."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(LAYERS)]
    modules = []
    for layer in layers:
        module = LokrModule("lokr", layer, lora_dim=10000, factor=FACTOR)
        nn.init.normal_(module.lokr_w2, std=0.01)
        modules.append(module)
    ways = {name: [] for name in ("lycoris_default", "lycoris_bypass", "ours")}
    for layer, module in zip(layers, modules, strict=True):
        for name, ways_layers in ways.items():
            copy = LokrModule("lokr", layer, lora_dim=10000, factor=FACTOR, bypass_mode=name != "lycoris_default")
            copy.load_state_dict(module.state_dict())
            if name == "ours":
                use_structured_forward(copy)
            ways_layers.append(copy)
    products = [TwoProducts(layer, module) for layer, module in zip(layers, modules, strict=True)]
    return {"frozen": list(layers), "two_products": products, **ways}


def forward_backward(layers: list[Layer], inputs: Tensor) -> tuple[float, Tensor]:
    """(seconds, output) of one pass."""
    x = inputs.clone().requires_grad_()
    started = time.perf_counter()
    output = x
    for layer in layers:
        output = layer(output)
    output.sum().backward()
    return time.perf_counter() - started, output.detach()


def largest_difference(cases: dict[str, list[Layer]], inputs: Tensor) -> float:
    """Of our output from LyCORIS' default, layer by layer, relative to the largest value."""
    with torch.no_grad():
        pairs = [
            (ours(inputs), default(inputs))
            for ours, default in zip(cases["ours"], cases["lycoris_default"], strict=True)
        ]
    return max(float((ours - default).abs().max() / default.abs().max()) for ours, default in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--limit", type=float, default=LIMIT)
    arguments = parser.parse_args()

    with isolated_lycoris():  # keeps its log lines off the terminal
        cases = build_cases()
    inputs = torch.randn(1, TOKENS, WIDTH)
    for layers in cases.values():
        forward_backward(layers, inputs)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.pairs):
        for name, layers in cases.items():
            seconds[name].append(forward_backward(layers, inputs)[0])
    # Ratios within a round: what slows the machine for a while slows both sides.
    over_frozen = {
        name: statistics.median(a / b for a, b in zip(times, seconds["frozen"], strict=True))
        for name, times in seconds.items()
    }
    over_products = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["two_products"], strict=True))
    difference = largest_difference(cases, inputs)
    passed = over_products <= arguments.limit and difference <= 1e-5
    for name, ratio in over_frozen.items():
        print(f"{name:16} {statistics.median(seconds[name]):7.3f} s  {ratio:5.2f} of frozen")
    result = {
        "ours_over_two_products": round(over_products, 4),
        "limit": arguments.limit,
        "over_frozen": {name: round(ratio, 4) for name, ratio in over_frozen.items()},
        "difference_from_lycoris_default": difference,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "passed": passed,
    }
    print(json.dumps(result))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
