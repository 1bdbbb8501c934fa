"""FLUX.2's modules by the names of the original release: FLUX.1's, with another feed-forward and shared modulations.

Scale and shift of the last layer are the other way round. Source: black-forest-labs/flux2; diffusers'
`convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.models.flux_blocks import DOUBLE, FUSED_DOUBLE, RENAMED_ATTENTION, SINGLE, renamed_embedders

_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")

FLUX2_KEYS = KeyTable(
    renamed={
        **RENAMED_ATTENTION,
        **{
            f"{DOUBLE}.{ours}.linear_{layer}": f"double_blocks.*.{theirs}_mlp.{number}"
            for ours, theirs in (("ff", "img"), ("ff_context", "txt"))
            for layer, number in (("in", 0), ("out", 2))
        },
        f"{SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.*.linear1",
        f"{SINGLE}.attn.to_out": "single_blocks.*.linear2",
        **renamed_embedders("time_guidance_embed", {"timestep": "time", "guidance": "guidance"}),
        **{f"{name}.linear": f"{name}.lin" for name in _MODULATIONS},
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    fused=FUSED_DOUBLE,
    swapped=("norm_out.linear",),
    without_alpha=("comfyui",),
    architecture="flux-2",
    base_model_version="flux2",
    kohya_network="networks.lora_flux_2",
)
