"""Which products are made in 8 bits on an accelerator: those whose kernels are right and faster than unpacking.

Which is faster depends on the card and on each shape, so all ways are tried once for each shape of a run. An 8-bit way
must give the numbers of the unpacked matrix within the error of its format, and win by a margin: two starts of a run on
one card should choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.products import FAILURES, Way, Ways
from simpletuner.precision.timing import median_seconds

NUM_ROWS = 4096  # tokens of an image of 1024 px
MARGIN = 1.1
LARGEST_ERROR = 0.1  # relative; float8 has 0.04 with normal numbers, a matrix that is read the wrong way round 1.4
IN_8_BITS: tuple[Way, ...] = ("direct", "copied")

Compute = Callable[[Way], Tensor]


@dataclass(frozen=True)
class Choice:
    """How one kind of product is computed, and why."""

    way: Way
    reason: str

    def __str__(self) -> str:
        return f"{'unpacked' if self.way == 'unpacked' else 'in 8 bits'} ({self.reason})"


def choose_products(
    module: nn.Module, device: torch.device, dtype: torch.dtype, known: Mapping[str, Sequence[str]], is_timed: bool
) -> list[str]:
    """Let each layer that quantizes activations compute in the best way; returns a line for each shape that was tried.

    A CPU always multiplies in 8 bits.

    Args:
        device: where they compute; swapped blocks wait elsewhere.
        dtype: of the activations.
        known: what an earlier start of the run, or the main process, chose, as `chosen_products` gives it. That stays
            where it works: other products have other last bits.
        is_timed: take what is fastest, else the first that works.
    """
    chosen: dict[str, Ways] = {}
    lines = []
    for layer in _layers(module):
        name = name_of(layer)
        if name not in chosen and device.type == "cpu":
            chosen[name] = Ways(*cast(Sequence[Way], known[name])) if name in known else layer.ways
        elif name not in chosen:
            output, gradient = try_products(layer, device, dtype, known.get(name), is_timed)
            chosen[name] = Ways(output.way, gradient.way)
            lines.append(f"products of {name}: output {output}, gradient {gradient}")
        layer.ways = chosen[name]
    if lines and not any(way != "unpacked" for ways in chosen.values() for way in ways):
        lines.append("no product in 8 bits wins on this device, so activations are not quantized")
    return lines


def chosen_products(module: nn.Module) -> dict[str, list[str]]:
    """Format and shape -> how output and gradient of such layers are computed."""
    return {name_of(layer): list(layer.ways) for layer in _layers(module)}


def name_of(layer: QuantizedLinear) -> str:
    """`int8 1024x4096`."""
    kind = str(layer.packed_data.dtype).removeprefix("torch.")
    return f"{kind} {layer.out_features}x{layer.in_features}"


def try_products(
    layer: QuantizedLinear, device: torch.device, dtype: torch.dtype, known: Sequence[str] | None, is_timed: bool
) -> tuple[Choice, Choice]:
    """How to compute the layer's output, and the gradient to its input; see `choose_products`."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(columns: int) -> Tensor:
        return torch.randn(NUM_ROWS, columns, generator=generator, device=device, dtype=dtype)

    parts = {name: part.to(device) for name, part in layer.parts.items()}
    x, gradient = draw(layer.in_features), draw(layer.out_features)
    computed: tuple[Compute, Compute] = (
        lambda way: layer.output(x, parts, Ways(way, way)),
        lambda way: layer.gradient(gradient, parts, Ways(way, way)),
    )
    earlier = known or (None, None)
    with torch.no_grad():
        output, backward = (
            _choose(compute, cast(Way | None, way), device, is_timed)
            for compute, way in zip(computed, earlier, strict=True)
        )
    return output, backward


def _choose(compute: Compute, known: Way | None, device: torch.device, is_timed: bool) -> Choice:
    if known == "unpacked":
        return Choice(known, "as before")
    right = compute("unpacked")
    failures = {way: failure for way in IN_8_BITS if (failure := _failure_of(compute, way, right)) is not None}
    working = [way for way in IN_8_BITS if way not in failures]
    if known in working:
        return Choice(known, "as before")
    if not working:
        return Choice("unpacked", failures["direct"])
    if not is_timed:
        return Choice(working[0], "it works here")
    unpacked, *others = median_seconds([partial(compute, way) for way in ("unpacked", *working)], device)
    fastest = min(others)
    way = working[others.index(fastest)] if MARGIN * fastest < unpacked else "unpacked"
    return Choice(way, f"{1e3 * fastest:.2f} ms in 8 bits, {1e3 * unpacked:.2f} ms unpacked")


def _failure_of(compute: Compute, way: Way, right: Tensor) -> str | None:
    """Why this way cannot be used; None where it can."""
    try:
        error = float((compute(way).float() - right.float()).norm() / right.float().norm())
    except FAILURES as failure:
        return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
    return None if error < LARGEST_ERROR else f"an error of {error:.1e} in 8 bits"


def _layers(module: nn.Module) -> Iterator[QuantizedLinear]:
    layers: Iterator[Any] = module.modules()
    return (layer for layer in layers if isinstance(layer, QuantizedLinear) and layer.is_in_8_bits)
