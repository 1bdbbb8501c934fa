"""Chroma's modules by the names of the original release: FLUX.1's, without modulation layers in the blocks.

What modulates them all comes from `distilled_guidance_layer`. Source: lodestone-rock/flow, `src/models/chroma/`;
diffusers' `convert_chroma_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.models.flux_blocks import FUSED, RENAMED

_LAYERS = "distilled_guidance_layer.layers.*"

CHROMA_KEYS = KeyTable(
    renamed={**RENAMED, f"{_LAYERS}.linear_1": f"{_LAYERS}.in_layer", f"{_LAYERS}.linear_2": f"{_LAYERS}.out_layer"},
    fused=FUSED,
    architecture="chroma",
    base_model_version="chroma",
    kohya_network="networks.lora_flux",
)
