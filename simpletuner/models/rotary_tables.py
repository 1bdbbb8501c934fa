"""Rotary tables that diffusers keeps outside of buffers and copies to the device in every call, which makes it wait."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed
from diffusers.models.transformers.transformer_z_image import RopeEmbedder
from torch import Tensor

from simpletuner.models.family import send


class ZImageTables(RopeEmbedder):
    """Sent to the device at first use without making the host wait."""

    freqs_cis: list[Tensor] | None  # type: ignore[assignment]  # diffusers' annotation says None alone

    def __call__(self, ids: Tensor) -> Tensor:
        if self.freqs_cis is None or self.freqs_cis[0].device != ids.device:
            made = self.freqs_cis or self.precompute_freqs_cis(self.axes_dims, self.axes_lens, theta=self.theta)
            self.freqs_cis = [send(table, ids.device) for table in made]
        return super().__call__(ids)


class Lumina2Tables(Lumina2RotaryPosEmbed):
    """Likewise; and numbers of tokens that the host knows are not asked of the device: `num_tokens` of a mask."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Any:
        if self.freqs_cis[0].device != hidden_states.device:
            self.freqs_cis = [send(table, hidden_states.device) for table in self.freqs_cis]
        if (num_tokens := getattr(attention_mask, "num_tokens", None)) is not None:
            attention_mask = torch.arange(attention_mask.shape[1]) < torch.tensor(num_tokens)[:, None]
        return super().forward(hidden_states, attention_mask)
