"""Krea 2's modules by the names of the original release.

Its modulation is a vector of six there, flat, and a matrix of six rows here. Source: diffusers'
`convert_krea2_transformer_checkpoint_to_diffusers` and `_convert_non_diffusers_krea2_lora_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_LAYERS = {
    **{f"attn.to_{name}": f"attn.w{name}" for name in "qkv"},
    "attn.to_out.0": "attn.wo",
    "attn.to_gate": "attn.gate",
    "attn.norm_q": "attn.qknorm.qnorm",
    "attn.norm_k": "attn.qknorm.knorm",
    "ff": "mlp",
    "norm1": "prenorm",
    "norm2": "postnorm",
}
_BLOCKS = {
    "transformer_blocks.*": "blocks.*",
    **{f"text_fusion.{name}_blocks.*": f"txtfusion.{name}_blocks.*" for name in ("layerwise", "refiner")},
}

KREA2_KEYS = KeyTable(
    renamed={
        **_BLOCKS,
        **{
            f"{block}.{ours}": f"{theirs}.{name}" for block, theirs in _BLOCKS.items() for ours, name in _LAYERS.items()
        },
        "transformer_blocks.*.scale_shift_table": "blocks.*.mod.lin",
        "text_fusion": "txtfusion",
        "img_in": "first",
        "time_embed.linear_1": "tmlp.0",
        "time_embed.linear_2": "tmlp.2",
        "time_mod_proj": "tproj.1",
        "txt_in.norm": "txtmlp.0",
        "txt_in.linear_1": "txtmlp.1",
        "txt_in.linear_2": "txtmlp.3",
        "final_layer": "last",
        "final_layer.scale_shift_table": "last.modulation.lin",
    },
    without_alpha=("comfyui",),
    architecture="krea-2",
    base_model_version="krea2",
    kohya_network="networks.lora_krea2",
)
