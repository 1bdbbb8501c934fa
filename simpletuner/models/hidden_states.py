"""States of chosen layers of a language model, as text for a denoiser.

Families take the state before the last layer (Z-Image), several joined for each token (FLUX.2) or stacked (Krea 2), or
the last one before the final norm (Qwen-Image 2.1). Layers behind the last one that is asked for are not computed, and
neither is the head, which would give probabilities of 150,000 words for each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn


def hidden_states(
    encoder: Any, layers: Sequence[int], final_norm: bool = True, *, input_ids: Tensor, **inputs: Any
) -> Tensor:
    """(B, L, K, D): the states of K layers for every token, in the order of `layers`.

    Args:
        encoder: a causal or vision language model of transformers, with or without its head.
        layers: as transformers counts `hidden_states`: 0 is the embeddings, k what layer k reads, -1 the last.
        final_norm: whether the last state is the one behind the final norm, as in transformers 5, or before it.
        input_ids: (B, L).
        inputs: further inputs of the model (`attention_mask`, images).
    """
    decoder = encoder.get_decoder()
    blocks = list(decoder.layers)
    wanted = [layer % (len(blocks) + 1) for layer in layers]
    seen: dict[int, Tensor] = {}

    def keep(number: int, state: Tensor) -> None:
        seen[number] = state
        if len(seen) == len(set(wanted)):
            raise _AllSeen

    with ExitStack() as hooks, torch.no_grad():
        for number in set(wanted):
            if number < len(blocks):
                hooks.enter_context(_reading(blocks[number], number, keep))
            elif final_norm:
                hooks.enter_context(_answering(decoder.norm, number, keep))
            else:
                hooks.enter_context(_reading(decoder.norm, number, keep))
        with suppress(_AllSeen):
            encoder.base_model(input_ids=input_ids, use_cache=False, **inputs)
    return torch.stack([seen[number] for number in wanted], dim=2)


class _AllSeen(Exception):  # ends a forward pass, and is no error
    """All layers that were asked for have been seen."""


def _reading(module: nn.Module, number: int, keep: Any) -> Any:
    """A hook on what `module` is given; a context that removes it."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        keep(number, args[0] if args else kwargs["hidden_states"])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _answering(module: nn.Module, number: int, keep: Any) -> Any:
    """A hook on the output of `module`; a context that removes it."""
    return module.register_forward_hook(lambda _, args, output: keep(number, output))
