"""Trains the two autoencoders of the tiny OmniGen: the real one (AutoencoderKL) and the preview (AutoencoderTiny).

The diffusion model is never exact, so the decoder learns from noisy latents: what it generates stays crisp when the
latents are a little off. Latents are held at zero mean and unit variance per channel during training, so that no
channel is wasted and one scaling factor fits all of them.

    python scripts/tiny_omnigen/train_autoencoders.py --output build/tiny_omnigen/autoencoders
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_omnigen.images import (
    num_processes,
    render_anything,
    sample_global_batch,
    sample_training_batch,
    to_images,
    to_pixel_values,
)
from tiny_omnigen.muon import Muon

# (side, batch size, share of the steps): about the same number of pixels in each step.
SIZES = ((64, 16, 0.6), (96, 8, 0.2), (128, 4, 0.2))
LATENT_NOISE = 0.2
KL_WEIGHT = 1e-4
MOMENT_WEIGHT = 0.02
EDGE_WEIGHT = 1.0
WARMUP_STEPS = 100
LEARNING_RATE = 2e-3
MUON_LEARNING_RATE = 0.012
# The VAE starts on small images, many to a batch, and for a while its first three channels are pulled to the
# local mean color; both only shorten the way to colors.
SMALL_SIZE, SMALL_STEPS = (32, 64), 800
GUIDE_STEPS = 400


def build_vae() -> AutoencoderKL:
    """A small VAE whose initialization lets colors through from the first step.

    Group norm over few channels and the usual shrinking convolutions hide the color of a flat area: one group,
    unit-gain convolutions and quiet residual branches learn colors in 200 steps instead of several thousand.
    """
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 48, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=1,
        latent_channels=4,
        sample_size=64,
        force_upcast=True,
    )
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, torch.nn.Conv2d):
                gain = 0.3 if name.endswith(("conv2", "decoder.conv_out")) else 1.0
                torch.nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    torch.nn.init.zeros_(module.bias)
        # The posterior starts narrow: at its default of unit variance the decoder sees mostly noise for long.
        vae.quant_conv.weight[vae.config["latent_channels"] :] *= 0.1
        vae.quant_conv.bias[vae.config["latent_channels"] :] = -5.0
    return vae


def build_preview_decoder() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16, 16),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 3, 2, 1),
    )


def sample_size(rng: random.Random) -> tuple[int, int]:
    side, batch_size, _ = rng.choices(SIZES, weights=[share for *_, share in SIZES])[0]
    return side, batch_size


def image_loss(generated: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """L1 on the pixels, and L1 on the differences of neighbors: a soft edge costs as much as a wrong color."""
    loss = F.l1_loss(generated, true)
    for dim in (-1, -2):
        loss = loss + EDGE_WEIGHT * F.l1_loss(generated.diff(dim=dim), true.diff(dim=dim))
    return loss


def moment_loss(latents: torch.Tensor) -> torch.Tensor:
    """Holds each channel at mean 0 and variance 1 over the batch."""
    mean = latents.mean(dim=(0, 2, 3))
    variance = latents.var(dim=(0, 2, 3))
    return (mean.square() + variance.clamp_min(1e-6).log().square()).mean()


def schedule(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    progress = max(0, step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return min(1.0, (step + 1) / WARMUP_STEPS) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def vae_step_loss(vae: AutoencoderKL, pixel_values: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one step, and of it the loss on the pixels alone."""
    guided = max(0.0, 1 - step / GUIDE_STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        moments = vae.encode(pixel_values).latent_dist
    mean, std = moments.mean.float(), moments.std.float()
    strength = LATENT_NOISE * (1 - guided) * torch.rand(len(mean), 1, 1, 1)
    scale = mean.detach().std(dim=(0, 2, 3), keepdim=True)
    latents = mean + std * torch.randn_like(mean) + strength * scale * torch.randn_like(mean)
    with torch.autocast("cpu", torch.bfloat16):
        generated = vae.decode(latents).sample
    pixels = image_loss(generated.float(), pixel_values)
    divergence = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).mean()
    global_mean = mean[: num_processes(len(mean))]
    guide = F.mse_loss(mean[:, :3], 1.5 * F.avg_pool2d(pixel_values, 8))
    return pixels + KL_WEIGHT * divergence + MOMENT_WEIGHT * moment_loss(global_mean) + guided * guide, pixels


def build_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the weights inside the networks, AdamW for the layers at their ends, norms and biases.

    The ends are where pixels or moments go in or out: layers of at most eight channels on one side.
    """
    inner = {name: p for name, p in model.named_parameters() if p.ndim > 1 and min(p.shape[:2]) > 8}
    rest = [p for name, p in model.named_parameters() if name not in inner]
    adam = torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    return [Muon(inner.values(), lr=MUON_LEARNING_RATE), adam]


def optimize(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    num_steps: int,
    step_loss: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Runs the steps. `step_loss` gives the loss and, of it, what is printed."""
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    started, running = time.monotonic(), 0.0
    for step in range(num_steps):
        loss, shown = step_loss(step)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * schedule(step, num_steps)
            optimizer.step()
        running += shown.item()
        if (step + 1) % 100 == 0:
            seconds = (time.monotonic() - started) / (step + 1)
            name = type(model).__name__
            print(f"{name} {step + 1}/{num_steps} loss {running / 100:.4f}, {seconds:.3f} s/step", flush=True)
            running = 0.0
        after(step + 1)


def train_vae(vae: AutoencoderKL, num_steps: int, seed: int, output: Path) -> None:
    rng = random.Random(seed)

    def step_loss(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, batch_size = SMALL_SIZE if step < SMALL_STEPS else sample_size(rng)
        return vae_step_loss(vae, sample_training_batch(batch_size, side, rng), step)

    def show(step: int) -> None:
        if step % 500 == 0:
            write_sheet(vae, None, output / "sheet.png")

    optimize(vae, build_optimizers(vae), num_steps, step_loss, show)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, seed: int) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over the tiny world, unscaled."""
    rng = random.Random(seed)
    latents = torch.cat([vae.encode(sample_global_batch(32, 64, rng)).latent_dist.mode() for _ in range(32)])
    posterior = vae.encode(sample_global_batch(32, 64, rng)).latent_dist.std
    return {
        "latent_mean": latents.mean(dim=(0, 2, 3)).tolist(),
        "latent_std": latents.std(dim=(0, 2, 3)).tolist(),
        "latent_std_all": [latents.std().item()],
        "posterior_std": posterior.mean(dim=(0, 2, 3)).tolist(),
    }


def train_preview_decoder(preview: AutoencoderTiny, vae: AutoencoderKL, num_steps: int, seed: int) -> None:
    """Scaled latents to pixels for the decoder, pixels to scaled latents for the encoder; the VAE stays as it is."""
    rng = random.Random(seed)

    def step_loss(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        side, batch_size = sample_size(rng)
        pixel_values = sample_training_batch(batch_size, side, rng)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(pixel_values).latent_dist.mode().float() * vae.config["scaling_factor"]
        noisy_latents = latents + LATENT_NOISE * torch.rand(len(latents), 1, 1, 1) * torch.randn_like(latents)
        with torch.autocast("cpu", torch.bfloat16):
            generated, encoded = preview.decode(noisy_latents).sample, preview.encode(pixel_values).latents
        pixels = image_loss(generated.float(), pixel_values)
        return pixels + F.mse_loss(encoded.float(), latents), pixels

    optimize(preview, build_optimizers(preview), num_steps, step_loss)


def resample(
    vae: AutoencoderKL, preview: AutoencoderTiny | None, pixel_values: torch.Tensor, noise: float
) -> list[torch.Tensor]:
    """Rows of a sheet: the images, the VAE's redrawing, the same from noisy latents, and the preview's."""
    latents = vae.encode(pixel_values).latent_dist.mode()
    disturbed = latents + noise * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    rows = [pixel_values, vae.decode(latents).sample, vae.decode(disturbed).sample]
    if preview is not None:
        rows.append(preview.decode(latents * vae.config["scaling_factor"]).sample)
    return rows


@torch.no_grad()
def write_sheet(vae: AutoencoderKL, preview: AutoencoderTiny | None, path: Path, zoom: int = 3) -> None:
    rng = random.Random(7)
    process_group = [sample_global_batch(10, 64, rng) for _ in range(2)]
    anything = to_pixel_values([render_anything(64, 64, rng) for _ in range(10)])
    rows = [row for batch in (*process_group, anything) for row in resample(vae, preview, batch, 0.15)]
    sheet = Image.new("RGB", (10 * 66, len(rows) * 66))
    for y, row in enumerate(rows):
        for x, image in enumerate(to_images(row)):
            sheet.paste(image, (x * 66, y * 66))
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)


@torch.no_grad()
def measure_errors(vae: AutoencoderKL, preview: AutoencoderTiny, seed: int) -> dict[str, float]:
    """Mean absolute error over pixels, in [0, 1]."""
    errors = {}
    for side in (64, 96, 128):
        pixel_values = sample_global_batch(64, side, random.Random(seed))
        names = ("vae", "vae_noisy_latents", "preview")
        _, *generated = resample(vae, preview, pixel_values, 0.15)
        for name, image in zip(names, generated, strict=True):
            errors[f"{name}_error_{side}"] = (image.clamp(-1, 1) - pixel_values).abs().mean().item() / 2
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/tiny_omnigen/autoencoders"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--vae", type=Path, help="a trained VAE folder: trains the preview decoder alone")
    parser.add_argument("--preview-steps", type=int, default=2000)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(arguments.seed)
    if arguments.vae is None:
        vae = build_vae()
        train_vae(vae, arguments.steps, arguments.seed, arguments.output)
        vae.eval().requires_grad_(False)
        deviation = measure_latents(vae, arguments.seed + 1)["latent_std_all"][0]
        vae.register_to_config(scaling_factor=round(1 / deviation, 4))
        vae.save_pretrained(arguments.output / "vae")
    else:
        vae = AutoencoderKL.from_pretrained(arguments.vae).eval().requires_grad_(False)

    torch.manual_seed(arguments.seed)
    preview = build_preview_decoder()
    train_preview_decoder(preview, vae, arguments.preview_steps, arguments.seed + 2)
    preview.eval().save_pretrained(arguments.output / "preview_decoder")
    write_sheet(vae, preview, arguments.output / "sheet.png")

    metrics = {"scaling_factor": vae.config["scaling_factor"], **measure_latents(vae, arguments.seed + 1)}
    metrics |= measure_errors(vae, preview, arguments.seed + 3)
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics))


if __name__ == "__main__":
    main()
