"""RMSNorm that keeps its input alone, where diffusers' keeps copies in float32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467). torch's own function rounds once, at the
end, and is one kernel on a GPU; its output is made again from the input where a layer behind it asks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from simpletuner.activation_memory.recompute import recomputed


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, (..., D); statistics in float32."""
    shape = x.shape[-1:]
    if weight is None:
        return recomputed(lambda x: F.rms_norm(x, shape, None, eps), x)
    return recomputed(lambda x, weight: F.rms_norm(x, shape, weight, eps), x, weight)
