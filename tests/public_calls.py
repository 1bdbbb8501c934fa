"""A family beside diffusers' own pipeline on the same folder: prompts, calls of the network, latents, a training step.

For families whose pipeline takes texts. The training step here is written with diffusers and PEFT alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor, nn

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.training.step import compute_losses

PROMPTS, NEGATIVES = ["a cat", "a green star on white"], ["blurred", "of little worth, and dark"]
SIZE = {"height": 64, "width": 96, "num_inference_steps": 3}


def family_of(name: str, folder: Path, file: Path | None = None) -> ModelFamily:
    spec = get_spec(name)
    source = ModelSource(str(folder), file=str(file) if file else None)
    return get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)


def stock_pipeline(name: str, folder: Path) -> Any:
    pipeline = getattr(diffusers, get_spec(name).pipeline_class).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(rows: int, family: ModelFamily, seed: int = 0) -> Tensor:
    shape = (rows, family.spec.latent_channels, SIZE["height"] // 8, SIZE["width"] // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(family: ModelFamily, latents: Tensor, prompts: Sequence[str]) -> Batch:
    rows = family.encode_prompts(prompts)
    return Batch(latents, rows, range(len(rows)), [""] * len(rows), torch.ones(len(rows)), "")


def require_the_images_of_the_stock_pipeline(name: str, folder: Path, **arguments: Any) -> list[Mapping[str, Any]]:
    """From texts, with guidance and negative prompts of other lengths; returns the calls of its network.

    Latents and pixels are those of the family's pipeline around live weights.
    """
    family, stock = family_of(name, folder), stock_pipeline(name, folder)
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
        calls.append({**dict(zip(names, given, strict=False)), **named, "output": output[0]})

    stock.transformer.register_forward_hook(note, with_kwargs=True)
    options = {**SIZE, **arguments, "latents": noise_of(2, family)}
    theirs = stock(PROMPTS, negative_prompt=NEGATIVES, output_type="latent", **options).images
    recorded = list(calls)
    live = family.pipeline(family.load_denoiser(), family.load_vae())
    ours = live(PROMPTS, NEGATIVES, output_type="latent", **options).images
    assert_near(ours, theirs)
    other = live(PROMPTS, None, output_type="latent", **options).images
    assert (ours - other).abs().max() > 1e-4  # negative prompts act
    pixels = live(PROMPTS, NEGATIVES, output_type="pt", **options).images
    expected = stock(PROMPTS, negative_prompt=NEGATIVES, output_type="pt", **options).images
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    return recorded


def training_step_of_diffusers(
    denoiser: Any, inputs: Mapping[str, Tensor], target: Tensor, sign: float
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all weights: the mean of squares of what the network answers and what it should."""
    denoiser.requires_grad_(True)
    loss = (sign * denoiser(**inputs, return_dict=False)[0].float() - target).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}


def require_the_training_step_of_diffusers(
    name: str, folder: Path, inputs: Mapping[str, Tensor], sigmas: Tensor, sign: float, monkeypatch: Any
) -> None:
    """Loss and gradients of all weights and of a LoRA; the network's latents are made here.

    Args:
        inputs: of the network beside its latents: text, mask, time as it counts it.
        sign: of the network's answer, where the velocity is `noise - latents`.
    """
    family, stock = family_of(name, folder), stock_pipeline(name, folder)
    latents, noise = noise_of(2, family, 1), noise_of(2, family, 2)
    level = sigmas.view(-1, 1, 1, 1)
    inputs = {name: each.detach() for name, each in inputs.items()}
    inputs = {"hidden_states": (1 - level) * latents + level * noise, **inputs}
    loss, gradients = training_step_of_diffusers(stock.transformer, inputs, noise - latents, sign)
    monkeypatch.setattr(family, "sigmas_at", lambda quantiles, latents: sigmas)
    batch = batch_of(family, latents, PROMPTS)

    def our_step(denoiser: nn.Module) -> float:
        losses = compute_losses(family, denoiser, batch, noise, torch.zeros(2, dtype=torch.float64))
        (losses.weighted_sum / 2).backward()
        return losses.weighted_sum.item() / 2

    denoiser = family.load_denoiser().requires_grad_(True)
    assert abs(our_step(denoiser) / loss - 1) < 1e-6
    found = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
    assert_near_all(found, gradients)

    stock = stock_pipeline(name, folder)
    layers = [name for name, module in stock.transformer.named_modules() if name.endswith("attn.to_q")]
    stock.transformer.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=layers))
    denoiser = family.load_denoiser()
    adapter = attach_lora(
        denoiser, LoraSettings(rank=2, alpha=3, targets=tuple(layers)), family.spec, torch.float32, seed=0
    )
    parameters = adapter.trainable_parameters()
    theirs = {key.replace(".default", ""): p for key, p in stock.transformer.named_parameters() if p.requires_grad}
    assert theirs.keys() == parameters.keys()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            theirs[key].copy_(parameter)
    stock.transformer.eval()
    loss = (sign * stock.transformer(**inputs, return_dict=False)[0] - (noise - latents)).square().mean()
    loss.backward()
    assert abs(our_step(denoiser) / loss.item() - 1) < 1e-6
    assert_near_all({key: p.grad for key, p in parameters.items()}, {key: p.grad for key, p in theirs.items()})


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-6) -> None:
    """Within a share of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def assert_near_all(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float = 1e-5) -> None:
    """Within a share of the largest value of each."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name],
            tensor,
            rtol=0,
            atol=share * float(tensor.abs().max()) + 1e-8,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def require_rows_alone(family: ModelFamily, embeds: Sequence[Tensor]) -> None:
    """A batch of prompts of these embeddings, whose lengths differ, is its rows computed alone."""
    denoiser, sigmas = family.load_denoiser(), torch.linspace(0.2, 0.9, len(embeds))
    latents = noise_of(len(embeds), family)

    def predict(rows: slice) -> Tensor:
        prompts = [PromptEmbeds({"prompt_embeds": each}) for each in embeds[rows]]
        batch = Batch(latents[rows], prompts, range(len(prompts)), [""], torch.ones(len(prompts)), "")
        with torch.no_grad():
            return family.predict(denoiser, latents[rows], sigmas[rows], family.collate(batch))

    together = predict(slice(None))
    for i in range(len(embeds)):
        torch.testing.assert_close(together[i : i + 1], predict(slice(i, i + 1)), rtol=0, atol=1e-6)
