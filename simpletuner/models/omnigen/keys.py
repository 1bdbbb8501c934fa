"""OmniGen's modules by the names of the original release (`OmniGen/model.py` around transformers' Phi-3).

Source: VectorSpaceLab/OmniGen; diffusers' `scripts/convert_omnigen_to_diffusers.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import Reader

OMNIGEN_KEYS = KeyTable(
    renamed={
        "layers.*.self_attn.to_out.0": "llm.layers.*.self_attn.o_proj",
        "layers.*": "llm.layers.*",
        "norm": "llm.norm",
        "embed_tokens": "llm.embed_tokens",
        "patch_embedding.output_image_proj": "x_embedder.proj",
        "patch_embedding.input_image_proj": "input_x_embedder.proj",
        "time_token.linear_1": "time_token.mlp.0",
        "time_token.linear_2": "time_token.mlp.2",
        "t_embedder.linear_1": "t_embedder.mlp.0",
        "t_embedder.linear_2": "t_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    },
    fused={
        "llm.layers.*.self_attn.qkv_proj": (
            "layers.*.self_attn.to_q",
            "layers.*.self_attn.to_k",
            "layers.*.self_attn.to_v",
        ),
    },
    architecture="omnigen-v1",
    base_model_version="omnigen_v1",
)

# diffusers has no loader for OmniGen, and ComfyUI does not run it.
OMNIGEN_READERS = (Reader("PEFT", ("diffusers",), ("lora", "dora")),)
