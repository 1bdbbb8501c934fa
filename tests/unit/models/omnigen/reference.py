"""OmniGen by its public code: the stock transformer, one row at a time, under a dense mask written out here."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel
from torch import Tensor


def dense_mask(num_text: int, num_image: int, spans: Sequence[tuple[int, int]] = ()) -> Tensor:
    """(S, S) of 0 and 1 for an unpadded row: text and time causal, input images open, the generated image sees all."""
    num_tokens = num_text + 1 + num_image
    mask = torch.tril(torch.ones(num_tokens, num_tokens))
    mask[: num_text + 1, num_text + 1 :] = 0
    mask[num_text + 1 :] = 1
    for start, end in spans:
        mask[start:end, start:end] = 1
    return mask


def stock_row(
    transformer: OmniGenTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    input_ids: Tensor,
    references: Sequence[Tensor] = (),
    spans: Sequence[tuple[int, int]] = (),
) -> Tensor:
    """(C, h, w) the stock model's output for one row.

    Args:
        latents: (C, h, w).
        timestep: () in [0, 1], 0 is noise.
        input_ids: (L,).
        references: latents of the input images in the order of `spans`.
    """
    num_image = latents.shape[-2] * latents.shape[-1] // 4
    num_tokens = len(input_ids) + 1 + num_image
    return transformer(
        hidden_states=latents[None],
        timestep=timestep[None],
        input_ids=input_ids[None],
        input_img_latents=[each[None] for each in references],
        input_image_sizes={0: [list(span) for span in spans]} if spans else {},
        attention_mask=dense_mask(len(input_ids), num_image, spans)[None],
        position_ids=torch.arange(num_tokens)[None],
        return_dict=False,
    )[0][0]
