"""The blocks of FLUX.1 by the names of the original release (`flux/modules/layers.py`), for all that are made of them.

Queries, keys and values are rows of one matrix there, in the single blocks together with the first half of the
feed-forward. Source: black-forest-labs/flux; diffusers' `scripts/convert_flux_to_diffusers.py`.
"""

from __future__ import annotations

DOUBLE, SINGLE = "transformer_blocks.*", "single_transformer_blocks.*"

DOUBLE_ATTENTION = (
    *(f"{DOUBLE}.attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
    *(f"{DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
)
ATTENTION = (*DOUBLE_ATTENTION, *(f"{SINGLE}.attn.to_{name}" for name in "qkv"))
FEED_FORWARD = (
    *(f"{DOUBLE}.{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
    *(f"{SINGLE}.{layer}" for layer in ("proj_mlp", "proj_out")),
)

# What FLUX.2 has kept: attention, norms, and the layers outside of the blocks.
RENAMED_ATTENTION = {
    DOUBLE: "double_blocks.*",
    f"{DOUBLE}.attn.norm_q": "double_blocks.*.img_attn.norm.query_norm",
    f"{DOUBLE}.attn.norm_k": "double_blocks.*.img_attn.norm.key_norm",
    f"{DOUBLE}.attn.norm_added_q": "double_blocks.*.txt_attn.norm.query_norm",
    f"{DOUBLE}.attn.norm_added_k": "double_blocks.*.txt_attn.norm.key_norm",
    f"{DOUBLE}.attn.to_out.0": "double_blocks.*.img_attn.proj",
    f"{DOUBLE}.attn.to_add_out": "double_blocks.*.txt_attn.proj",
    SINGLE: "single_blocks.*",
    f"{SINGLE}.attn.norm_q": "single_blocks.*.norm.query_norm",
    f"{SINGLE}.attn.norm_k": "single_blocks.*.norm.key_norm",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
}
RENAMED = {
    **RENAMED_ATTENTION,
    f"{DOUBLE}.ff.net.0.proj": "double_blocks.*.img_mlp.0",
    f"{DOUBLE}.ff.net.2": "double_blocks.*.img_mlp.2",
    f"{DOUBLE}.ff_context.net.0.proj": "double_blocks.*.txt_mlp.0",
    f"{DOUBLE}.ff_context.net.2": "double_blocks.*.txt_mlp.2",
    f"{SINGLE}.proj_out": "single_blocks.*.linear2",
}
FUSED_DOUBLE = {
    "double_blocks.*.img_attn.qkv": tuple(f"{DOUBLE}.attn.to_{name}" for name in "qkv"),
    "double_blocks.*.txt_attn.qkv": tuple(f"{DOUBLE}.attn.add_{name}_proj" for name in "qkv"),
}
FUSED = {
    **FUSED_DOUBLE,
    "single_blocks.*.linear1": (*(f"{SINGLE}.attn.to_{name}" for name in "qkv"), f"{SINGLE}.proj_mlp"),
}


def renamed_embedders(path: str, names: dict[str, str]) -> dict[str, str]:
    """The two layers of each embedder in `path`, by diffusers' and the original's name of it (`timestep`: `time`)."""
    return {
        f"{path}.{ours}_embedder.linear_{number}": f"{theirs}_in.{layer}_layer"
        for ours, theirs in names.items()
        for number, layer in ((1, "in"), (2, "out"))
    }
