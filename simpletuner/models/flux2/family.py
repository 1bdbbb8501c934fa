"""FLUX.2 for the shared trainer: three layers of a language model, latents whose statistics are weights of the VAE.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign (`pipeline_flux2.py`:
the scheduler's timesteps divided by 1000, an Euler step with the output). Training shifts times as FLUX.1's scheduler
does, whose configuration FLUX.2 ships; the pipelines sample with another shift, which depends on the steps too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu, format_input
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from simpletuner.batch import Conditioning, PromptEmbeds, PromptImage
from simpletuner.families.spec import FamilySpec
from simpletuner.models.components import component_config, model_index
from simpletuner.models.family import LatentMoments, PromptReferences, have_one_shape, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.hidden_states import hidden_states
from simpletuner.models.patches import flatten
from simpletuner.models.vae_config import latent_statistics
from simpletuner.models.weight_files import read_tensors

# dev is trained as if its image were generated at this guidance; then 4 still means 4 afterwards.
TRAINING_GUIDANCE = 1.0
# Of the language model's states, joined for each token: by `model_type` of its configuration.
STATES = {"qwen3": (9, 18, 27), "mistral3": (10, 20, 30)}
# Index of the positions of the first reference; the second has twice that, the image that is generated has 0.
REFERENCE_INDEX = 10


class Flux2(FlowFamily):
    """klein reads Qwen3 and is guided by a second prediction, dev reads Mistral 3 and takes guidance as an input."""

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser_config.get("guidance_embeds"))

    @property
    def is_distilled(self) -> bool:
        return bool(model_index(self.source).get("is_distilled"))

    @property
    def architecture(self) -> str:
        return "flux-2-dev" if self.takes_guidance else "flux-2-klein"

    @property
    def spec_of_weights(self) -> FamilySpec:
        name = "Flux2Pipeline" if self.takes_guidance else "Flux2KleinPipeline"
        return replace(super().spec_of_weights, pipeline_class=name)

    @cached_property
    def language_model(self) -> str:
        return component_config(self.source, self.spec.component("text_encoder"))["model_type"]

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "states": STATES[self.language_model], "system": SYSTEM_MESSAGE}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.encoders.tokenizer()
        return [len(ids) for ids in tokenizer(self._chats(prompts), add_special_tokens=False, verbose=False).input_ids]

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (512, 3 D): FLUX.2 was trained on the states of the padding too, so all of them are kept."""
        length = self.max_prompt_tokens
        self.num_cut_prompts += sum(count > length for count in self.count_prompt_tokens(prompts))
        tokens = self.encoders.tokenizer()(
            self._chats(prompts),
            **{"add_special_tokens": False, "truncation": True, "max_length": length, "padding": "max_length"},
            return_tensors="pt",
        ).to(self.device)
        states = hidden_states(self.encoders.encoder(), STATES[self.language_model], **tokens)
        return [PromptEmbeds({"prompt_embeds": row.flatten(1).cpu()}) for row in states]

    def _chats(self, prompts: Sequence[str]) -> list[str]:
        """The prompts in the chat that the model was trained with, by the tokenizer's own template."""
        template = partial(self.encoders.tokenizer().apply_chat_template, tokenize=False)
        if self.language_model == "mistral3":
            return [template(chat) for chat in format_input([*prompts], SYSTEM_MESSAGE)]
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return [template(chat, add_generation_prompt=True, enable_thinking=False) for chat in chats]

    @cached_property
    def vae_config(self) -> Mapping[str, Any]:
        """With mean and deviation of each of the 128 channels, which the VAE has as a batch norm that never trains."""
        config = super().vae_config
        names = ("bn.running_mean", "bn.running_var")
        mean, variance = read_tensors(self.source, self.spec.component("vae"), names).values()
        deviation = (variance.float() + config["batch_norm_eps"]).sqrt()
        return {**config, "latents_mean": mean.tolist(), "latents_std": deviation.tolist()}

    def encode_images(self, vae: Any, pixel_values: Tensor) -> list[LatentMoments]:
        """The mode of the posterior alone, in patches: 2 x 2 neighbors of a channel are four channels."""
        return [LatentMoments(pixel_unshuffle(each.mean, 2)) for each in super().encode_images(vae, pixel_values)]

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        mean, scale = latent_statistics(self.vae_config, latents.device)
        return self.decode_raw(vae, pixel_shuffle(latents / scale + mean, 2))

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        if not have_one_shape(conditioning.references):  # the network takes the positions of row 0 for all
            return self.predict_each(denoiser, noisy_latents, sigmas, conditioning)
        references = [torch.stack(each) for each in zip(*conditioning.references, strict=True)]
        images = [noisy_latents.to(self.dtype), *references]
        prompt_embeds = conditioning["prompt_embeds"]
        num_text_tokens, num_tokens = prompt_embeds.shape[1], noisy_latents[0, 0].numel()
        ids = send(_positions(num_text_tokens, images), self.device)
        guidance = None
        if self.takes_guidance:
            guidance = conditioning.tensors.get("guidance", torch.full_like(sigmas, TRAINING_GUIDANCE))
        output = denoiser(
            hidden_states=torch.cat([flatten(each) for each in images], dim=1),
            timestep=sigmas,
            guidance=guidance,
            encoder_hidden_states=prompt_embeds,
            txt_ids=ids[:num_text_tokens],
            img_ids=ids[num_text_tokens:],
            return_dict=False,
        )[0]
        return output[:, :num_tokens].mT.unflatten(-1, noisy_latents.shape[-2:])

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        return Flux2Pipeline(self, denoiser, vae)


class Flux2Pipeline(GuidedFlowPipeline):
    """Distilled klein is not guided, base klein by a second prediction; dev has guidance as an input."""

    pack = staticmethod(flatten)
    family: Flux2

    def sampling_mu(self, num_patches: int, num_steps: int) -> float:
        return compute_empirical_mu(num_patches, num_steps)

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1 and not (self.family.takes_guidance or self.family.is_distilled)

    def condition(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[PromptImage]] | None,
        references: Sequence[Sequence[Tensor]],
        guidance_scale: float,
    ) -> Conditioning:
        conditioning = super().condition(prompts, images, references, guidance_scale)
        guidance = torch.full((len(prompts),), guidance_scale, device=self.family.device)
        return conditioning.with_tensors(guidance=guidance) if self.family.takes_guidance else conditioning


def _positions(num_text_tokens: int, images: Sequence[Tensor]) -> Tensor:
    """(tokens, 4) index of the image, row, column, place in the text, on the CPU: text first, then image by image."""
    axes = [(1, 1, 1, num_text_tokens), *((1, *image.shape[-2:], 1) for image in images)]
    rows = [torch.cartesian_prod(*(torch.arange(length) for length in each)) for each in axes]
    for number, reference in enumerate(rows[2:], start=1):
        reference[:, 0] = REFERENCE_INDEX * number
    return torch.cat(rows)
