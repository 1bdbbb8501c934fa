"""A mask says where the loss counts: gradients, weights and draws of masked batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from simpletuner.batch import Batch, Sample
from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.data.sampler import Sampler
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.batches import BatchSource, Window
from simpletuner.training.step import compute_losses, sample_noise, sample_quantiles
from tests.configs import config_of
from tests.unit.data.images import build_datasets, options, write_image


class PerElement(nn.Module):
    """A linear denoiser with a weight of its own for each element of (B, 4, 8, 8) latents."""

    def __init__(self, batch_size: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.full((batch_size, 4, 8, 8), 0.5))


@pytest.fixture(scope="module")
def family(omnigen_folder: Path) -> ModelFamily:
    spec = get_spec("omnigen")
    base = get_family_class(spec)

    class Linear(base):
        def predict(self, denoiser, noisy_latents, sigmas, conditioning):
            return denoiser.weight * noisy_latents

    return Linear(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def batch_of(family: ModelFamily, masks: torch.Tensor | None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        latents=torch.randn(2, 4, 8, 8, generator=generator),
        prompt_embeds=family.encode_prompts(["a", "b"]),
        slots=[0, 1],
        digests=["0", "1"],
        loss_weights=torch.ones(2),
        dataset_id="d",
        masks=masks,
    )


def half_masks() -> torch.Tensor:
    """The left half of the first image, one corner of the second."""
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, :, :, :4] = 1
    masks[1, :, :2, :2] = 0.5
    return masks


def losses_of(family: ModelFamily, denoiser: nn.Module, batch: Batch):
    return compute_losses(family, denoiser, batch, sample_noise(batch, 1, 5), sample_quantiles(batch, 1, 5))


def test_outside_of_the_mask_nothing_is_trained(family: ModelFamily) -> None:
    denoiser, masks = PerElement(), half_masks()
    losses_of(family, denoiser, batch_of(family, masks)).weighted_sum.backward()
    gradient = denoiser.weight.grad
    outside = (masks == 0).expand_as(gradient)
    assert gradient[outside].abs().max() == 0
    assert gradient[~outside].abs().min() > 0


def test_a_small_mask_is_no_small_loss(family: ModelFamily) -> None:
    """The mean over the mask, by hand from the errors that no mask has touched."""
    batch = batch_of(family, half_masks())
    noise, quantiles = sample_noise(batch, 1, 5), sample_quantiles(batch, 1, 5)
    sigmas = family.sigmas_at(quantiles, batch.latents).reshape(2, 1, 1, 1).float()
    errors = (0.5 * ((1 - sigmas) * batch.latents + sigmas * noise) - (noise - batch.latents)) ** 2
    losses = losses_of(family, PerElement(), batch)
    torch.testing.assert_close(losses.per_sample[0], errors[0, :, :, :4].mean())
    torch.testing.assert_close(losses.per_sample[1], errors[1, :, :2, :2].mean())
    assert losses.weights.tolist() == [1, 1]


def test_a_mask_of_ones_changes_nothing(family: ModelFamily) -> None:
    whole = losses_of(family, PerElement(), batch_of(family, torch.ones(2, 1, 8, 8)))
    plain = losses_of(family, PerElement(), batch_of(family, None))
    torch.testing.assert_close(whole.per_sample, plain.per_sample)


def test_an_image_whose_mask_is_black_weighs_nothing_in_its_window(family: ModelFamily) -> None:
    masks = half_masks()
    masks[1] = 0
    batch = batch_of(family, masks)
    assert Window(0, [batch, replace(batch, masks=None)], 0, 0).weight == 1 + 2
    losses = losses_of(family, PerElement(), batch)
    assert losses.weights.tolist() == [1, 0]


class Latents:
    """Stands for the VAE: an eighth of the size, four channels."""

    def latents(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        return [torch.zeros(4, s.crop.height // 8, s.crop.width // 8) for s in samples]

    def close(self) -> None:
        pass


def source_of(family: ModelFamily, tmp_path: Path, masking: float, **changes) -> BatchSource:
    for number in range(6):
        write_image(tmp_path / f"images/{number}.png", 96, 64, seed=number)
        mask = np.zeros((64, 96), np.uint8)
        mask[:, 48:] = 255
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{number}.png")
    entries = [
        ImageDataset(id="things", instance_data_dir=tmp_path / "images", conditioning_data="m", **changes),
        ConditioningDataset(id="m", instance_data_dir=tmp_path / "masks", conditioning_type="mask"),
    ]
    datasets = build_datasets(entries, options(), OMNIGEN, tmp_path / "work")
    sampler = Sampler(datasets, 2, seed=1)
    return BatchSource(
        family, datasets, {"things": Latents()}, sampler, config_of(seed=1, masked_loss_probability=masking)
    )


def masks_of(source: BatchSource, num_steps: int = 12) -> torch.Tensor:
    """(steps * 2, 8, 8)"""
    epoch = position = 0
    rows = []
    for step in range(num_steps):
        window = source.build_window(step, epoch, position)
        epoch, position = window.next_epoch, window.next_position
        rows.append(window.batches[0].masks[:, 0])
    source.close()
    return torch.cat(rows)


def test_batches_carry_the_masks_of_their_crops(family: ModelFamily, tmp_path: Path) -> None:
    # 96 x 64 cut in the center: columns 16 .. 79, white from 48 on, which is the fifth of eight latents.
    expected = torch.zeros(8, 8)
    expected[:, 4:] = 1
    masks = masks_of(source_of(family, tmp_path, 1.0))
    assert torch.equal(masks, expected.expand_as(masks))


def test_mirrored_images_have_mirrored_masks(family: ModelFamily, tmp_path: Path) -> None:
    masks = masks_of(source_of(family, tmp_path, 1.0, random_flip=True))
    left, right = masks[:, 0, 0], masks[:, 0, 7]
    assert torch.equal(left, 1 - right)
    assert 0 < left.mean() < 1


def test_masks_count_as_often_as_is_asked_for_and_by_key(family: ModelFamily, tmp_path: Path) -> None:
    generated = masks_of(source_of(family, tmp_path, 0.5), 60)
    is_masked = generated[:, 0, 0] == 0
    assert 0.3 < is_masked.float().mean() < 0.7  # 120 draws, standard deviation 0.05
    assert generated[~is_masked].min() == 1
    assert torch.equal(generated, masks_of(source_of(family, tmp_path, 0.5), 60))
    assert masks_of(source_of(family, tmp_path, 0.0)).min() == 1
