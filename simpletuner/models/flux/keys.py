"""FLUX.1's modules by the names of the original release (`flux/model.py`, `flux/modules/layers.py`).

Queries, keys and values are rows of one matrix there, in the single blocks together with the first half of the
feed-forward. Scale and shift of the last layer are the other way round. Source: black-forest-labs/flux; diffusers'
`scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_DOUBLE, _SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

FLUX_KEYS = KeyTable(
    renamed={
        _DOUBLE: "double_blocks.*",
        f"{_DOUBLE}.norm1.linear": "double_blocks.*.img_mod.lin",
        f"{_DOUBLE}.norm1_context.linear": "double_blocks.*.txt_mod.lin",
        f"{_DOUBLE}.attn.norm_q": "double_blocks.*.img_attn.norm.query_norm",
        f"{_DOUBLE}.attn.norm_k": "double_blocks.*.img_attn.norm.key_norm",
        f"{_DOUBLE}.attn.norm_added_q": "double_blocks.*.txt_attn.norm.query_norm",
        f"{_DOUBLE}.attn.norm_added_k": "double_blocks.*.txt_attn.norm.key_norm",
        f"{_DOUBLE}.attn.to_out.0": "double_blocks.*.img_attn.proj",
        f"{_DOUBLE}.attn.to_add_out": "double_blocks.*.txt_attn.proj",
        f"{_DOUBLE}.ff.net.0.proj": "double_blocks.*.img_mlp.0",
        f"{_DOUBLE}.ff.net.2": "double_blocks.*.img_mlp.2",
        f"{_DOUBLE}.ff_context.net.0.proj": "double_blocks.*.txt_mlp.0",
        f"{_DOUBLE}.ff_context.net.2": "double_blocks.*.txt_mlp.2",
        _SINGLE: "single_blocks.*",
        f"{_SINGLE}.norm.linear": "single_blocks.*.modulation.lin",
        f"{_SINGLE}.attn.norm_q": "single_blocks.*.norm.query_norm",
        f"{_SINGLE}.attn.norm_k": "single_blocks.*.norm.key_norm",
        f"{_SINGLE}.proj_out": "single_blocks.*.linear2",
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        **{
            f"time_text_embed.{ours}_embedder.linear_{number}": f"{theirs}_in.{layer}_layer"
            for ours, theirs in (("timestep", "time"), ("text", "vector"), ("guidance", "guidance"))
            for number, layer in ((1, "in"), (2, "out"))
        },
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    fused={
        "double_blocks.*.img_attn.qkv": tuple(f"{_DOUBLE}.attn.to_{name}" for name in "qkv"),
        "double_blocks.*.txt_attn.qkv": tuple(f"{_DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
        "single_blocks.*.linear1": (*(f"{_SINGLE}.attn.to_{name}" for name in "qkv"), f"{_SINGLE}.proj_mlp"),
    },
    swapped=("norm_out.linear",),
    architecture="flux-1-dev",
    base_model_version="flux1",
    kohya_network="networks.lora_flux",
)
