"""A plain LoRA that comes as near to another adapter as its rank allows: for programs that read nothing else."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simpletuner.adapters.effect import weight_change
from simpletuner.adapters.weights import ALPHA, DOWN, UP, AdapterWeights, Module, alpha_tensor, is_whole_lokr, rank_of
from simpletuner.errors import ConfigError, Problem

# Above this size of the smaller side a full decomposition takes minutes; a randomized one is near enough.
FULL_SVD_SIDE = 1024


def compress(weights: AdapterWeights, denoiser: nn.Module, rank: int) -> tuple[AdapterWeights, float]:
    """The nearest LoRA of a rank in the Frobenius norm, layer by layer (Eckart and Young: the largest singular values).

    Returns:
        the LoRA, and the part of the whole change that is lost: 0 is none of it, 1 all.

    Raises:
        ConfigError: the adapter changes biases or normalizations, which a LoRA cannot.
    """
    layers = dict(denoiser.named_modules())
    modules: dict[str, dict[str, Tensor]] = {}
    lost = whole = 0.0
    for path, module in weights.modules.items():
        if set(module) <= {DOWN, UP, ALPHA} and rank_of(module) <= rank and weights.multiplier == 1:
            modules[path] = dict(module)
            whole += float(weight_change(layers[path], module)[0].square().sum())
            continue
        change, bias = weight_change(layers[path], module, weights.multiplier)
        if bias is not None or change.dim() < 2:
            raise ConfigError(
                Problem(
                    f"{path}: the adapter changes a bias or a normalization, which a plain LoRA cannot hold",
                    key="--rank",
                    fix="export it in the lycoris format, or merge it into the model with --merge",
                )
            )
        nearest = _nearest(change, rank, weights.dtype)
        left = change.flatten(1) - nearest[UP].float().flatten(1) @ nearest[DOWN].float().flatten(1)
        modules[path] = {name: tensor.cpu() for name, tensor in nearest.items()}
        lost += float(left.square().sum())
        whole += float(change.square().sum())
    metadata = {key: value for key, value in weights.metadata.items() if not key.startswith(("ss_", "modelspec."))}
    return AdapterWeights(modules, metadata), (lost / whole) ** 0.5 if whole else 0.0


def rank_that_keeps(weights: AdapterWeights, denoiser: nn.Module, share: float) -> int:
    """The smallest rank of a LoRA that leaves out at most `1 - share` of the whole change, as `compress` counts."""
    layers = dict(denoiser.named_modules())
    spectra = [_spectrum(layers[path], module, weights.multiplier) for path, module in weights.modules.items()]
    longest = max(len(spectrum) for spectrum in spectra)
    energies = torch.stack([nn.functional.pad(spectrum, (0, longest - len(spectrum))) for spectrum in spectra]).sum(0)
    left_out = energies.flip(0).cumsum(0).flip(0)  # by a rank of 0, 1, ...
    return max(1, int((left_out > (1 - share) ** 2 * left_out[0]).sum()))


def _spectrum(layer: nn.Module, module: Module, multiplier: float) -> Tensor:
    """Squared singular values of a layer's change, the largest first, in float64 on the CPU."""
    change = weight_change(layer, module, multiplier)[0].flatten(1)
    if is_whole_lokr(module):  # those of a Kronecker product are the products of its factors' own
        first, second = (torch.linalg.svdvals(module[name].double().flatten(1)) for name in ("lokr_w1", "lokr_w2"))
        values = torch.outer(first, second).flatten().square().sort(descending=True).values
        return values * (change.double().square().sum().cpu() / values.sum().clamp_min(1e-300))
    smaller = change if len(change) <= change.shape[1] else change.T
    return torch.linalg.eigvalsh(smaller @ smaller.T).clamp_min(0).flip(0).double().cpu()


def _nearest(change: Tensor, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A LoRA with scale 1; a convolution's kernel stays with `down`."""
    matrix = change.flatten(1)
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= FULL_SVD_SIDE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, min(rank + 16, *matrix.shape), niter=4)
        vh = v.T
    root = s[:rank].sqrt()
    down = (root[:, None] * vh[:rank]).reshape(rank, *change.shape[1:])
    up = (u[:, :rank] * root).reshape(len(matrix), rank, *[1] * (change.dim() - 2))
    return {DOWN: down.to(dtype), UP: up.to(dtype), ALPHA: alpha_tensor(rank)}
