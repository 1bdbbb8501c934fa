"""OmniGen in the project's convention: numbers worked out by hand, and its rows in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.batch import Batch, PromptEmbeds, PromptImage
from simpletuner.diffusion.loss import sample_means
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.losses.l2 import squared_error
from tests.unit.models.omnigen.reference import stock_row


@pytest.fixture
def family(omnigen_folder: Path) -> OmniGen:
    return OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def batch_of(family: OmniGen, latents: torch.Tensor, prompts: list[str]) -> Batch:
    return Batch(
        latents=latents,
        prompt_embeds=family.encode_prompts(prompts),
        slots=list(range(len(prompts))),
        digests=[""] * len(prompts),
        loss_weights=torch.ones(len(prompts)),
        dataset_id="test",
    )


class Recorder(torch.nn.Module):
    """Stands in for the denoiser: remembers what it was asked, and answers `answer`."""

    def __init__(self, answer: torch.Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, condition: object) -> torch.Tensor:
        self.noisy_latents, self.timestep = hidden_states, timestep
        return self.answer


def test_noisy_latents_target_time_and_loss_are_the_numbers_of_the_paper(family: OmniGen):
    """Data 2, noise -1, sigma 0.25: OmniGen's t is 0.75, x_t = 0.75 * 2 + 0.25 * -1 = 1.25, the answer 2 - -1 = 3.

    An answer of 2.5 is wrong by 0.5, and its loss 0.25.
    """
    data, noise, sigmas = torch.full((1, 4, 2, 2), 2.0), torch.full((1, 4, 2, 2), -1.0), torch.tensor([0.25])
    denoiser = Recorder(torch.full((1, 4, 2, 2), 2.5))
    conditioning = family.collate(batch_of(family, data, ["a cat"]))
    noisy_latents = family.make_noisy(data, noise, sigmas)
    velocity = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    target = family.make_target(data, noise, sigmas)

    assert denoiser.timestep.tolist() == [0.75]
    assert denoiser.noisy_latents.unique().tolist() == [1.25]
    assert velocity.unique().tolist() == [-2.5]
    assert target.unique().tolist() == [-3.0]
    assert sample_means(squared_error(velocity, target)).tolist() == [0.25]


def test_training_times_are_sigmoids_of_a_standard_normal(family: OmniGen):
    """Phi(1) = 0.841345: that quantile is one deviation up, and sigmoid(1) = 0.731059; its mirror is 1 - that."""
    quantiles = torch.tensor([0.158655254, 0.5, 0.841344746], dtype=torch.float64)
    sigmas = family.sigmas_at(quantiles, torch.zeros(3, 4, 8, 8))
    torch.testing.assert_close(sigmas, torch.tensor([0.268941421, 0.5, 0.731058579]), rtol=0, atol=1e-6)
    torch.testing.assert_close(1 - sigmas, sigmas.flip(0), rtol=0, atol=1e-6)


def test_predict_is_the_stock_model_with_time_and_sign_turned(family: OmniGen, omnigen_folder: Path):
    from diffusers import OmniGenTransformer2DModel

    stock = OmniGenTransformer2DModel.from_pretrained(omnigen_folder / "transformer")
    latents, sigmas = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    batch = batch_of(family, latents, ["a cat", "a green star on a white background"])
    with torch.no_grad():
        velocity = family.predict(family.load_denoiser(), latents, sigmas, family.collate(batch))
        for index, embeds in enumerate(batch.prompt_embeds):
            expected = -stock_row(stock, latents[index], 1 - sigmas[index], embeds.tensors["input_ids"])
            torch.testing.assert_close(velocity[index], expected, rtol=0, atol=1e-5)


def test_cut_prompts_are_counted(family: OmniGen):
    family.encode_prompts(["a cat", "a red circle on a blue background, " * 200])
    assert family.num_cut_prompts == 1


def test_references_reach_the_denoiser(family: OmniGen):
    denoiser = family.load_denoiser()
    [embeds] = family.encode_prompts(["turn <img><|image_1|></img> green"], [[PromptImage(32, 48)]])
    assert isinstance(embeds, PromptEmbeds)
    outputs = []
    for seed in range(2):
        reference = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(seed))
        batch = batch_of(family, torch.ones(1, 4, 8, 8), ["a cat"])
        batch = Batch(**{**vars(batch), "prompt_embeds": [embeds], "references": [[reference]]})
        with torch.no_grad():
            outputs.append(family.predict(denoiser, batch.latents, torch.tensor([0.5]), family.collate(batch)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
