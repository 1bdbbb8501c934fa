"""Chroma for the shared trainer: FLUX.1's latents and blocks, T5 alone, and real guidance in place of a distilled one.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign (`pipeline_chroma.py`,
step 6). Times come from sigmoid(N(0, 1)) and are shifted as the model's own scheduler shifts them.

T5 sees its attention mask, and the network sees the tokens of the prompt and exactly one token of padding
(lodestone-rock/flow, `src/models/chroma/model.py`). Those rows alone are kept and given to it, without a mask, which
computes the same: diffusers' pipeline adds its mask to the scores in place of masking, and its gradient checkpointing
leaves the mask of the single blocks away (0.42.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.family import PromptReferences, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.live_pipeline import MaskedLivePipeline
from simpletuner.models.patches import pack, position_ids, unpack


class Chroma(FlowFamily):
    """No pooled text and no guidance input; a dropped caption is the encoded empty text."""

    def adjust_denoiser(self, denoiser: Any) -> nn.Module:
        """diffusers makes a part of the time's embedding on the CPU in each call, so that a GPU waits for its copy."""
        embedding = denoiser.time_text_embed
        embedding.forward = MethodType(_embed_time, embedding)
        return denoiser

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (T, D): the states of a prompt's tokens and of the first token of padding, if any."""
        rows = self.encoders.masked_states(prompts, self.max_prompt_tokens, num_padding=1)
        return [PromptEmbeds({"prompt_embeds": row}) for row in rows]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        if len(set(conditioning.num_tokens)) > 1:
            return self.predict_each(denoiser, noisy_latents, sigmas, conditioning)
        latents, num_text_tokens = noisy_latents.to(self.dtype), conditioning.num_tokens[0]
        text_ids = torch.zeros(num_text_tokens, 3, dtype=self.dtype)
        ids = send(torch.cat([text_ids, position_ids(latents)]), self.device)
        output = denoiser(
            hidden_states=pack(latents),
            timestep=sigmas,
            encoder_hidden_states=conditioning["prompt_embeds"][:, :num_text_tokens].to(self.dtype),
            txt_ids=ids[:num_text_tokens],
            img_ids=ids[num_text_tokens:],
            return_dict=False,
        )[0]
        return unpack(output, *latents.shape[-2:])

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height // self.spec.vae_factor, width // self.spec.vae_factor)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import ChromaPipeline

        return ChromaLivePipeline.of(self, ChromaPipeline, denoiser, vae)


def _embed_time(self: Any, timestep: Tensor) -> Tensor:
    """(B,) times -> (B, M, D): time, a guidance of 0, and the number of each of the M rows of modulation."""
    guidance = self.guidance_proj(torch.zeros_like(timestep))
    of_call = torch.cat([self.time_proj(timestep), guidance], dim=1).to(timestep.dtype)
    of_row = self.mod_proj.to(timestep.dtype)
    shape = (len(timestep), len(of_row), -1)
    return torch.cat([of_call[:, None].expand(shape), of_row.expand(shape)], dim=-1)


class ChromaLivePipeline(MaskedLivePipeline):
    """diffusers' pipeline, given masks of booleans: those it does not add to the scores."""

    pack = staticmethod(pack)
