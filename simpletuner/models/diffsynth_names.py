"""How DiffSynth-Studio calls the layers of its models: the names in its LoRA files and in `--lora_target_modules`.

Scale and shift of its norms have the order of diffusers, except in Hunyuan-DiT's last layer. Source: the model classes
and converters of DiffSynth-Studio (`sdxl_unet.py`, `sd3_dit.py`, `flux_dit.py`).
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_JOINT = "transformer_blocks.*"
_SINGLE = "single_transformer_blocks.*"

_JOINT_NAMES = {
    _JOINT: "blocks.*",
    f"{_JOINT}.norm1.linear": "blocks.*.norm1_a.linear",
    f"{_JOINT}.norm1_context.linear": "blocks.*.norm1_b.linear",
    f"{_JOINT}.attn.to_out.0": "blocks.*.attn.a_to_out",
    f"{_JOINT}.attn.to_add_out": "blocks.*.attn.b_to_out",
    f"{_JOINT}.attn.norm_q": "blocks.*.attn.norm_q_a",
    f"{_JOINT}.attn.norm_k": "blocks.*.attn.norm_k_a",
    f"{_JOINT}.attn.norm_added_q": "blocks.*.attn.norm_q_b",
    f"{_JOINT}.attn.norm_added_k": "blocks.*.attn.norm_k_b",
    f"{_JOINT}.ff.net.0.proj": "blocks.*.ff_a.0",
    f"{_JOINT}.ff.net.2": "blocks.*.ff_a.2",
    f"{_JOINT}.ff_context.net.0.proj": "blocks.*.ff_b.0",
    f"{_JOINT}.ff_context.net.2": "blocks.*.ff_b.2",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "time_embedder.timestep_embedder.0",
    "time_text_embed.timestep_embedder.linear_2": "time_embedder.timestep_embedder.2",
    "time_text_embed.text_embedder.linear_1": "pooled_text_embedder.0",
    "time_text_embed.text_embedder.linear_2": "pooled_text_embedder.2",
}
_JOINT_FUSED = {
    "blocks.*.attn.a_to_qkv": tuple(f"{_JOINT}.attn.to_{name}" for name in "qkv"),
    "blocks.*.attn.b_to_qkv": tuple(f"{_JOINT}.attn.add_{name}_proj" for name in "qkv"),
}

FLUX_IN_DIFFSYNTH = KeyTable(
    renamed={
        **_JOINT_NAMES,
        _SINGLE: "single_blocks.*",
        f"{_SINGLE}.norm.linear": "single_blocks.*.norm.linear",
        f"{_SINGLE}.proj_out": "single_blocks.*.proj_out",
        f"{_SINGLE}.attn.norm_q": "single_blocks.*.norm_q_a",
        f"{_SINGLE}.attn.norm_k": "single_blocks.*.norm_k_a",
        "x_embedder": "x_embedder",
        "time_text_embed.guidance_embedder.linear_1": "guidance_embedder.timestep_embedder.0",
        "time_text_embed.guidance_embedder.linear_2": "guidance_embedder.timestep_embedder.2",
        "norm_out.linear": "final_norm_out.linear",
        "proj_out": "final_proj_out",
    },
    fused={
        **_JOINT_FUSED,
        "single_blocks.*.to_qkv_mlp": (*(f"{_SINGLE}.attn.to_{name}" for name in "qkv"), f"{_SINGLE}.proj_mlp"),
    },
)

SD3_IN_DIFFSYNTH = KeyTable(
    renamed={
        **_JOINT_NAMES,
        f"{_JOINT}.attn2.to_out.0": "blocks.*.attn2.a_to_out",
        "pos_embed.proj": "pos_embedder.proj",
        "norm_out.linear": "norm_out.linear",
        "proj_out": "proj_out",
    },
    fused={**_JOINT_FUSED, "blocks.*.attn2.a_to_qkv": tuple(f"{_JOINT}.attn2.to_{name}" for name in "qkv")},
)

# Numbers of the blocks there. Between them are blocks that only keep or fetch what skips a level.
_ATTENTIONS = {
    "down_blocks.1": (7, 10),
    "down_blocks.2": (15, 18),
    "mid_block": (21,),
    "up_blocks.0": (25, 28, 31),
    "up_blocks.1": (35, 38, 41),
}
_RESNETS = {
    "down_blocks.0": (0, 2),
    "down_blocks.1": (6, 9),
    "down_blocks.2": (14, 17),
    "mid_block": (20, 22),
    "up_blocks.0": (24, 27, 30),
    "up_blocks.1": (34, 37, 40),
    "up_blocks.2": (44, 46, 48),
}
_IN_TRANSFORMER = {
    **{f"attn{number}.to_{name}": f"attn{number}.to_{name}" for number in (1, 2) for name in "qkv"},
    **{f"attn{number}.to_out.0": f"attn{number}.to_out" for number in (1, 2)},
    "ff.net.0.proj": "act_fn.proj",
    "ff.net.2": "ff",
}


def _unet_names() -> dict[str, str]:
    attentions = {
        f"{block}.attentions.{place}": f"blocks.{number}"
        for block, numbers in _ATTENTIONS.items()
        for place, number in enumerate(numbers)
    }
    resnets = {
        f"{block}.resnets.{place}": f"blocks.{number}"
        for block, numbers in _RESNETS.items()
        for place, number in enumerate(numbers)
    }
    layers = {
        f"{path}.transformer_blocks.*.{layer}": f"{name}.transformer_blocks.*.{other}"
        for path, name in attentions.items()
        for layer, other in _IN_TRANSFORMER.items()
    }
    embeddings = {
        f"{ours}.linear_{number + 1}": f"{theirs}.{2 * number}"
        for ours, theirs in (("time_embedding", "time_embedding"), ("add_embedding", "add_time_embedding"))
        for number in range(2)
    }
    return {
        **attentions,
        **resnets,
        **layers,
        **embeddings,
        "down_blocks.0.downsamplers.0": "blocks.4",
        "down_blocks.1.downsamplers.0": "blocks.12",
        "up_blocks.0.upsamplers.0": "blocks.32",
        "up_blocks.1.upsamplers.0": "blocks.42",
        "encoder_hid_proj": "text_intermediate_proj",
    }


UNET_IN_DIFFSYNTH = KeyTable(renamed=_unet_names())
