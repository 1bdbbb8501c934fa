"""OmniGen's attention without a dense mask, and rotary angles that belong to each row.

Text and time tokens are causal and the generated image sees everything, so two attention calls (one causal, one open)
give the result of one call under a dense mask, and leave the fast kernels usable. The public implementation turns every
row of a batch by the angles of row 0 (`OmniGenSuScaledRotaryEmbedding.forward` keeps `emb[0]`); here each row has its
own positions and its own choice of the short or long factors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from simpletuner.activation_memory.rotation import Rotation
from simpletuner.models.omnigen.tokens import TokenRows

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_omnigen import OmniGenSuScaledRotaryEmbedding

KeysValues = tuple[Tensor, Tensor]

SHORT_SEQUENCE = 256  # keys
MASK_ALIGNMENT = 16  # elements, of torch's memory-efficient kernel


@dataclass(frozen=True)
class AttentionLayout:
    """What the attention layers need to know of a batch; goes through the blocks in the place of a mask.

    A plain object on purpose: FSDP casts tensors and tuples that enter a block to its compute dtype, and angles in
    bfloat16 are wrong at far positions.

    Args:
        cos: (B or 1, 1, S, D) float32, for the tokens that ask.
        sin: like `cos`.
        num_condition: leading tokens that may not see the generated image: text and time, or time alone.
        condition_mask: (B, 1, num_condition, keys) for these, see `added_mask`; None: causal.
        image_mask: (B, 1, 1, keys) likewise for the patches of the generated image; None: they see everything.
        cached: per layer the keys and values of the text, where the text has run before.
        record: takes the keys and values of each layer; None outside the text's own run.
    """

    cos: Tensor
    sin: Tensor
    num_condition: int
    condition_mask: Tensor | None = None
    image_mask: Tensor | None = None
    cached: tuple[KeysValues, ...] | None = None
    record: list[KeysValues] | None = None


@dataclass(frozen=True)
class TextCache:
    """The text's keys and values in every layer: the same at each denoising step, for text sees no time and no noise.

    Args:
        keys_values: per layer (B, heads, T, D) each, keys turned.
        layout: the layout of the tokens that follow: time and the generated image.
    """

    keys_values: tuple[KeysValues, ...]
    layout: AttentionLayout


class OmniGenAttention:
    """Attention processor of one layer; takes an `AttentionLayout` as `attention_mask`."""

    def __init__(self, layer: int):
        self.layer = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: AttentionLayout,
        image_rotary_emb: None = None,
    ) -> Tensor:
        layout = attention_mask
        query = rotate(split_heads(attn.to_q(hidden_states), attn.heads), layout.cos, layout.sin)
        key = rotate(split_heads(attn.to_k(hidden_states), attn.heads), layout.cos, layout.sin)
        value = split_heads(attn.to_v(hidden_states), attn.heads)
        if layout.record is not None:
            layout.record.append((key, value))
        if layout.cached is not None:
            text_key, text_value = layout.cached[self.layer]
            key, value = torch.cat([text_key, key], dim=2), torch.cat([text_value, value], dim=2)
        return attn.to_out[0](attend(query, key, value, layout))


def split_heads(projected: Tensor, num_heads: int) -> Tensor:
    """(B, S, heads * D) -> (B, heads, S, D)."""
    return projected.unflatten(2, (num_heads, -1)).transpose(1, 2)


def added_mask(is_seen: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., keys) bool to what is added to scores: 0 where a key is seen, else minus infinity.

    Made once for all layers: of booleans, or of rows whose beginnings are not aligned, attention would make a copy in
    each layer and keep it. With reference images that is a matrix of thousands of tokens squared.
    """
    num_keys = is_seen.shape[-1]
    row = -(-num_keys // MASK_ALIGNMENT) * MASK_ALIGNMENT
    added = torch.zeros(*is_seen.shape[:-1], row, dtype=dtype, device=is_seen.device)[..., :num_keys]
    return added.masked_fill_(~is_seen, -torch.inf)


def join_heads(*parts: Tensor) -> Tensor:
    """(B, heads, T, D) each -> (B, sum of T, heads * D)."""
    rows = [part.transpose(1, 2) for part in parts]
    return (torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """(B, S, heads * D): the leading tokens among themselves, then the generated image over all keys."""
    split, num_tokens = layout.num_condition, query.shape[2]
    num_keys = key.shape[2] - (num_tokens - split)
    # Time alone after a cached text sees all of its keys, which is what causality means for a last token.
    is_causal = layout.condition_mask is None and layout.cached is None
    leading, generated = query.split([split, num_tokens - split], dim=2)
    condition = attention(leading, key[:, :, :num_keys], value[:, :, :num_keys], layout.condition_mask, is_causal)
    if split == num_tokens:
        return join_heads(condition)
    image = attention(generated, key, value, layout.image_mask)
    return join_heads(condition, image)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """Scaled dot product attention, (B, heads, S, D) each; `mask` (B, 1, S or 1, keys) is added to the scores.

    torch's fused kernel for the CPU is made for long sequences: in bfloat16 with fewer than some hundred keys, two
    plain products are three times as fast, backward included.
    """
    if query.device.type != "cpu" or query.dtype == torch.float32 or key.shape[2] > SHORT_SEQUENCE:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if is_causal:
        mask = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype) @ value


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding over halves, in float32, returned in the dtype of `states` (B, heads, S, D).

    Both halves of the angles are equal.
    """
    if torch.compiler.is_compiling() or not states.requires_grad:
        return _rotate(states, cos, sin)
    return Rotation.apply(_rotate, states, cos, sin)


def _rotate(states: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    half = states.shape[-1] // 2
    turned = states * cos  # float32, as the angles are
    turned[..., :half].addcmul_(states[..., half:], sin[..., half:], value=-direction)
    turned[..., half:].addcmul_(states[..., :half], sin[..., :half], value=direction)
    return turned.to(states.dtype)


def rotary_angles(rope: OmniGenSuScaledRotaryEmbedding, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, S, D) float32 cosines and sines of each row's own positions.

    The frequencies are Phi-3's scaled ones ("su", arXiv 2404.14219): a row whose positions exceed
    `original_max_position_embeddings` uses the long factors, all of it, and others the short ones.

    Args:
        rope: diffusers' own module, for its constants.
        position_ids: (B, S) int64.
    """
    device = position_ids.device
    both = torch.tensor([rope.short_factor, rope.long_factor], dtype=torch.float32)
    short, long = both.to(device, non_blocking=True)
    is_long = position_ids.amax(dim=1, keepdim=True) + 1 > rope.original_max_position_embeddings
    factors = torch.where(is_long, long, short)  # (B, D / 2)
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64, device=device).float() / rope.dim
    frequencies = 1.0 / (factors * rope.base**exponents)
    angles = position_ids[:, :, None].float() * frequencies[:, None]
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    ratio = rope.max_position_embeddings / rope.original_max_position_embeddings
    scale = math.sqrt(1 + math.log(ratio) / math.log(rope.original_max_position_embeddings)) if ratio > 1 else 1.0
    return angles.cos() * scale, angles.sin() * scale


def make_layout(
    rows: TokenRows, num_image_tokens: int, rope: OmniGenSuScaledRotaryEmbedding, dtype: torch.dtype
) -> AttentionLayout:
    """The layout of whole rows: text, time, generated image.

    Args:
        dtype: that attention computes in.
    """
    position_ids = rows.position_ids(num_image_tokens)
    if rows.text_visible is None:
        position_ids = position_ids[:1]
    cos, sin = rotary_angles(rope, position_ids)
    condition_mask = image_mask = None
    if rows.condition_mask is not None:
        condition_mask = added_mask(rows.condition_mask, dtype)
    if rows.text_visible is not None:
        is_seen = nn.functional.pad(rows.text_visible, (0, 1 + num_image_tokens), value=True)
        image_mask = added_mask(is_seen[:, None, None], dtype)
    return AttentionLayout(cos, sin, rows.num_text + 1, condition_mask, image_mask)


def text_part(layout: AttentionLayout) -> AttentionLayout:
    """The layout of the text alone, recording its keys and values."""
    num_text = layout.num_condition - 1
    mask = layout.condition_mask
    return AttentionLayout(
        layout.cos[:, :, :num_text],
        layout.sin[:, :, :num_text],
        num_text,
        None if mask is None else mask[:, :, :num_text, :num_text],
        record=[],
    )


def part_behind_text(layout: AttentionLayout, keys_values: tuple[KeysValues, ...]) -> AttentionLayout:
    """The layout of time and generated image, on the recorded keys and values of the text."""
    num_text = layout.num_condition - 1
    mask = layout.condition_mask
    return replace(
        layout,
        cos=layout.cos[:, :, num_text:],
        sin=layout.sin[:, :, num_text:],
        num_condition=1,
        condition_mask=None if mask is None else mask[:, :, num_text:],
        cached=keys_values,
    )
