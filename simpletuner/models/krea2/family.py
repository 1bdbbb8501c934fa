"""Krea 2 for the shared trainer: twelve layers of Qwen3-VL stacked for each token, the VAE of Qwen-Image.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign (`pipeline_krea2.py`,
step 6). Times are shifted with the size of the image as the model's own scheduler shifts them; Turbo has one shift for
all sizes, which its scheduler does not say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.components import model_index
from simpletuner.models.family import PromptReferences, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.guided_pipeline import GuidedFlowPipeline
from simpletuner.models.hidden_states import hidden_states
from simpletuner.models.patches import pack, position_ids, unpack

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
# Tokens of the prefix, whose states are dropped, and of the suffix, whose states are kept.
PREFIX_TOKENS, SUFFIX_TOKENS = 34, 5
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
# The logarithm of the shift of distilled weights.
DISTILLED_MU = 1.15


class Krea2(FlowFamily):
    """`model_index.json` says whether weights are distilled, and which layers are text."""

    reads_prompts_singly = True

    @property
    def is_distilled(self) -> bool:
        return bool(model_index(self.source).get("is_distilled"))

    @property
    def layers(self) -> Sequence[int]:
        return model_index(self.source).get("text_encoder_select_layers") or LAYERS

    def prompt_facts(self) -> Mapping[str, Any]:
        facts = {"template": [PREFIX, PREFIX_TOKENS, SUFFIX, SUFFIX_TOKENS], "layers": list(self.layers)}
        return {**super().prompt_facts(), **facts}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """With the suffix, without the prefix."""
        counts = self.encoders.count("tokenizer", [PREFIX + prompt for prompt in prompts])
        return [count - PREFIX_TOKENS + SUFFIX_TOKENS for count in counts]

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, 12, D): states of the prompt and of the suffix, which is never cut.

        Each prompt is read by itself, without padding. The public pipeline pads between prompt and suffix and counts
        positions without the padding, which comes to the same states.
        """
        length = self.max_prompt_tokens + PREFIX_TOKENS - SUFFIX_TOKENS
        self.num_cut_prompts += sum(count > self.max_prompt_tokens for count in self.count_prompt_tokens(prompts))
        tokenizer, embeds = self.encoders.tokenizer(), []
        for prompt in prompts:
            ids = tokenizer(PREFIX + prompt, truncation=True, max_length=length).input_ids + tokenizer(SUFFIX).input_ids
            [states] = hidden_states(
                self.encoders.encoder(), self.layers, input_ids=torch.tensor([ids], device=self.device)
            )
            embeds.append(PromptEmbeds({"prompt_embeds": states[PREFIX_TOKENS:].cpu()}))
        return embeds

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        latents, prompt_embeds = noisy_latents.to(self.dtype), conditioning["prompt_embeds"]
        places = torch.cat([torch.zeros(prompt_embeds.shape[1], 3), position_ids(latents).float()])
        output = denoiser(
            hidden_states=pack(latents),
            encoder_hidden_states=prompt_embeds,
            timestep=sigmas,
            position_ids=send(places, self.device),
            encoder_attention_mask=conditioning.tensors.get("prompt_mask"),
            return_dict=False,
        )[0]
        return unpack(output, *latents.shape[-2:])

    def training_shift(self, num_patches: int) -> float:
        return math.exp(DISTILLED_MU) if self.is_distilled else super().training_shift(num_patches)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        return Krea2Pipeline(self, denoiser, vae)


class Krea2Pipeline(GuidedFlowPipeline):
    """Krea counts guidance from 0, where others count from 1: 4.5 leads as far away as 5.5 does elsewhere."""

    pack = staticmethod(pack)

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 0

    def guided(self, positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
        return positive + guidance_scale * (positive - negative)
