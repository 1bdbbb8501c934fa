"""LoKr's forward pass at the speed that its structure allows.

LyCORIS applies `kron(w1, w2)` by building it; its bypass mode does not build it, but moves the activations through
transposed copies. Here the two factors are two matrix products: `w2` within each block of features, `w1` across the
blocks.

Source: Yeh et al., "Navigating Text-To-Image Customization" (arXiv 2309.14859), section 3.3.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from lycoris.modules.lokr import LokrModule


def kron_linear(x: Tensor, w1: Tensor, *w2_chain: Tensor) -> Tensor:
    """`x @ kron(w1, w2).T` without the Kronecker product.

    Since `kron(w1, w2)[i * c + k, j * d + l] = w1[i, j] * w2[k, l]`, the input is b blocks of d features.

    Args:
        x: (..., b * d).
        w1: (a, b).
        w2_chain: (c, d); or the factors of a low-rank w2 in the order in which they apply: (r, d), (c, r).

    Returns:
        (..., a * c).
    """
    within = x.reshape(-1, w1.shape[1], w2_chain[0].shape[1])  # (N, b, d)
    for factor in w2_chain:
        within = F.linear(within, factor)  # (N, b, c)
    # An expanded batch of small products: no transposed copy, unlike matmul, which folds w1 into the batch.
    across = torch.bmm(w1.expand(within.shape[0], *w1.shape), within)  # (N, a, c)
    return across.reshape(*x.shape[:-1], -1)


def lokr_delta(module: LokrModule, x: Tensor, scale: float = 1.0) -> Tensor:
    """What a LoKr module on a linear layer adds to that layer's output; replaces `bypass_forward_diff`."""
    w1 = module.lokr_w1 if module.use_w1 else module.lokr_w1_a @ module.lokr_w1_b
    w2_chain = (module.lokr_w2,) if module.use_w2 else (module.lokr_w2_b, module.lokr_w2_a)
    # Scaled here, because w1 is the smallest tensor.
    scale = module.scale * scale
    if scale != 1:
        w1 = w1 * scale
    if isinstance(module.scalar, nn.Parameter):  # use_scalar
        w1 = w1 * module.scalar
    return module.drop(kron_linear(x, w1.to(x.dtype), *(factor.to(x.dtype) for factor in w2_chain)))


def use_structured_forward(module: LokrModule) -> None:
    """Let a LoKr module on a linear layer compute by `lokr_delta`; keys and parameters stay as they are.

    The module's own `forward` stays in charge (module dropout, multiplier). Not for weight decomposition and not for
    rank dropout, both of which need the product itself.
    """
    module.bypass_mode = True
    module.bypass_forward_diff = MethodType(lokr_delta, module)
