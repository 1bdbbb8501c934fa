"""Hunyuan-DiT's modules by the names of the original release, and by those of DiffSynth-Studio.

Queries, keys and values are rows of one matrix in the original (`Wqkv`, `kv_proj`); norm2 and norm3 are exchanged
there, and so are scale and shift of the last layer. Source: Tencent/HunyuanDiT (`hydit/modules/models.py`); diffusers'
`scripts/convert_hunyuandit_to_diffusers.py`; DiffSynth-Studio's `hunyuan_dit.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_BLOCK = "blocks.*"
_NORMS = {
    f"{_BLOCK}.norm1.norm": f"{_BLOCK}.norm1",
    f"{_BLOCK}.norm2": f"{_BLOCK}.norm3",
    f"{_BLOCK}.norm3": f"{_BLOCK}.norm2",
}
_LAST = {"norm_out.linear": "final_layer.adaLN_modulation.1", "proj_out": "final_layer.linear"}
_EXTRA = {f"time_extra_emb.extra_embedder.linear_{n}": f"extra_embedder.{2 * n - 2}" for n in (1, 2)}

HUNYUAN_DIT_KEYS = KeyTable(
    renamed={
        **_NORMS,
        **_LAST,
        **_EXTRA,
        **{f"{_BLOCK}.attn{n}.to_out.0": f"{_BLOCK}.attn{n}.out_proj" for n in (1, 2)},
        **{f"{_BLOCK}.attn{n}.norm_{name}": f"{_BLOCK}.attn{n}.{name}_norm" for n in (1, 2) for name in "qk"},
        f"{_BLOCK}.attn2.to_q": f"{_BLOCK}.attn2.q_proj",
        f"{_BLOCK}.norm1.linear": f"{_BLOCK}.default_modulation.1",
        f"{_BLOCK}.ff.net.0.proj": f"{_BLOCK}.mlp.fc1",
        f"{_BLOCK}.ff.net.2": f"{_BLOCK}.mlp.fc2",
        "time_extra_emb.pooler": "pooler",
        "time_extra_emb.style_embedder": "style_embedder",
        **{f"time_extra_emb.timestep_embedder.linear_{n}": f"t_embedder.mlp.{2 * n - 2}" for n in (1, 2)},
        **{f"text_embedder.linear_{n}": f"mlp_t5.{2 * n - 2}" for n in (1, 2)},
        "pos_embed.proj": "x_embedder.proj",
    },
    fused={
        f"{_BLOCK}.attn1.Wqkv": tuple(f"{_BLOCK}.attn1.to_{name}" for name in "qkv"),
        f"{_BLOCK}.attn2.kv_proj": tuple(f"{_BLOCK}.attn2.to_{name}" for name in "kv"),
    },
    swapped=("norm_out.linear",),
    architecture="hunyuan-dit",
    base_model_version="hunyuan-dit",
)

HUNYUAN_DIT_IN_DIFFSYNTH = KeyTable(
    renamed={
        **_NORMS,
        **_LAST,
        **_EXTRA,
        **{f"{_BLOCK}.attn{n}.to_{name}": f"{_BLOCK}.attn{n}.to_{name}" for n in (1, 2) for name in "qkv"},
        **{f"{_BLOCK}.attn{n}.to_out.0": f"{_BLOCK}.attn{n}.to_out" for n in (1, 2)},
        **{f"{_BLOCK}.attn{n}.norm_{name}": f"{_BLOCK}.rota{n}.{name}_norm" for n in (1, 2) for name in "qk"},
        f"{_BLOCK}.norm1.linear": f"{_BLOCK}.modulation.1",
        f"{_BLOCK}.ff.net.0.proj": f"{_BLOCK}.mlp.0",
        f"{_BLOCK}.ff.net.2": f"{_BLOCK}.mlp.2",
        f"{_BLOCK}.skip_linear": f"{_BLOCK}.skip_linear",
        "time_extra_emb.pooler": "t5_pooler",
        "time_extra_emb.style_embedder": "style_embedder",
        **{f"time_extra_emb.timestep_embedder.linear_{n}": f"timestep_embedder.mlp.{2 * n - 2}" for n in (1, 2)},
        **{f"text_embedder.linear_{n}": f"t5_embedder.{2 * n - 2}" for n in (1, 2)},
        "pos_embed.proj": "patch_embedder.proj",
    },
    swapped=("norm_out.linear",),
)
