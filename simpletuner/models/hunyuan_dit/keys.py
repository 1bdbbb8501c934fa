"""Hunyuan-DiT's modules by the names of the original release, and by those of DiffSynth-Studio.

Queries, keys and values are rows of one matrix in the original (`Wqkv`, `kv_proj`); norm2 and norm3 are exchanged
there, and so are scale and shift of the last layer. Source: Tencent/HunyuanDiT (`hydit/modules/models.py`); diffusers'
`scripts/convert_hunyuandit_to_diffusers.py`; DiffSynth-Studio's `hunyuan_dit.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

# In diffusers, in the original release, in DiffSynth-Studio; first what is inside of a block.
_IN_BLOCK = (
    ("norm1.norm", "norm1", "norm1"),
    ("norm2", "norm3", "norm3"),
    ("norm3", "norm2", "norm2"),
    ("norm1.linear", "default_modulation.1", "modulation.1"),
    ("ff.net.0.proj", "mlp.fc1", "mlp.0"),
    ("ff.net.2", "mlp.fc2", "mlp.2"),
    ("attn2.to_q", "attn2.q_proj", "attn2.to_q"),
    *((f"attn{n}.to_out.0", f"attn{n}.out_proj", f"attn{n}.to_out") for n in (1, 2)),
    *((f"attn{n}.norm_{x}", f"attn{n}.{x}_norm", f"rota{n}.{x}_norm") for n in (1, 2) for x in "qk"),
)
_MLPS = (
    ("time_extra_emb.extra_embedder", "extra_embedder", "extra_embedder"),
    ("time_extra_emb.timestep_embedder", "t_embedder.mlp", "timestep_embedder.mlp"),
    ("text_embedder", "mlp_t5", "t5_embedder"),
)
_NAMES = (
    *(tuple(f"blocks.*.{name}" for name in names) for names in _IN_BLOCK),
    *(
        (f"{ours}.linear_{n}", f"{first}.{2 * n - 2}", f"{second}.{2 * n - 2}")
        for ours, first, second in _MLPS
        for n in (1, 2)
    ),
    ("time_extra_emb.pooler", "pooler", "t5_pooler"),
    ("time_extra_emb.style_embedder", "style_embedder", "style_embedder"),
    ("pos_embed.proj", "x_embedder.proj", "patch_embedder.proj"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
    ("proj_out", "final_layer.linear", "final_layer.linear"),
)

HUNYUAN_DIT_KEYS = KeyTable(
    renamed={names[0]: names[1] for names in _NAMES},
    fused={
        "blocks.*.attn1.Wqkv": tuple(f"blocks.*.attn1.to_{name}" for name in "qkv"),
        "blocks.*.attn2.kv_proj": tuple(f"blocks.*.attn2.to_{name}" for name in "kv"),
    },
    swapped=("norm_out.linear",),
    architecture="hunyuan-dit",
    base_model_version="hunyuan-dit",
)
_AS_IN_DIFFUSERS = ("blocks.*.skip_linear", *(f"blocks.*.attn{n}.to_{x}" for n in (1, 2) for x in "qkv"))
HUNYUAN_DIT_IN_DIFFSYNTH = KeyTable(
    renamed={names[0]: names[2] for names in _NAMES} | {name: name for name in _AS_IN_DIFFUSERS},
    swapped=("norm_out.linear",),
)
