"""Starts of standard LoRA that come from the base's own weights: PiSSA and OLoRA.

Both give the adapter a part of the weight and leave the rest frozen: `W = (W - s B0 A0) + s B0 A0`. PEFT rewrites the
frozen weight for that, so that a file only works on that residual, and the base is gone: prior preservation, a
quantized base and every loader need it. Here the base stays as it is and a frozen second LoRA takes the start away:
`W + s (B A - B0 A0)`, which has the same gradients and is saved as one LoRA of twice the rank, as PEFT's own
conversion does.
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE_STARTS = ("pissa", "pissa_niter_16", "olora")


def start_factors(weight: Tensor, rank: int, scale: float, init: str) -> tuple[Tensor, Tensor]:
    """A0 (rank, in) and B0 (out, rank), float32, so that `scale * B0 @ A0` is a part of the weight.

    PiSSA (arXiv 2404.02948, equations 2 to 4): the largest singular values, their roots on both sides. OLoRA
    (arXiv 2406.01775, section 3): the first columns of Q and rows of R of the QR decomposition.

    Args:
        weight: (out, in), not packed.
        init: one of `BASE_STARTS`; `pissa_niter_16` is the randomized, faster decomposition.
    """
    matrix = weight.detach().float()
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if init == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(matrix, rank, niter=16)
        vh = v.T
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()
