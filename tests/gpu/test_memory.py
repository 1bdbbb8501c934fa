"""On a GPU: memory is what was planned, running out of it is answered, and no step waits for the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.errors import SimpleTunerError
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.optim.clipping import clip_by_norm
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from simpletuner.training.streams import pin_in_place
from simpletuner.training.swapping import SwappedBlocks
from tests.families.test_device_step import ADAPTERS
from tests.runs import metrics, train_here, write_run
from tests.tiny import tiny_omnigen_folder
from tests.tiny_folders import TINY_FOLDERS

CUDA = torch.device("cuda", 0)
WIDTH = 2048  # 16 MiB a block


def test_swapped_blocks_take_two_buffers_however_far_the_host_is_ahead() -> None:
    """Point 4."""
    blocks = [nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(24)]
    swap = SwappedBlocks(blocks, CUDA)
    recomputing = GradientCheckpointing(CUDA)
    trained = nn.Parameter(torch.zeros(WIDTH, device=CUDA))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        x = torch.ones(4, 16, WIDTH, device=CUDA) + trained
        for block in blocks:
            x = recomputing(block, x)
        x.sum().backward()
    torch.cuda.synchronize()
    rest = torch.cuda.max_memory_allocated() - before
    assert sum(buffer.nbytes for buffer in swap.buffers) == 2 * 4 * WIDTH * WIDTH
    assert rest < 2 * 4 * WIDTH * WIDTH  # activations only: no third block


def test_pinned_weights_take_their_own_size() -> None:
    """Point 16."""
    assert pin_in_place(torch.empty(3 << 20, dtype=torch.uint8)).is_pinned()


def test_measured_checkpointing_fits_a_small_card(tmp_path: Path) -> None:
    """Points 5, 6 and 14: with what is left of a card that another program uses."""
    model = tiny_omnigen_folder(tmp_path / "model", hidden_size=256, num_layers=8)
    torch.cuda.set_per_process_memory_fraction(min(2**31 / torch.cuda.get_device_properties(0).total_memory, 1.0))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto", "model_type": "full"}
    output = train_here(write_run(tmp_path / "run", model, max_train_steps=4, **options))
    assert len(metrics(output, "step_done")) == 4


def test_a_step_without_memory_says_what_helps(tmp_path: Path) -> None:
    """Point 6, from the allocator itself."""
    model = tiny_omnigen_folder(tmp_path / "model", hidden_size=512, num_layers=8)
    torch.cuda.set_per_process_memory_fraction(2**26 / torch.cuda.get_device_properties(0).total_memory)
    with pytest.raises(SimpleTunerError, match=r"(?s)not enough memory on cuda.*gradient_checkpointing"):
        train_here(write_run(tmp_path / "run", model, train_batch_size=4, model_type="full"))


@pytest.mark.parametrize("adapter", ["LoRA", "LoKr", "diag-oft", "boft", "OFT, constrained"])
@pytest.mark.parametrize("name", family_names())
def test_a_step_never_waits_for_the_device(name: str, adapter: str, tmp_path: Path) -> None:
    """Points 18 and 23: torch raises at the first operation that does."""
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](tmp_path)))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    embeds = family.encode_prompts(["a red star", "a moon"])
    batch = empty_batch(family, 64, 64, embeds)
    denoiser: Any = family.load_base()
    trained = ADAPTERS[adapter](denoiser, family).trainable_parameters()
    denoiser.to(CUDA).train()
    family.device = CUDA
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step sets libraries up
        quantiles = torch.tensor([0.3, 0.7], dtype=torch.float64)
        losses = compute_losses(family, denoiser, batch, sample_noise(batch, 0, step), quantiles)
        losses.weighted_sum.backward()
        clip_by_norm(list(trained.values()), 1.0)


def test_padded_rows_give_the_predictions_of_rows_alone(omnigen_folder: Path) -> None:
    """Point 22: the kernels of masks."""
    spec = get_spec("omnigen")
    family = get_family_class(spec)(spec, ModelSource(str(omnigen_folder)), CUDA, torch.float32)
    denoiser = family.load_denoiser().to(CUDA)
    prompts = ["a star", "a very much longer prompt about a blue moon over the sea"]
    latents = torch.randn(2, 4, 8, 8, device=CUDA)
    sigmas = torch.full((2,), 0.5, device=CUDA)

    def predict(rows: list[int]) -> torch.Tensor:
        batch = empty_batch(family, 64, 64, family.encode_prompts([prompts[row] for row in rows]))
        with torch.no_grad():
            return family.predict(denoiser, latents[rows], sigmas[rows], family.collate(batch))

    together = predict([0, 1])
    for row in (0, 1):
        torch.testing.assert_close(together[row], predict([row])[0], rtol=1e-3, atol=1e-3)
