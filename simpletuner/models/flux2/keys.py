"""FLUX.2's modules by the names of the original release.

Queries, keys and values of the double blocks are rows of one matrix there; scale and shift of the last layer are the
other way round. Source: black-forest-labs/flux2; diffusers' `convert_flux2_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"
_MODULATIONS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")

FLUX2_KEYS = KeyTable(
    renamed={
        _DOUBLE: "double_blocks.*",
        _SINGLE: "single_blocks.*",
        **{
            f"{_DOUBLE}.attn.norm_{ours}": f"double_blocks.*.{stream}_attn.norm.{theirs}_norm"
            for stream, added in (("img", ""), ("txt", "added_"))
            for ours, theirs in ((f"{added}q", "query"), (f"{added}k", "key"))
        },
        f"{_SINGLE}.attn.norm_q": "single_blocks.*.norm.query_norm",
        f"{_SINGLE}.attn.norm_k": "single_blocks.*.norm.key_norm",
        f"{_DOUBLE}.attn.to_out.0": "double_blocks.*.img_attn.proj",
        f"{_DOUBLE}.attn.to_add_out": "double_blocks.*.txt_attn.proj",
        **{
            f"{_DOUBLE}.{ours}.linear_{layer}": f"double_blocks.*.{theirs}_mlp.{number}"
            for ours, theirs in (("ff", "img"), ("ff_context", "txt"))
            for layer, number in (("in", 0), ("out", 2))
        },
        f"{_SINGLE}.attn.to_qkv_mlp_proj": "single_blocks.*.linear1",
        f"{_SINGLE}.attn.to_out": "single_blocks.*.linear2",
        **{"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"},
        **{
            f"time_guidance_embed.{ours}_embedder.linear_{number}": f"{theirs}_in.{layer}_layer"
            for ours, theirs in (("timestep", "time"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        **{f"{name}.linear": f"{name}.lin" for name in _MODULATIONS},
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    },
    fused={
        "double_blocks.*.img_attn.qkv": tuple(f"{_DOUBLE}.attn.to_{name}" for name in "qkv"),
        "double_blocks.*.txt_attn.qkv": tuple(f"{_DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
    },
    swapped=("norm_out.linear",),
    without_alpha=("comfyui",),
    architecture="flux-2",
    base_model_version="flux2",
    kohya_network="networks.lora_flux_2",
)
