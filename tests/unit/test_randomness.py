"""Generates are functions of their key."""

from __future__ import annotations

import hashlib

import torch

from simpletuner.randomness import keyed_seed, keyed_uniform, reseed_global


def test_the_parts_of_a_key_are_distinguished() -> None:
    assert keyed_seed(1, "2") != keyed_seed("1", 2)
    assert keyed_seed("ab", "c") != keyed_seed("a", "bc")
    assert 0 <= keyed_seed("a") < 2**63


def test_uniform_numbers_are_uniform() -> None:
    generated = torch.tensor([keyed_uniform("draw", number) for number in range(20_000)])
    assert generated.min() >= 0
    assert generated.max() < 1
    counts = torch.histc(generated, 10, 0, 1)
    assert (counts - 2000).abs().max() < 200  # five deviations of a binomial distribution


def test_the_global_generator_is_seeded_as_torch_does_it() -> None:
    reseed_global("step", 3)
    generated = torch.rand(4)
    torch.manual_seed(keyed_seed("step", 3))
    assert torch.equal(generated, torch.rand(4))


def test_a_seed_is_63_bits_of_blake2b_over_types_and_values() -> None:
    """By the library: b2sum of `int:42<US>str:noise<US>int:-1` with eight bytes; every draw of a run hangs on it."""
    digest = hashlib.blake2b(b"int:42\x1fstr:noise\x1fint:-1", digest_size=8).digest()
    assert keyed_seed(42, "noise", -1) == int.from_bytes(digest, "big") // 2
    assert keyed_uniform(42, "noise", -1) == (int.from_bytes(digest, "big") // 2) / 9223372036854775808
