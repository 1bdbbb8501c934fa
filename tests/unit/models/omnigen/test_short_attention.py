"""The CPU's short attention in bfloat16 is the fused kernel's, within the format's error."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from simpletuner.models.omnigen.attention import added_mask, attention


def states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 9, 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", ["open", "causal", "masked"])
def test_short_attention_equals_the_exact_result_to_bfloat16(kind):
    generator = torch.Generator().manual_seed(1)
    mask = None
    if kind == "masked":
        mask = (torch.rand(2, 1, 9, 9, generator=generator) > 0.4) | torch.eye(9, dtype=torch.bool)
    exact = scaled_dot_product_attention(
        *(each.double() for each in states()), attn_mask=mask, is_causal=kind == "causal"
    )
    added = None if mask is None else added_mask(mask, torch.bfloat16)
    short = attention(*(each.bfloat16() for each in states()), added, is_causal=kind == "causal")
    torch.testing.assert_close(short.double(), exact, atol=0.02, rtol=0.02)


def test_masked_keys_get_no_gradient():
    query, key, value = (each.bfloat16().requires_grad_() for each in states())
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[..., 4] = False
    attention(query, key, value, added_mask(mask, torch.bfloat16)).float().square().sum().backward()
    assert not key.grad[:, :, 4].any()
    assert not value.grad[:, :, 4].any()
    assert value.grad[:, :, 3].any()


def test_a_mask_is_laid_out_as_the_fused_kernels_want_it():
    """They copy rows that do not begin at multiples of 16 elements, once in each layer."""
    is_seen = torch.rand(2, 1, 9, 21) > 0.4
    mask = added_mask(is_seen, torch.bfloat16)
    assert mask.shape == is_seen.shape
    assert all(stride % 16 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask == 0, is_seen)
    assert torch.equal(mask == -torch.inf, ~is_seen)
