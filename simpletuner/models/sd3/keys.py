"""SD3's modules by the names of the original release (`mmditx.py` of Stability-AI/sd3.5).

Source: that file; diffusers' `convert_sd3_transformer_checkpoint_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_OURS, _THEIRS = "transformer_blocks.*", "joint_blocks.*"

SD3_KEYS = KeyTable(
    renamed={
        _OURS: _THEIRS,
        f"{_OURS}.norm1.linear": f"{_THEIRS}.x_block.adaLN_modulation.1",
        f"{_OURS}.norm1_context.linear": f"{_THEIRS}.context_block.adaLN_modulation.1",
        f"{_OURS}.attn.to_out.0": f"{_THEIRS}.x_block.attn.proj",
        f"{_OURS}.attn2.to_out.0": f"{_THEIRS}.x_block.attn2.proj",
        f"{_OURS}.attn.to_add_out": f"{_THEIRS}.context_block.attn.proj",
        f"{_OURS}.ff.net.0.proj": f"{_THEIRS}.x_block.mlp.fc1",
        f"{_OURS}.ff.net.2": f"{_THEIRS}.x_block.mlp.fc2",
        f"{_OURS}.ff_context.net.0.proj": f"{_THEIRS}.context_block.mlp.fc1",
        f"{_OURS}.ff_context.net.2": f"{_THEIRS}.context_block.mlp.fc2",
        **{
            f"{_OURS}.{attention}.norm_{ours}": f"{_THEIRS}.{part}.{attention}.ln_{theirs}"
            for attention, part in (("attn", "x_block"), ("attn2", "x_block"))
            for ours, theirs in (("q", "q"), ("k", "k"))
        },
        f"{_OURS}.attn.norm_added_q": f"{_THEIRS}.context_block.attn.ln_q",
        f"{_OURS}.attn.norm_added_k": f"{_THEIRS}.context_block.attn.ln_k",
        "pos_embed.pos_embed": "pos_embed",  # the tensor itself
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    fused={
        f"{_THEIRS}.x_block.attn.qkv": tuple(f"{_OURS}.attn.to_{name}" for name in "qkv"),
        f"{_THEIRS}.x_block.attn2.qkv": tuple(f"{_OURS}.attn2.to_{name}" for name in "qkv"),
        f"{_THEIRS}.context_block.attn.qkv": tuple(f"{_OURS}.attn.add_{name}_proj" for name in "qkv"),
    },
    # The last block has no gates for the text: scale and shift alone, the other way round there.
    swapped=("norm_out.linear", "transformer_blocks.$.norm1_context.linear"),
    architecture="stable-diffusion-3",
    base_model_version="sd3",
    kohya_network="networks.lora_sd3",
)
