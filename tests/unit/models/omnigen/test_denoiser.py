"""The installed forward pass against the stock transformer, run row by row under a dense mask."""

from __future__ import annotations

import copy

import pytest
import torch

from simpletuner.batch import PromptEmbeds
from simpletuner.models.omnigen.denoiser import install
from simpletuner.models.omnigen.tokens import TokenRows, collate_tokens
from tests.tiny import tiny_omnigen_transformer
from tests.unit.models.omnigen.reference import stock_row

CPU = torch.device("cpu")


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(10, 500, (length,), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(*lengths: int) -> tuple[list[torch.Tensor], TokenRows]:
    each = [ids(length, seed) for seed, length in enumerate(lengths)]
    return each, collate_tokens([PromptEmbeds({"input_ids": row}) for row in each], [], CPU)


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9), (12, 3), (1, 6, 4)])
def test_rows_of_a_batch_equal_stock_rows_run_alone(lengths: tuple[int, ...]):
    stock = tiny_omnigen_transformer()
    denoiser = install(copy.deepcopy(stock))
    each, rows = rows_of(*lengths)
    latents, timesteps = noise(len(lengths), 4, 8, 12), torch.linspace(0.1, 0.9, len(lengths))
    with torch.no_grad():
        together = denoiser(latents, timesteps, rows)
        for index, row in enumerate(each):
            alone = stock_row(stock, latents[index], timesteps[index], row)
            torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-5)


def test_each_row_chooses_its_own_rotary_factors():
    """20 positions is the switch here: 16 patches, time and 3 ids stay short, one id more turns long."""
    stock = tiny_omnigen_transformer(original_max_position_embeddings=20)
    denoiser = install(copy.deepcopy(stock))
    each, rows = rows_of(3, 4)
    latents, timesteps = noise(2, 4, 8, 8), torch.tensor([0.3, 0.3])
    with torch.no_grad():
        together = denoiser(latents, timesteps, rows)
        alone = torch.stack([stock_row(stock, latents[i], timesteps[i], each[i]) for i in range(2)])
        only_short = stock_row(tiny_omnigen_transformer(), latents[1], timesteps[1], each[1])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (only_short - alone[1]).abs().max() > 1e-3


def test_input_images_are_read_as_the_stock_model_reads_them():
    stock = tiny_omnigen_transformer()
    denoiser = install(copy.deepcopy(stock))
    references = [noise(4, 4, 6, seed=5), noise(4, 2, 4, seed=6)]
    spans = [(3, 9), (12, 14)]
    with_images = PromptEmbeds(
        {"input_ids": ids(20), "reference_spans": torch.tensor([[*spans[0], 0], [*spans[1], 1]])}
    )
    rows = collate_tokens([with_images, PromptEmbeds({"input_ids": ids(23, 1)})], [references, []], CPU)
    latents, timesteps = noise(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        together = denoiser(latents, timesteps, rows)
        edited = stock_row(stock, latents[0], timesteps[0], ids(20), references, spans)
        plain = stock_row(stock, latents[1], timesteps[1], ids(23, 1))
    torch.testing.assert_close(together, torch.stack([edited, plain]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9)])
def test_a_text_that_ran_before_gives_the_same_prediction(lengths: tuple[int, int]):
    denoiser = install(tiny_omnigen_transformer(original_max_position_embeddings=24))
    _, rows = rows_of(*lengths)
    with torch.no_grad():
        text = denoiser(None, None, rows, num_image_tokens=16)
        for timestep in (0.0, 0.6):
            latents, timesteps = noise(2, 4, 8, 8, seed=int(10 * timestep)), torch.full((2,), timestep)
            expected = denoiser(latents, timesteps, rows)
            torch.testing.assert_close(denoiser(latents, timesteps, text), expected, rtol=0, atol=1e-5)


def test_the_text_cache_depends_on_the_text():
    denoiser = install(tiny_omnigen_transformer())
    with torch.no_grad():
        one, two = (denoiser(None, None, rows_of(n)[1], num_image_tokens=16) for n in (5, 6))
        latents, timestep = noise(1, 4, 8, 8), torch.tensor([0.5])
        assert (denoiser(latents, timestep, one) - denoiser(latents, timestep, two)).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [(7, 7), (5, 9)])
def test_gradient_checkpointing_gives_the_same_gradients(lengths: tuple[int, int]):
    plain = install(tiny_omnigen_transformer()).train()
    checkpointed = install(tiny_omnigen_transformer()).train()
    checkpointed.enable_gradient_checkpointing()
    calls = []
    original = checkpointed._gradient_checkpointing_func
    checkpointed._gradient_checkpointing_func = lambda *args: calls.append(args) or original(*args)
    latents, timesteps = noise(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    _, rows = rows_of(*lengths)
    for denoiser in (plain, checkpointed):
        denoiser(latents, timesteps, rows).square().mean().backward()
    assert len(calls) == 2
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if "input_image_proj" in name:
            assert one.grad is None
            continue
        assert one.grad.isfinite().all()
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=1e-7, msg=name)


def test_installing_leaves_the_module_tree_and_the_saved_keys():
    stock = tiny_omnigen_transformer()
    denoiser = install(copy.deepcopy(stock))
    assert [name for name, _ in denoiser.named_modules()] == [name for name, _ in stock.named_modules()]
    assert denoiser.state_dict().keys() == stock.state_dict().keys()


def test_a_copy_of_an_installed_denoiser_runs_on_its_own_weights():
    denoiser = install(tiny_omnigen_transformer())
    other = copy.deepcopy(denoiser)
    _, rows = rows_of(5)
    with torch.no_grad():
        before = denoiser(noise(1, 4, 8, 8), torch.tensor([0.5]), rows)
        other.proj_out.weight.zero_()
        other.proj_out.bias.zero_()
        assert other(noise(1, 4, 8, 8), torch.tensor([0.5]), rows).abs().max() == 0
        assert torch.equal(denoiser(noise(1, 4, 8, 8), torch.tensor([0.5]), rows), before)
