"""The contract between the shared trainer and a model family.

A family writes three methods (`encode_prompts`, `predict`, `pipeline`) and may override the defaults below them. The
shared trainer owns everything else: accumulation, clipping, EMA, masks, eval loss, checkpoints, validation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from simpletuner.activation_memory.modules import reduce_activation_memory
from simpletuner.batch import Batch, Conditioning, PromptEmbeds, PromptImage
from simpletuner.diffusion import flow_matching, timesteps
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec, PredictionType
from simpletuner.models.components import (
    ModelSource,
    component_config,
    load_component,
    load_preview_decoder,
    make_empty_component,
)
from simpletuner.models.single_file import objective_marks
from simpletuner.models.text_encoders import TextEncoders
from simpletuner.models.vae_config import is_video_vae, latent_statistics
from simpletuner.precision.mixed import exact_float32
from simpletuner.precision.quantize import NumberFormats, quantize, require_device

if TYPE_CHECKING:
    from PIL.Image import Image


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device`, without waiting for the copy.

    Through pinned memory: a copy to a GPU out of any other holds the host until it is done.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, dtype, non_blocking=True)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Nothing inside is computed in another number format than its tensors have; on `meta` nothing is anyway."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


# Per prompt its reference images.
PromptReferences = Sequence[Sequence[PromptImage]]


class PromptSource(Protocol):
    """Where the embeddings of prompts come from: a cache, or the family's encoders."""

    def embeds(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """One entry per prompt, on the CPU; may be called from several threads."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""


class EncodedPrompts:
    """Encodes prompts when they are asked for: what families that only tokenize always do."""

    def __init__(self, family: ModelFamily):
        self.family = family

    def embeds(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        return self.family.encode_prompts(prompts, references)

    def close(self) -> None:
        """There is nothing to write."""


@dataclass(frozen=True)
class LatentMoments:
    """What the VAE says about one image, before scaling: the cache keeps this, so a new scale asks for no re-encode.

    Args:
        mean: (C, h, w) float32.
        std: (C, h, w) float32, or None for a deterministic encoder.
    """

    mean: Tensor
    std: Tensor | None = None


class ModelFamily(ABC):
    """One model family, bound to a model folder or hub id.

    Args:
        spec: the facts of the family.
        source: where the weights are.
        device: where the denoiser works.
        dtype: of the denoiser's weights and of its inputs (`mixed_precision`).

    Attributes:
        prompts: where training, evaluation and pipelines take the embeddings of prompts from; the family's own
            encoders, until a cache takes their place.
        encoders: tokenizers and text encoders, for `encode_prompts` alone.
        number_formats: how frozen weights are stored.
    """

    def __init__(self, spec: FamilySpec, source: ModelSource, device: torch.device, dtype: torch.dtype):
        self.spec = spec
        self.source = source
        self.device = device
        self.dtype = dtype
        self.prompts: PromptSource = EncodedPrompts(self)
        self.encoders = TextEncoders(self)
        self.number_formats = NumberFormats()

    # ---- what each family writes -----------------------------------------------------------------------------------

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """Turn prompts into what the denoiser reads: one entry per prompt, unpadded.

        Loads the tokenizer and text encoders on first use (`free_prompt_encoders` drops them). Results may be cached,
        so they must not depend on the other prompts of the call: encoders see prompts padded to one fixed length.
        Everything else asks `self.prompts`.

        Args:
            references: per prompt its reference images; only where `spec.prompts_see_references` is true can more than
                their sizes be asked for.
        """

    @abstractmethod
    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        """The denoiser's output in the canonical sign: for flow families the velocity `noise - latents`.

        Args:
            noisy_latents: (B, C, h, w).
            sigmas: (B,) float32 in [0, 1]; 0 is data.
            conditioning: what `collate` returned.
        """

    @abstractmethod
    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        """A diffusers-like pipeline around live weights, for validation and `simpletuner generate`.

        Called as `pipeline(prompt=..., negative_prompt=..., height=..., width=..., num_inference_steps=...,
        guidance_scale=..., generator=..., callback_on_step_end=...)`, for families with references also with
        `references` (per prompt a list of PIL images); returns an object with `.images` (PIL).
        """

    # ---- what families share ---------------------------------------------------------------------------------------

    @cached_property
    def denoiser_config(self) -> dict[str, Any]:
        """`config.json` of the denoiser."""
        return component_config(self.source, self.spec.component("denoiser"))

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """`scheduler_config.json` of the model, and what a single file says otherwise of its weights."""
        marks = objective_marks(self.source.file) if self.source.file else {}
        return {**component_config(self.source, self.spec.component("scheduler")), **marks}

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        """`config.json` of the VAE; a family whose VAE has statistics of latents among its weights adds them."""
        return component_config(self.source, self.spec.component("vae"))

    @property
    def architecture(self) -> str:
        """What ModelSpec calls these weights; families with several sizes or kinds say which one it is."""
        return self.spec.keys.architecture or self.spec.name

    @property
    def spec_of_weights(self) -> FamilySpec:
        """The facts of the family as they are for these weights: what files made with them say of themselves."""
        keys = replace(self.spec.keys, architecture=self.architecture)
        return replace(self.spec, prediction_type=self.prediction_type, keys=keys)

    def make_scheduler(self) -> Any:
        """The scheduler of diffusers that the model names, for a pipeline."""
        import diffusers

        return getattr(diffusers, self.scheduler_config["_class_name"]).from_config(self.scheduler_config)

    def training_shift(self, num_patches: int) -> float:
        """How far training moves sigmas toward noise: as the scheduler of the model says.

        A family overrides it where its pipeline shifts in another way than it was trained, or where distilled weights
        have one shift for all sizes.
        """
        return timesteps.scheduler_shift(self.scheduler_config, num_patches)

    def scheduler_sigmas(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        """(B,) logit-normal sigmas, moved by `training_shift`."""
        num_patches = latents.shape[-2] * latents.shape[-1] // self.spec.patch_size**2
        shift = torch.tensor(self.training_shift(num_patches))
        return timesteps.shifted_sigmas(timesteps.logit_normal_sigmas(quantiles), shift.expand(len(quantiles)))

    def predict_each(
        self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """`predict` for one sample after the other, where their references or prompts do not fit one batch."""
        rows = [
            self.predict(denoiser, noisy_latents[i : i + 1], sigmas[i : i + 1], conditioning.row(i))
            for i in range(len(noisy_latents))
        ]
        return torch.cat(rows)

    def condition_on(self, prompts: Sequence[PromptEmbeds], references: Sequence[Sequence[Tensor]]) -> Conditioning:
        """What a denoiser is told of prompts and references, on `self.device`, numbers in `self.dtype`.

        Embeddings are padded and stacked under the names that they have. Where rows of `prompt_embeds` (B, L, D) are
        padded, `prompt_mask` (B, L) says which of them are text.
        """
        tensors = {}
        for name in prompts[0].tensors:
            padded = nn.utils.rnn.pad_sequence([row.tensors[name] for row in prompts], batch_first=True)
            tensors[name] = send(padded, self.device, self.dtype if padded.is_floating_point() else None)
        num_tokens = [len(row.tensors["prompt_embeds"]) for row in prompts if "prompt_embeds" in row.tensors]
        if len(set(num_tokens)) > 1:
            masks = [torch.ones(length, dtype=torch.bool) for length in num_tokens]
            tensors["prompt_mask"] = send(nn.utils.rnn.pad_sequence(masks, batch_first=True), self.device)
        seen = [[send(each, self.device, self.dtype) for each in row] for row in references]
        return Conditioning(tensors, seen or [()] * len(prompts), num_tokens)

    # ---- defaults a family may override ----------------------------------------------------------------------------

    # Ways of the VAE to take less memory, as diffusers calls them: "slicing", "tiling".
    vae_modes: tuple[str, ...] = ()

    # `tokenizer_max_length`, for families that read prompts of several lengths.
    prompt_length: int | None = None

    # `clip_skip`: the layer of CLIP that is the text, counted from the last.
    clip_skip: int = 1

    # Whether `encode_prompts` reads each prompt by itself. Others get them in batches of one size, or the last bits of
    # their embeddings would depend on the company.
    reads_prompts_singly: bool = False

    # `force_zeros_for_empty_prompt`, where it is set: whether an empty prompt is zeros.
    force_zeros_for_empty_prompt: bool | None = None

    # Prompts so far that were longer than `spec.max_prompt_tokens` and were cut; `encode_prompts` counts them.
    num_cut_prompts: int = 0

    def largest_side(self) -> int | None:
        """Pixels: the longest side of an image that these weights take; None where there is no limit."""
        return self.spec.max_size

    def load_denoiser(self) -> nn.Module:
        """The denoiser in `self.dtype` on the CPU, in eval mode, without gradients."""
        denoiser = load_component(self.source, self.spec.component("denoiser"), self.dtype, self.spec.keys)
        reduced = reduce_activation_memory(denoiser.eval().requires_grad_(False), self.spec.block_classes)
        return self.adjust_denoiser(reduced)

    def adjust_denoiser(self, denoiser: Any) -> nn.Module:
        """A denoiser with parts in place of those of diffusers that compute the same in another way."""
        return denoiser

    def load_base(self) -> nn.Module:
        """The denoiser as it trains or generates: its blocks' weights packed as `number_formats` says.

        Raises:
            ConfigError: none of its layers can be packed, or this device cannot compute with them.
        """
        formats = self.number_formats
        require_device(formats, self.device, self.dtype)
        return quantize(
            self.load_denoiser(),
            formats.base,
            block_classes=self.spec.block_classes,
            kept=self.spec.unquantized,
            device=self.device if formats.packs_on_device else None,
            quantizes_activations=formats.quantizes_activations,
        )

    def load_vae(self) -> nn.Module:
        """The VAE in float32 (half precision adds noise to latents), in eval mode, on `self.device`."""
        vae: Any = self._with_modes(load_component(self.source, self.spec.component("vae"), torch.float32))
        if self.device.type == "cpu" and not is_video_vae(vae.config):
            # What kernels of the CPU compute with: another layout is copied for each convolution, a tenth of the time.
            vae.to(memory_format=torch.channels_last)
        return vae.eval().requires_grad_(False).to(self.device)

    def empty_denoiser(self) -> nn.Module:
        """The denoiser without values, on torch's `meta` device in `self.dtype`: shapes to count, no weights read.

        What `load_denoiser` does after loading is done here too.
        """
        denoiser = make_empty_component(self.source, self.spec.component("denoiser"), self.dtype)
        return self.adjust_denoiser(reduce_activation_memory(denoiser, self.spec.block_classes))

    def empty_vae(self) -> nn.Module:
        """The VAE as `load_vae` gives it, without values, on torch's `meta` device."""
        return self._with_modes(make_empty_component(self.source, self.spec.component("vae"), torch.float32))

    def _with_modes(self, vae: nn.Module) -> nn.Module:
        """Turn on slicing or tiling, where they are asked for.

        Raises:
            ConfigError: this VAE cannot.
        """
        for mode in self.vae_modes:
            switch = getattr(vae, f"enable_{mode}", None)
            if switch is None:
                message = f"{type(vae).__name__}, the VAE of this model, has no {mode}"
                raise ConfigError(Problem(message, key=f"vae_enable_{mode}", fix="remove the key"))
            switch()
        return vae

    @property
    def max_prompt_tokens(self) -> int:
        """Tokens of a prompt that these weights read; longer ones are cut."""
        return self.prompt_length or self.spec.max_prompt_tokens

    @property
    def prompt_settings(self) -> dict[str, Any]:
        """What the configuration says of how prompts are encoded, where it is not the default."""
        keys = ("prompt_length", "clip_skip", "force_zeros_for_empty_prompt")
        return {key: getattr(self, key) for key in keys if getattr(self, key) != getattr(ModelFamily, key)}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int] | None:
        """Tokens of each prompt before anything is cut, template included; None where the family cannot tell."""
        return None

    def prompt_facts(self) -> Mapping[str, Any]:
        """JSON-able: what decides the result of `encode_prompts` beside weights, tokenizers and number format.

        A family with a template, or with limits of its own, adds them: they are part of the key of every cached prompt.
        """
        return {"family": self.spec.family_class, "max_prompt_tokens": self.max_prompt_tokens}

    def prompt_image(self, image: Image) -> PromptImage:
        """A reference image that is generated with, as the encoders of its prompt are given it."""
        return PromptImage.of(image)

    def free_prompt_encoders(self) -> None:
        """Drop what `encode_prompts` loaded."""
        self.encoders.free()

    def encode_images(self, vae: Any, pixel_values: Tensor) -> list[LatentMoments]:
        """(B, 3, H, W) in [-1, 1] -> the moments of the posterior of each image, unscaled, on the CPU."""
        # Not `vae.device` and `vae.dtype`: diffusers walks all modules for each, a millisecond an image.
        weight = next(vae.parameters())
        pixel_values = pixel_values.to(weight.device, weight.dtype)
        encodes_videos = is_video_vae(vae.config)
        with torch.no_grad(), exact_float32():
            encoded = vae.encode(pixel_values[:, :, None] if encodes_videos else pixel_values)
        if not hasattr(encoded, "latent_dist"):  # AutoencoderDC: always the same latents
            return [LatentMoments(latents) for latents in encoded.latent.float().cpu().contiguous()]
        posterior = encoded.latent_dist
        means, stds = (part.float().cpu().contiguous() for part in (posterior.mean, posterior.std))
        if encodes_videos:
            means, stds = means[:, :, 0], stds[:, :, 0]
        return [LatentMoments(mean, std) for mean, std in zip(means, stds, strict=True)]

    def latents_from_moments(
        self, moments: LatentMoments, generator: torch.Generator, vae_config: Mapping[str, Any]
    ) -> Tensor:
        """Draw from the posterior, shift and scale once: (C, h, w) float32.

        Args:
            generator: keyed by (seed, content).
            vae_config: the VAE's configuration; `latent_statistics` reads it.
        """
        latents = moments.mean
        if moments.std is not None:
            latents = latents + moments.std * torch.randn(latents.shape, generator=generator)
        mean, scale = latent_statistics(vae_config)
        return (latents - mean) * scale

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W) in [-1, 1]; the inverse of `latents_from_moments`.

        In the VAE's own dtype, even where validation generates under autocast.
        """
        mean, scale = latent_statistics(vae.config, latents.device)
        return self.decode_raw(vae, latents / scale + mean)

    def decode_raw(self, vae: Any, latents: Tensor) -> Tensor:
        """(B, c, h, w) what the VAE itself takes -> (B, 3, H, W) in [-1, 1]."""
        raw = latents.to(vae.device, vae.dtype)
        with torch.no_grad(), without_autocast(vae.device):
            if is_video_vae(vae.config):
                return vae.decode(raw[:, :, None], return_dict=False)[0][:, :, 0]
            return vae.decode(raw, return_dict=False)[0]

    def load_preview_decoder(self) -> nn.Module:
        """The tiny autoencoder that shows latents while an image is generated, in float32 on `self.device`.

        Raises:
            DataError: there is none, or it cannot be loaded.
        """
        return load_preview_decoder(self.source, self.spec).eval().requires_grad_(False).to(self.device)

    def decode_preview(self, decoder: Any, latents: Tensor) -> Tensor:
        """(B, C, h, w) scaled latents -> (B, 3, H, W) in about [-1, 1], by `load_preview_decoder`'s decoder."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return decoder.decode(latents.to(self.device, torch.float32), return_dict=False)[0]

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        """What the pipeline gives `callback_on_step_end` -> (B, C, h, w); for pipelines that pack latents.

        Args:
            height: pixels of the image.
            width: pixels of the image.
        """
        return latents

    def collate(self, batch: Batch) -> Conditioning:
        """What `predict` is given of a batch, on `self.device`."""
        return self.condition_on(batch.prompt_embeds, batch.references)

    def sigmas_at(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        """(B,) quantiles in [0, 1) -> (B,) sigmas: the family's training distribution, by its quantile function.

        Args:
            latents: for distributions that depend on the image's size.
        """
        return timesteps.logit_normal_sigmas(quantiles)

    def make_noisy(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """(B, C, h, w) noisy latents at `sigmas`."""
        return flow_matching.make_noisy_latents(latents, noise, sigmas)

    def make_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """(B, C, h, w) what `predict` is compared with."""
        return flow_matching.velocity_target(latents, noise)

    @property
    def prediction_type(self) -> PredictionType:
        """What these weights predict."""
        return self.spec.prediction_type

    def signal_and_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """((B,), (B,)) how much data and how much noise `make_noisy` mixes."""
        return 1 - sigmas, sigmas

    def estimate_data(self, noisy_latents: Tensor, model_pred: Tensor, sigmas: Tensor) -> Tensor:
        """(B, C, h, w) the latents that a prediction amounts to."""
        return flow_matching.data_from_velocity(noisy_latents, model_pred, sigmas)


def have_one_shape(rows: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all samples have tensors of the same shapes (references), so that they fit one batch."""
    return len({tuple(each.shape for each in row) for row in rows}) <= 1
