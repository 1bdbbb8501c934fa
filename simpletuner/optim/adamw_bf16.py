"""AdamW for bfloat16 weights, at six bytes per weight, with stochastic rounding.

A bfloat16 number has 8 significant bits: an update below 1/256 of a weight rounds to nothing, and so does Adam's
running second moment, which moves by a thousandth per step. Rounding up or down at random, with the probability that
makes the expected value exact, lets small updates add up. Weights of other dtypes get plain AdamW.

Sources: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (arXiv 1711.05101); Zamirai et al., "Revisiting
BFloat16 Training" (arXiv 2010.06192), for the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from simpletuner.randomness import keyed_seed

# Weights updated at a time: bounds the float32 copies to a few hundred MB.
CHUNK_ELEMENTS = 1 << 24


class AdamWBF16(torch.optim.Optimizer):
    """AdamW; both moments are kept in the dtype of the weights, bfloat16 ones are rounded stochastically.

    The rounding is keyed by (seed, step), and the step is part of the saved state: a resumed run rounds the same way.
    It is counted in the group too, for the tensors that count it for each weight are on the weights' device, and
    reading them would wait for it.

    Args:
        params: as for any torch optimizer.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        seed: of the run.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ):
        self.seed = seed
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        assert closure is None, "AdamW needs no closure"
        chunk_index = 0
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                self._init_state(param)
            is_bf16 = [param.dtype == torch.bfloat16 for param in params]
            plain = [param for param, rounds in zip(params, is_bf16, strict=True) if not rounds]
            if plain:
                self._update(group, plain, [param.grad for param in plain], *self._moments(plain))
            rounded = [param for param, rounds in zip(params, is_bf16, strict=True) if rounds]
            for chunk in _chunks(rounded):
                self._update_rounded(group, chunk, chunk_index)
                chunk_index += 1

    def _init_state(self, param: Tensor) -> None:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The live moments and step counters of some weights."""
        states = [self.state[param] for param in params]
        return (
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
        )

    def _update(
        self,
        group: dict[str, Any],
        values: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """torch's own AdamW, in place, in one fused call where the device has it."""
        beta1, beta2 = group["betas"]
        adamw(
            values,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=values[0].device.type in ("cpu", "cuda", "mps", "xpu"),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _update_rounded(self, group: dict[str, Any], params: list[Tensor], chunk_index: int) -> None:
        """Update float32 copies of a chunk of bfloat16 weights and round the results back."""
        exp_avgs, exp_avg_sqs, steps = self._moments(params)
        live = [*params, *exp_avgs, *exp_avg_sqs]
        sizes = [tensor.numel() for tensor in live]
        # One flat buffer: its pieces are the copies, and the rounding is one pass over the whole.
        flat = torch.cat([tensor.reshape(-1) for tensor in live]).float()
        copies = [piece.view_as(tensor) for piece, tensor in zip(flat.split(sizes), live, strict=True)]
        count = len(params)
        grads = [param.grad.float() for param in params if param.grad is not None]
        self._update(group, copies[:count], grads, copies[count : 2 * count], copies[2 * count :], steps)
        generator = torch.Generator(flat.device)
        generator.manual_seed(keyed_seed("stochastic rounding", self.seed, group["step"], chunk_index))
        rounded = stochastic_bf16(flat, generator)
        torch._foreach_copy_(
            live, [piece.view_as(tensor) for piece, tensor in zip(rounded.split(sizes), live, strict=True)]
        )


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighboring bfloat16 numbers so that the expected value is exact.

    bfloat16 is the upper half of float32: a uniform 16-bit number added to the lower half carries into the upper half
    with exactly the right probability. Values that bfloat16 holds exactly stay.

    Args:
        values: float32, changed in place; NaN stays NaN.
        generator: on the device of `values`.
    """
    bits, is_nan = values.view(torch.int32), values.isnan()
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    bits.add_(noise).bitwise_and_(-(1 << 16))
    # The NaN that GPUs make has all bits set, and would be carried over into a zero.
    return values.masked_fill_(is_nan, float("nan")).to(torch.bfloat16)


def _chunks(params: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of weights with at most `CHUNK_ELEMENTS` elements together, or one larger weight alone."""
    chunk: list[Tensor] = []
    size = 0
    for param in params:
        if chunk and size + param.numel() > CHUNK_ELEMENTS:
            yield chunk
            chunk, size = [], 0
        chunk.append(param)
        size += param.numel()
    if chunk:
        yield chunk
