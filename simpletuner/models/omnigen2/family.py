"""OmniGen2 for the shared trainer: Qwen2.5-VL's states of an instruction, and its time and sign to the project's.

OmniGen2 counts time from noise (t = 0) to data (t = 1) and predicts `data - noise` (VectorSpaceLab/OmniGen2,
`omnigen2/transport/transport.py`). Here sigma is 0 on data and the velocity is `noise - data`: t = 1 - sigma, and the
output changes sign. Its training times are sigmoid(N(0, 1)), and so are the sigmas, for the normal is symmetric; they
are shifted toward noise by exp(mu), mu linear in the number of patches, as FLUX.1's are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.diffusion import timesteps
from simpletuner.models.family import ModelFamily, PromptReferences
from simpletuner.models.omnigen2.spec import DROPPED_INSTRUCTION

# The literal texts that OmniGen2 was trained with: the second one where an instruction is dropped.
SYSTEM_PROMPT = "You are a helpful assistant that generates high-quality images based on user instructions."
DROPPED_SYSTEM_PROMPT = "You are a helpful assistant that generates images."
TEMPLATE = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"


class OmniGen2(ModelFamily):
    """The language model reads the instruction alone; reference images go to the denoiser as latents."""

    reads_prompts_singly = True

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("processor", [chat_text(prompt) for prompt in prompts])

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "template": [TEMPLATE, SYSTEM_PROMPT, DROPPED_SYSTEM_PROMPT]}

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) per prompt: the last hidden states of the whole chat, system prompt included.

        Each prompt is read by itself, without padding, so that its states do not depend on the others.
        """
        texts = [chat_text(prompt) for prompt in prompts]
        rows = self.encoders.states_of(texts, [-1], self.max_prompt_tokens, name="mllm", tokenizer="processor")
        return [PromptEmbeds({"prompt_embeds": row[:, 0]}) for row in rows]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        latents, mask = noisy_latents.to(self.dtype), conditioning.tensors.get("prompt_mask")
        return -denoiser(latents, 1 - sigmas, conditioning["prompt_embeds"], mask, conditioning.references)

    def sigmas_at(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        num_patches = latents.shape[-2] * latents.shape[-1] // self.spec.patch_size**2
        return timesteps.shifted_sigmas(timesteps.logit_normal_sigmas(quantiles), timesteps.shift_of_size(num_patches))

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from simpletuner.models.omnigen2.pipeline import OmniGen2Pipeline

        return OmniGen2Pipeline(self, denoiser, vae)


def chat_text(prompt: str) -> str:
    """The chat in which an instruction stands; a dropped one has another system prompt and nothing to say."""
    if prompt == DROPPED_INSTRUCTION:
        return TEMPLATE.format(system=DROPPED_SYSTEM_PROMPT, user="")
    return TEMPLATE.format(system=SYSTEM_PROMPT, user=prompt)
