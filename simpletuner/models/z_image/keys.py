"""Z-Image's modules by the names of the original release, which ComfyUI's single files have.

Queries, keys and values are rows of one matrix there. Files of adapters in ComfyUI's form keep diffusers' names:
ComfyUI reads either, diffusers refuses the joined ones. Source: Tongyi-MAI/Z-Image; diffusers' `single_file_utils.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

STACKS = ("layers", "noise_refiner", "context_refiner")

Z_IMAGE_KEYS = KeyTable(
    renamed={
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1": "final_layer",
        **{
            f"{stack}.*.attention.{ours}": f"{stack}.*.attention.{theirs}"
            for stack in STACKS
            for ours, theirs in (("to_out.0", "out"), ("norm_q", "q_norm"), ("norm_k", "k_norm"))
        },
    },
    fused={f"{stack}.*.attention.qkv": tuple(f"{stack}.*.attention.to_{name}" for name in "qkv") for stack in STACKS},
    unused=("norm_final",),
    own_names=("comfyui",),
    architecture="Z-Image",
    base_model_version="z_image",
    kohya_network="networks.lora_zimage",
)
