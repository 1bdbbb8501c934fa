"""Qwen-Image for the shared trainer: Qwen2.5-VL's states of a chat, a VAE of videos, latents as patches.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign
(`pipeline_qwenimage.py`, step 6: the scheduler's times divided by 1000). Times are sampled from sigmoid(N(0, 1)) and
shifted with the size of the image as the model's own scheduler shifts them; that its sampling then ends at sigma 0.02
(`shift_terminal`) is not a part of the training distribution, which has all noise levels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.family import PromptReferences, have_one_shape, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.patches import pack, unpack

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# Tokens of the template before the prompt; their states are not text for the denoiser.
TEMPLATE_TOKENS = 34
# What configurations of other models with this network ask for.
UNKNOWN_PARTS = {
    "guidance_embeds": "guidance as an input",
    "use_additional_t_cond": "layered images",
    "use_layer3d_rope": "layered images",
}


class QwenImage(FlowFamily):
    """References are further patches behind those of the image: text-to-image weights have none."""

    def load_denoiser(self) -> nn.Module:
        self.require_known_parts()
        denoiser = super().load_denoiser()
        keep_rotations_on_device(denoiser)
        return denoiser

    def empty_denoiser(self) -> nn.Module:
        self.require_known_parts()
        return super().empty_denoiser()

    def require_known_parts(self) -> None:
        """Refuse weights of a network that has more than this family feeds it.

        Raises:
            ConfigError: names the part.
        """
        for key, words in UNKNOWN_PARTS.items():
            if self.denoiser_config.get(key):
                message = f"these weights are made for {words} ({key}), which cannot be trained yet"
                fix = "name a model of Qwen-Image, Qwen-Image-Edit or FireRed-Image-Edit"
                raise ConfigError(Problem(message, key="pretrained_model_name_or_path", fix=fix))

    reads_prompts_singly = True

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Without the template, whose states are dropped."""
        counts = self.encoders.count("tokenizer", [TEMPLATE.format(prompt) for prompt in prompts])
        return [count - TEMPLATE_TOKENS for count in counts]

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "template": [TEMPLATE, TEMPLATE_TOKENS]}

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) per prompt: the last states of the chat from the prompt's first token on."""
        texts = [TEMPLATE.format(prompt) for prompt in prompts]
        rows = self.encoders.states_of(texts, [-1], TEMPLATE_TOKENS + self.max_prompt_tokens)
        return [PromptEmbeds({"prompt_embeds": row[TEMPLATE_TOKENS:, 0]}) for row in rows]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        # The network takes the shapes of the first row for those of all.
        if not have_one_shape(conditioning.references):
            return self.predict_each(denoiser, noisy_latents, sigmas, conditioning)
        latents = noisy_latents.to(self.dtype)
        images = [latents, *(torch.stack(each) for each in zip(*conditioning.references, strict=True))]
        tokens = [pack(each) for each in images]
        shapes = [(1, each.shape[-2] // 2, each.shape[-1] // 2) for each in images]
        output = denoiser(
            hidden_states=torch.cat(tokens, dim=1),
            timestep=sigmas,
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.dtype),
            encoder_hidden_states_mask=conditioning.tensors.get("prompt_mask"),
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
        return unpack(output[:, : tokens[0].shape[1]], *latents.shape[-2:])

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from simpletuner.models.qwen_image.pipeline import QwenImagePipeline

        return QwenImagePipeline(self, denoiser, vae)


def keep_rotations_on_device(denoiser: Any) -> None:
    """Let the rotary embedding copy its table to a device once, without holding the host.

    The table is no buffer, for complex numbers would lose their imaginary part in a change of number format.
    """
    rotations = denoiser.pos_embed
    rotations._get_device_freqs = functools.cache(
        lambda device: (send(rotations.pos_freqs, device), send(rotations.neg_freqs, device))
    )
