"""LyCORIS' fused kernels for LoKr on a GPU, where they are faster than the two products of `lokr.py`.

Which is faster depends on the card and on each shape, so both are tried once for each shape of a run. Theirs must give
the same numbers, and win by a margin: two starts of a run on one card should choose alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simpletuner.adapters.lokr import KronKernels, kron_linear
from simpletuner.precision.timing import median_seconds

if TYPE_CHECKING:
    from lycoris.modules.lokr import LokrModule

NUM_ROWS = 4096  # tokens of an image of 1024 px
MARGIN = 1.1
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Trial:
    """What a try of the kernels on one shape gave.

    Args:
        shapes: of w1 and w2.
        seconds: of one forward and backward pass by ours and theirs; None where theirs gave no right numbers.
        reason: why theirs are not used, other than time.
        known: the choice of an earlier start, which was not timed again.
    """

    shapes: Shapes
    seconds: tuple[float, float] | None
    reason: str = ""
    known: bool | None = None

    @property
    def name(self) -> str:
        return name_of(self.shapes)

    @property
    def is_won(self) -> bool:
        if self.known is not None:
            return self.known
        return self.seconds is not None and self.seconds[0] > MARGIN * self.seconds[1]

    def __str__(self) -> str:
        w1, w2 = self.name.split()
        if self.known is not None:
            chosen = "LyCORIS' kernels" if self.known else "two products"
            return f"LoKr of {w1} and {w2}: {chosen}, as the checkpoint or the main process says"
        if self.seconds is None:
            return f"LoKr of {w1} and {w2}: two products, since LyCORIS' kernels failed: {self.reason}"
        ours, theirs = (1e3 * seconds for seconds in self.seconds)
        chosen = "LyCORIS' kernels" if self.is_won else "two products"
        return f"LoKr of {w1} and {w2}: {chosen} (two products {ours:.2f} ms, LyCORIS' kernels {theirs:.2f} ms)"


def name_of(shapes: Shapes) -> str:
    """`4x4 768x768`."""
    return " ".join("x".join(map(str, shape)) for shape in shapes)


def fused_kernels(device: torch.device) -> KronKernels | None:
    """LyCORIS' kernels for a device; None where it has none (no GPU, neither Triton nor TileLang)."""
    if device.type != "cuda" or find_spec("lycoris.kernels") is None:
        return None
    from lycoris.kernels import fused_backends

    backends = fused_backends(device)
    if not backends:
        return None
    from lycoris.kernels.library import lokr_bypass_bwd, lokr_bypass_fwd

    backend = backends[0]
    return KronKernels(
        backend,
        lambda x, w1, w2: lokr_bypass_fwd(x, w1, w2, 1.0, backend),
        lambda gradient, x, w1, w2: lokr_bypass_bwd(gradient, x, w1, w2, 1.0, backend),
    )


def choose_kernels(
    modules: Iterable[LokrModule],
    kernels: KronKernels,
    device: torch.device,
    dtype: torch.dtype,
    known: Mapping[str, bool] = MappingProxyType({}),
) -> list[Trial]:
    """Let each module compute by `kernels` if they win on its shape; returns the trials, one for each shape.

    Args:
        dtype: of the activations.
        known: `Trial.name` -> what an earlier start of the run chose. That stays: other kernels give other last bits.
    """
    trials: dict[Shapes, Trial] = {}
    for module in modules:
        if not (module.use_w1 and module.use_w2):
            continue
        shapes = tuple(module.lokr_w1.shape), tuple(module.lokr_w2.shape)
        if shapes not in trials:
            trials[shapes] = try_kernels(shapes, kernels, device, dtype, known.get(name_of(shapes)))
        module.kron_kernels = kernels if trials[shapes].is_won else None
    return list(trials.values())


def try_kernels(
    shapes: Shapes, kernels: KronKernels, device: torch.device, dtype: torch.dtype, known: bool | None = None
) -> Trial:
    """Compare the numbers and the time of `kernels` with those of the two products.

    Args:
        known: the choice of an earlier start; kernels that won then are only tried for whether they work.
    """
    if known is False:
        return Trial(shapes, None, "", known)
    (a, b), (c, d) = shapes
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    x, w1, w2 = (each.requires_grad_() for each in (draw(NUM_ROWS, b * d), draw(a, b), draw(c, d)))
    gradient = draw(NUM_ROWS, a * c)

    def ours() -> list[Tensor]:
        output = kron_linear(x, w1, w2)
        return [output, *torch.autograd.grad(output, (x, w1, w2), gradient)]

    def theirs() -> list[Tensor]:
        output = kron_linear(x, w1, w2, kernels=kernels)
        return [output, *torch.autograd.grad(output, (x, w1, w2), gradient)]

    try:
        error = max(_error(found, right) for found, right in zip(theirs(), ours(), strict=True))
        if not error < TOLERANCES[dtype]:
            return Trial(shapes, None, f"an error of {error:.1e}")
        if known:
            return Trial(shapes, None, "", known)
        seconds = median_seconds((ours, theirs), device)
        return Trial(shapes, (seconds[0], seconds[1]))
    except Exception as failure:  # noqa: BLE001 - compilers are missing or fail in ways of their own
        return Trial(shapes, None, (str(failure).strip().splitlines() or [type(failure).__name__])[0])


def _error(found: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.float() - right.float()).abs().max() / right.float().abs().max())
