"""Sana for the shared trainer: Gemma 2 behind a long instruction, and latents of 32 pixels a side.

The network is given 1000 sigma and predicts `noise - data` (`pipeline_sana.py`, denoising loop, with a scheduler that
predicts flow), which is the project's sign. Times come from sigmoid(N(0, 1)) and are shifted as the model's own
scheduler shifts those of its sampling (arXiv 2410.10629, section 3).

Prompts stand behind an instruction that asks for an enhanced prompt. Of its states the network sees the first and the
last one, then those of the prompt. Negative prompts and dropped captions are encoded alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.family import PromptReferences
from simpletuner.models.flow import FlowFamily
from simpletuner.models.live_pipeline import MaskedLivePipeline
from simpletuner.models.sana.spec import PLAIN


class Sana(FlowFamily):
    """Of 1.5 queries and keys are normed: the weights' configuration says so."""

    reads_prompts_singly = True

    @cached_property
    def instruction(self) -> str:
        """What the pipeline puts in front of prompts by default."""
        from diffusers import SanaPipeline

        return "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "instruction": self.instruction}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """With the two tokens of the instruction that are kept."""
        counts = self.encoders.count("tokenizer", [self.text_of(prompt) for prompt in prompts])
        return [count - self._num_left_out(prompt) for count, prompt in zip(counts, prompts, strict=True)]

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D): the last states, after the final norm."""
        embeds = []
        for prompt in prompts:
            left_out = self._num_left_out(prompt)
            [states] = self.encoders.states_of([self.text_of(prompt)], [-1], self.max_prompt_tokens + left_out)
            kept = [0, *range(1 + left_out, len(states))]
            embeds.append(PromptEmbeds({"prompt_embeds": states[kept, 0]}))
        return embeds

    def text_of(self, prompt: str) -> str:
        """What Gemma reads for a prompt, lower-cased as the pipeline has it."""
        cleaned = prompt.removeprefix(PLAIN).lower().strip()
        return cleaned if prompt.startswith(PLAIN) else self.instruction + cleaned

    def _num_left_out(self, prompt: str) -> int:
        """Tokens of the instruction, all but the first and the last."""
        return 0 if prompt.startswith(PLAIN) else self._instruction_tokens - 2

    @cached_property
    def _instruction_tokens(self) -> int:
        return self.encoders.count("tokenizer", [self.instruction])[0]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(
            noisy_latents.to(self.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=1000 * sigmas * self.denoiser_config.get("timestep_scale", 1.0),
            encoder_attention_mask=conditioning.tensors.get("prompt_mask"),
            return_dict=False,
        )[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import SanaPipeline

        return SanaLivePipeline.of(self, SanaPipeline, denoiser, vae)


class SanaLivePipeline(MaskedLivePipeline):
    """Images of the size that is asked for, and latents in float32 whatever the denoiser computes in."""

    def pack(self, latents: Tensor) -> Tensor:
        return latents.float()

    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        arguments = super().prompt_arguments(prompts, negative_prompts, guidance_scale)
        return {**arguments, "use_resolution_binning": False}
