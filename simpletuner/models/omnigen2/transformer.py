"""OmniGen2's denoiser: Lumina2's blocks over one sequence of text, reference images and the noisy image.

diffusers has no OmniGen2. Its blocks, norms and embeddings are Lumina2's with the same weights and keys, so these are
diffusers' own classes; what OmniGen2 adds is the way of the reference images: an embedder and a refiner of their own,
an embedding of their place among the references, and positions that count on from image to image.
Source: VectorSpaceLab/OmniGen2 (Apache-2.0); arXiv 2506.18871.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import LuminaLayerNormContinuous
from diffusers.models.transformers.transformer_lumina2 import (
    Lumina2CombinedTimestepCaptionEmbedding,
    Lumina2TransformerBlock,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

MAX_REFERENCES = 5
# The base of the rotary frequencies, as in Lumina2.
THETA = 10000.0


class Segment(NamedTuple):
    """A part of the sequence.

    Args:
        tokens: (B, N, D).
        positions: (B, N, 3) int64, on the axes of the rotary embedding.
        mask: (B, N) bool, which tokens are no padding; None where all are.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor | None


class OmniGen2TransformerBlock(Lumina2TransformerBlock):
    """Lumina2's block under the name by which OmniGen2's own tools wrap it."""


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """The denoiser in the released layout.

    Args:
        patch_size: latents per token, one side.
        in_channels: C of the latents.
        out_channels: None is `in_channels`.
        hidden_size: D of the tokens.
        num_layers: blocks over the whole sequence.
        num_refiner_layers: blocks over the text, over each reference and over the noisy image alone.
        num_attention_heads: of queries.
        num_kv_heads: of keys and values.
        multiple_of: the width of the feed-forward is a multiple of it.
        ffn_dim_multiplier: widens the feed-forward; None leaves it.
        norm_eps: of the norms.
        axes_dim_rope: dimensions of a head that turn with each axis of the positions.
        axes_lens: positions of each axis that the original tabulates, the largest that the model was made for.
        text_feat_dim: D of the text's hidden states.
        timestep_scale: what a time in [0, 1] is multiplied by.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["OmniGen2TransformerBlock"]  # type: ignore[assignment]
    _skip_layerwise_casting_patterns = ["x_embedder", "ref_image_patch_embedder", "norm"]  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: tuple[int, int, int] = (40, 40, 40),
        axes_lens: tuple[int, int, int] = (10000, 10000, 10000),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch_size, self.axes_dim_rope = patch_size, axes_dim_rope
        self.gradient_checkpointing = False
        patch_values = patch_size**2 * in_channels

        def blocks(count: int, modulation: bool = True) -> nn.ModuleList:
            multiplier = cast(float, ffn_dim_multiplier)  # diffusers' type leaves None out, its code does not
            shape = (hidden_size, num_attention_heads, num_kv_heads, multiple_of, multiplier, norm_eps)
            return nn.ModuleList(OmniGen2TransformerBlock(*shape, modulation=modulation) for _ in range(count))

        self.x_embedder = nn.Linear(patch_values, hidden_size)
        self.ref_image_patch_embedder = nn.Linear(patch_values, hidden_size)
        self.time_caption_embed = Lumina2CombinedTimestepCaptionEmbedding(hidden_size, text_feat_dim, norm_eps=norm_eps)
        self.time_caption_embed.time_proj.scale = timestep_scale  # type: ignore[assignment]
        self.noise_refiner = blocks(num_refiner_layers)
        self.ref_image_refiner = blocks(num_refiner_layers)
        self.context_refiner = blocks(num_refiner_layers, modulation=False)
        self.layers = blocks(num_layers)
        self.norm_out = LuminaLayerNormContinuous(
            hidden_size,
            min(hidden_size, 1024),
            elementwise_affine=False,
            eps=1e-6,
            bias=True,
            out_dim=patch_size**2 * self.out_channels,
        )
        self.image_index_embedding = nn.Parameter(0.02 * torch.randn(MAX_REFERENCES, hidden_size))

    def forward(
        self,
        hidden_states: Tensor | Sequence[Tensor],
        timestep: Tensor,
        text_hidden_states: Tensor,
        text_attention_mask: Tensor | None = None,
        ref_image_hidden_states: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> Tensor | list[Tensor]:
        """OmniGen2's prediction `data - noise`, in the form of `hidden_states`.

        Args:
            hidden_states: (B, C, h, w) noisy latents, or a list of B tensors (C, h, w) of different sizes.
            timestep: (B,) in [0, 1], 0 is noise (OmniGen2's own direction).
            text_hidden_states: (B, L, text_feat_dim).
            text_attention_mask: (B, L), nonzero where there is text, from the left; None where all of it is.
            ref_image_hidden_states: per row the latents (C, h, w) of its reference images, or None.

        Raises:
            ValueError: a row has more references than the model has embeddings for.
        """
        references = [row or () for row in ref_image_hidden_states or [None] * len(hidden_states)]
        if any(len(row) > MAX_REFERENCES for row in references):
            raise ValueError(f"OmniGen2 takes at most {MAX_REFERENCES} reference images")
        text_mask = None if text_attention_mask is None else text_attention_mask.bool()
        noisy = self.x_embedder(pad_sequence([self._patches(row) for row in hidden_states], batch_first=True))
        time, text = self.time_caption_embed(noisy, timestep, text_hidden_states)
        starts = _text_lengths(text, text_mask)
        shifts = [sum(max(self._grid(each)) for each in row) for row in references]
        image_positions = _pad([self._positions(row, shift) for row, shift in zip(hidden_states, shifts, strict=True)])
        image = Segment(noisy, _after(image_positions, starts), _mask([self._size(row) for row in hidden_states], text))

        image = self._refined(self.noise_refiner, image, time)
        reference = self._references(references, starts, time)
        context = self._refined(self.context_refiner, Segment(text, _text_positions(text), text_mask))
        joint = self._refined(self.layers, _joined((context, reference, image)), time)
        output = self.norm_out(joint.tokens[:, -noisy.shape[1] :], time)
        rows = [self._image(tokens, *self._grid(row)) for tokens, row in zip(output, hidden_states, strict=True)]
        return torch.stack(rows) if isinstance(hidden_states, Tensor) else rows

    def _references(self, references: Sequence[Sequence[Tensor]], starts: Tensor, time: Tensor) -> Segment:
        """The references of each row, one behind the other, each refined by itself."""
        images, owners, places, positions = [], [], [], []
        for owner, row in enumerate(references):
            shift = 0
            for place, latents in enumerate(row):
                images.append(latents)
                owners.append(owner)
                places.append(place)
                positions.append(self._positions(latents, shift))
                shift += max(self._grid(latents))
        if not images:
            # One of zeros, of which nothing goes on: processes that share weights fetch the blocks together, and one of
            # them may have no references. So each trained weight has a gradient, too.
            shape = (self.in_channels, self.patch_size, self.patch_size)
            images, owners, places = [time.new_zeros(shape)], [0], [0]
            positions = [self._positions(images[0], 0)]
        tokens = self.ref_image_patch_embedder(_pad([self._patches(each) for each in images]))
        tokens = tokens + torch.stack([self.image_index_embedding[place] for place in places])[:, None]
        placed = _after(_pad(positions), torch.stack([starts[owner] for owner in owners]))
        lengths = [len(each) for each in positions]
        segment = Segment(tokens, placed, _mask(lengths, tokens))
        refined = self._refined(self.ref_image_refiner, segment, torch.stack([time[owner] for owner in owners]))

        counts = [len(row) for row in references]
        own = [range(sum(counts[:row]), sum(counts[: row + 1])) for row in range(len(counts))]

        def of_rows(values: Tensor) -> Tensor:
            return _pad([torch.cat([values[i, : lengths[i]] for i in row] or [values[0, :0]]) for row in own])

        mask = _mask([sum(lengths[i] for i in row) for row in own], tokens)
        return Segment(of_rows(refined.tokens), of_rows(refined.positions), mask)

    def _refined(self, blocks: nn.ModuleList, segment: Segment, time: Tensor | None = None) -> Segment:
        rotary, tokens = self._rotary(segment.positions), segment.tokens
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                inputs = (tokens, segment.mask, rotary, time)
                tokens = self._gradient_checkpointing_func(block, *inputs)  # type: ignore[misc]
            else:
                tokens = block(tokens, segment.mask, rotary, time)
        return segment._replace(tokens=tokens)

    def _rotary(self, positions: Tensor) -> Tensor:
        """(B, N, 3) -> (B, N, D of a head / 2) complex64."""
        # Lumina2 tabulates them in float64 too, where the device has it: positions go into the thousands.
        exact = torch.float32 if positions.device.type == "mps" else torch.float64
        angles = []
        for axis, size in enumerate(self.axes_dim_rope):
            exponents = torch.arange(0, size, 2, dtype=exact, device=positions.device) / size
            angles.append(positions[..., axis, None] * THETA**-exponents)
        turns = torch.cat(angles, dim=-1)
        return torch.polar(torch.ones_like(turns), turns).to(torch.complex64)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return latents.shape[-2] // self.patch_size, latents.shape[-1] // self.patch_size

    def _size(self, latents: Tensor) -> int:
        rows, columns = self._grid(latents)
        return rows * columns

    def _positions(self, latents: Tensor, shift: int) -> Tensor:
        """(N, 3): how far along the sequence of images, row, column."""
        rows, columns = self._grid(latents)
        grid = torch.cartesian_prod(*(torch.arange(count, device=latents.device) for count in (rows, columns)))
        return torch.cat([torch.full_like(grid[:, :1], shift), grid], dim=1)

    def _patches(self, latents: Tensor) -> Tensor:
        """(C, h, w) -> (N, patch_size**2 * C), channels innermost."""
        size = self.patch_size
        grid = latents.unflatten(2, (-1, size)).unflatten(1, (-1, size))
        return grid.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)

    def _image(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """The inverse of `_patches`, of tokens that may be padded."""
        size = self.patch_size
        grid = tokens[: rows * columns].view(rows, columns, size, size, self.out_channels)
        return grid.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)


def _text_lengths(text: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) tokens of text: positions of images begin behind them."""
    if mask is None:
        return torch.full((len(text),), text.shape[1], device=text.device)
    return mask.sum(dim=1)


def _text_positions(text: Tensor) -> Tensor:
    places = torch.arange(text.shape[1], device=text.device)
    return places[None, :, None].expand(len(text), -1, 3)


def _after(positions: Tensor, starts: Tensor) -> Tensor:
    """(B, N, 3) positions, on the first axis behind the text of each row."""
    return positions + F.pad(starts[:, None, None], (0, 2))


def _pad(rows: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(rows), batch_first=True)


def _mask(lengths: Sequence[int], like: Tensor) -> Tensor | None:
    """(B, N) bool of rows of these lengths; None where they are all the same."""
    if len(set(lengths)) == 1:
        return None
    # Filled on the device: a copy of a mask made here would have to be waited for.
    return _pad([torch.ones(length, dtype=torch.bool, device=like.device) for length in lengths])


def _joined(parts: Sequence[Segment]) -> Segment:
    """Segments one behind the other. Padding between them does not matter: attention goes by positions and mask."""
    mask = None
    if any(part.mask is not None for part in parts):
        whole = [torch.ones_like(part.positions[..., 0], dtype=torch.bool) for part in parts]
        masks = [other if part.mask is None else part.mask for part, other in zip(parts, whole, strict=True)]
        mask = torch.cat(masks, dim=1)
    tokens, positions = (torch.cat(each, dim=1) for each in zip(*(part[:2] for part in parts), strict=True))
    return Segment(tokens, positions, mask)
