"""An adapter trained here works on the stock transformer, loaded by LyCORIS alone."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel

from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.batch import Batch
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.runs import LYCORIS
from tests.unit.models.omnigen.reference import stock_row


def test_a_saved_lokr_gives_the_same_output_on_the_stock_transformer(omnigen_folder: Path, tmp_path: Path):
    from lycoris import create_lycoris_from_weights

    family = OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)
    denoiser = family.load_denoiser()
    adapter = attach_lycoris(denoiser, LYCORIS, OMNIGEN, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapter.save(tmp_path / "adapter.safetensors", {})

    prompts = ["a cat", "a green star on a white background"]
    latents, sigmas = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0.2, 0.7])
    embeds = family.encode_prompts(prompts)
    batch = Batch(latents, embeds, [0, 1], ["", ""], torch.ones(2), "test")
    stock = OmniGenTransformer2DModel.from_pretrained(omnigen_folder / "transformer")
    with torch.no_grad():
        trained = family.predict(denoiser, latents, sigmas, family.collate(batch))
        untouched = -stock_row(stock, latents[0], 1 - sigmas[0], embeds[0].tensors["input_ids"])
        network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "adapter.safetensors"), stock)
        network.apply_to()
        for index, row in enumerate(embeds):
            theirs = -stock_row(stock, latents[index], 1 - sigmas[index], row.tensors["input_ids"])
            torch.testing.assert_close(trained[index], theirs, rtol=0, atol=1e-5)
    assert (trained[0] - untouched).abs().max() > 1e-2
