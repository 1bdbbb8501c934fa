"""Rotary embeddings: the numbers of diffusers' function, whichever way heads and tokens are ordered."""

from __future__ import annotations

from types import FunctionType

import pytest
import torch
from torch import nn

from simpletuner.activation_memory import rotation
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


@pytest.mark.parametrize("is_published", [True, False])
def test_only_a_processor_that_rotates_by_the_function_of_diffusers_rotates_by_ours(is_published: bool) -> None:
    from diffusers.models import embeddings

    class Processor:
        def __call__(self, x: torch.Tensor) -> object:
            return NotImplemented

    def own(x: torch.Tensor) -> str:
        return "own"

    names = {rotation.NAME: embeddings.apply_rotary_emb if is_published else own}
    called = FunctionType(compile(f"lambda self, x: {rotation.NAME}", "a", "eval").co_consts[0], names)
    Processor.__call__ = called  # type: ignore[method-assign]
    module = nn.Module()
    module.processor = Processor()  # type: ignore[assignment]
    rotation.rotate_as_one_product(module)
    used = module.processor(torch.ones(1))  # type: ignore[operator]
    assert used is (apply_rotary_emb if is_published else own)
    assert (type(module.processor) is Processor) != is_published
