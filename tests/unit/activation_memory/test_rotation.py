"""Rotary embeddings: the numbers of diffusers' function, whichever way heads and tokens are ordered."""

from __future__ import annotations

import pytest
import torch

from simpletuner.activation_memory.rotation import apply_rotary_emb


@pytest.mark.parametrize("sequence_dim", [1, 2])
def test_each_token_is_turned_by_its_own_angle_in_all_heads(sequence_dim: int) -> None:
    """Three tokens, three heads, one pair of channels: (1, 0) becomes the cosine and sine of the token's angle."""
    angles = torch.tensor([0.0, 0.5, 2.0])
    cos, sin = (values[:, None].expand(3, 2) for values in (angles.cos(), angles.sin()))
    found = apply_rotary_emb(torch.tensor([1.0, 0.0]).expand(1, 3, 3, 2), (cos, sin), sequence_dim=sequence_dim)
    turned = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (tokens, 2)
    expected = turned[:, None].expand(3, 3, 2) if sequence_dim == 1 else turned[None].expand(3, 3, 2)
    torch.testing.assert_close(found, expected[None])
