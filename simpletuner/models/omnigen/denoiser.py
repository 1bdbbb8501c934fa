"""diffusers' own OmniGen transformer, with a forward pass that treats each row by itself and can reuse the text.

The module tree, its parameters and its state-dict keys stay the public ones, so an adapter trained here loads there.
Only the instance's `forward` and its attention processors are replaced, together: angles are needed by both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from simpletuner.activation_memory.gates import silu_gated
from simpletuner.activation_memory.recompute import computing_dtype
from simpletuner.models.omnigen.attention import (
    AttentionLayout,
    OmniGenAttention,
    TextCache,
    make_layout,
    part_behind_text,
    text_part,
)
from simpletuner.models.omnigen.tokens import TokenRows

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_omnigen import (
        OmniGenBlock,
        OmniGenFeedForward,
        OmniGenTransformer2DModel,
    )


def install(denoiser: nn.Module) -> OmniGenTransformer2DModel:
    """Give a stock OmniGen transformer this forward pass; returns it."""
    transformer = cast("OmniGenTransformer2DModel", denoiser)
    for layer, block in enumerate(cast("Sequence[OmniGenBlock]", transformer.layers)):
        block.self_attn.set_processor(cast(Any, OmniGenAttention(layer)))
        _replace_forward(block.mlp, feed_forward)
    _replace_forward(transformer, forward)
    return transformer


def _replace_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Of this instance; the class stays as it is."""
    setattr(module, "forward", MethodType(function, module))  # noqa: B010


def forward(
    self: OmniGenTransformer2DModel,
    hidden_states: Tensor | None,
    timestep: Tensor | None,
    condition: TokenRows | TextCache,
    num_image_tokens: int = 0,
) -> Tensor | TextCache:
    """OmniGen's prediction `data - noise`, (B, C, h, w).

    Args:
        hidden_states: (B, C, h, w) noisy latents; None runs the text alone and returns its `TextCache`.
        timestep: (B,) float32 in [0, 1], 0 is noise (OmniGen's own direction).
        condition: the prompts, or what their run returned.
        num_image_tokens: patches of the image that will follow, for the run of the text alone: the length of the
            whole row chooses its rotary factors.
    """
    if hidden_states is None:
        assert isinstance(condition, TokenRows)
        return _run_text(self, condition, num_image_tokens)
    patches = self.patch_embedding(hidden_states, is_input_image=False)
    time_projection = self.time_proj(timestep).type_as(patches)
    parts = [self.time_token(time_projection).unsqueeze(1), patches]
    if isinstance(condition, TextCache):
        layout = condition.layout
    else:
        layout = make_layout(condition, patches.shape[1], self.rope, computing_dtype(patches))
        parts.insert(0, _embed_text(self, condition))
    tokens = _run_blocks(self, torch.cat(parts, dim=1), layout)
    patches = self.norm(tokens[:, -patches.shape[1] :])
    patches = self.proj_out(self.norm_out(patches, temb=self.t_embedder(time_projection)))
    height, width = hidden_states.shape[-2:]
    return _unpatchify(patches, height, width, self.config["patch_size"])


def feed_forward(self: OmniGenFeedForward, hidden_states: Tensor) -> Tensor:
    """(B, S, hidden) -> (B, S, hidden): the stock MLP, of which only the first projection's output is kept."""
    return self.down_proj(silu_gated(self.gate_up_proj(hidden_states)))


def _run_text(self: OmniGenTransformer2DModel, rows: TokenRows, num_image_tokens: int) -> TextCache:
    tokens = _embed_text(self, rows)
    layout = make_layout(rows, num_image_tokens, self.rope, computing_dtype(tokens))
    text_layout = text_part(layout)
    _run_blocks(self, tokens, text_layout)
    keys_values = tuple(text_layout.record or ())
    return TextCache(keys_values, part_behind_text(layout, keys_values))


def _run_blocks(self: OmniGenTransformer2DModel, tokens: Tensor, layout: AttentionLayout) -> Tensor:
    """(B, S, hidden) through all blocks; the layout travels as their `attention_mask`."""
    checkpoint = self._gradient_checkpointing_func if torch.is_grad_enabled() and self.gradient_checkpointing else None
    for block in self.layers:
        if checkpoint is not None:
            tokens = checkpoint(block, tokens, layout, None)
        else:
            tokens = block(tokens, attention_mask=layout, image_rotary_emb=None)
    return tokens


def _embed_text(self: OmniGenTransformer2DModel, rows: TokenRows) -> Tensor:
    """(B, T, hidden): embedded ids, with the patches of input images in their places."""
    embedded = self.embed_tokens(rows.input_ids)
    if not any(rows.reference_spans):
        return embedded
    weight = self.patch_embedding.input_image_proj.weight
    lines = []
    for line, spans, latents in zip(embedded, rows.reference_spans, rows.references, strict=True):
        for start, end, index in spans:
            patches = self.patch_embedding(latents[index][None].to(weight.dtype), is_input_image=True)[0]
            line = torch.cat([line[:start], patches.to(line.dtype), line[end:]])
        lines.append(line)
    return torch.stack(lines)


def _unpatchify(patches: Tensor, height: int, width: int, size: int) -> Tensor:
    """(B, h / p * w / p, p * p * C) -> (B, C, h, w)."""
    grid = patches.unflatten(1, (height // size, width // size)).unflatten(3, (size, size, -1))
    return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
