"""Draws are functions of their key; containers of a batch give what was put in."""

from __future__ import annotations

import hashlib

import pytest
import torch
from PIL import Image

from simpletuner.batch import Conditioning, PromptImage
from simpletuner.randomness import keyed_generator, keyed_seed, keyed_uniform, reseed_global


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


def test_the_accelerator_in_use_is_seeded_with_the_same_number(monkeypatch) -> None:
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: seeded.append(("cuda", seed)))
    monkeypatch.setattr(torch.mps, "manual_seed", lambda seed: seeded.append(("mps", seed)))
    for cuda, mps in ((True, True), (False, True), (False, False)):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        reseed_global("step", 3)
    assert seeded == [("cuda", keyed_seed("step", 3)), ("mps", keyed_seed("step", 3))]


def test_a_generator_is_torch_s_for_the_seed_of_its_key() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(keyed_seed("a", 1)))
    assert torch.equal(torch.rand(3, generator=keyed_generator("a", 1)), expected)


def test_an_image_for_encoders_is_told_by_its_pixels_and_one_of_known_size_has_none() -> None:
    gray = Image.new("L", (3, 2), 7)
    image = PromptImage.of(gray)
    content = hashlib.sha256(b"(3, 2)" + bytes([7] * 18)).hexdigest()
    assert (image.height, image.width, image.content) == (2, 3, content)
    assert (image.load().mode, image.load().size) == ("RGB", (3, 2))
    assert PromptImage.of(Image.new("RGB", (2, 3), (7, 7, 7))) != image == PromptImage(2, 3, content)
    with pytest.raises(ValueError, match="only the size of this reference image is known"):
        PromptImage(2, 3).load()


def test_a_row_of_what_a_denoiser_is_given_has_its_tensors_references_and_tokens() -> None:
    whole = Conditioning({"a": torch.arange(6).reshape(3, 2)}, [["x"], [], ["y", "z"]], (5, 6, 7))
    row = whole.row(2)
    assert row["a"].tolist() == [[4, 5]]
    assert (row.references, row.num_tokens) == ([["y", "z"]], (7,))
    more = whole.with_tensors(b=torch.ones(3), a=torch.zeros(3))
    assert (sorted(more.tensors), more["a"].tolist(), more.num_tokens) == (["a", "b"], [0.0, 0.0, 0.0], (5, 6, 7))
    assert whole["a"].shape == (3, 2)
