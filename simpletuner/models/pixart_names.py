"""What PixArt's networks have in common: layers of their blocks, and their names in the original releases.

Sana grew out of PixArt-Sigma's code, so both have the same names there. Source: diffusers'
`scripts/convert_pixart_sigma_to_diffusers.py` and `convert_sana_transformer_to_diffusers`.
"""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.families.keys import KeyTable

BLOCK = "transformer_blocks.*"
ATTENTION = tuple(f"{BLOCK}.attn{number}.to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out.0"))


def pixart_keys(patches: str, times: str, layers: Mapping[str, str], name: str) -> KeyTable:
    """The key table of a network.

    Args:
        patches: path of the module that makes tokens of latents.
        times: path of the module that embeds the time.
        layers: further paths in the denoiser -> in the original.
        name: what files call the architecture.
    """
    return KeyTable(
        renamed={
            BLOCK: "blocks.*",
            f"{BLOCK}.attn1": "blocks.*.attn",
            f"{BLOCK}.attn1.to_out.0": "blocks.*.attn.proj",
            f"{BLOCK}.attn2": "blocks.*.cross_attn",
            f"{BLOCK}.attn2.to_q": "blocks.*.cross_attn.q_linear",
            f"{BLOCK}.attn2.to_out.0": "blocks.*.cross_attn.proj",
            f"{patches}.proj": "x_embedder.proj",
            f"{times}.linear": "t_block.1",
            **{f"{times}.emb.timestep_embedder.linear_{n}": f"t_embedder.mlp.{2 * n - 2}" for n in (1, 2)},
            **{f"caption_projection.linear_{n}": f"y_embedder.y_proj.fc{n}" for n in (1, 2)},
            "proj_out": "final_layer.linear",
            "scale_shift_table": "final_layer.scale_shift_table",
            **layers,
        },
        fused={
            "blocks.*.attn.qkv": tuple(f"{BLOCK}.attn1.to_{part}" for part in "qkv"),
            "blocks.*.cross_attn.kv_linear": tuple(f"{BLOCK}.attn2.to_{part}" for part in "kv"),
        },
        # The states of no caption, which diffusers encodes, a table of places, which it computes, and a weighting.
        unused=("y_embedder.y_embedding", "pos_embed", "logvar_linear"),
        architecture=name,
        base_model_version=name,
    )
