"""What is known of Lumina-Image 2.0 and Neta Lumina without loading them.

Sources: Alpha-VLLM/Lumina-Image-2.0 and its release; `neta-art/Neta-Lumina-diffusers`; diffusers' transformer,
pipeline, `convert_lumina2_to_diffusers` and `_convert_non_diffusers_lumina2_lora_to_diffusers`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import NO_LENGTHS, OTHER_DORA, SILENT, Reader
from simpletuner.families.spec import AdaptableModule, FamilySpec, Flavour, flow_components

MODULATED = ("layers.*", "noise_refiner.*")
BLOCKS = (*MODULATED, "context_refiner.*")
_FAIR = "Fair AI Public License 1.0-SD"
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ATTENTION = tuple(f"{block}.{layer}" for block in BLOCKS for layer in (*_QKV, "attn.to_out.0"))
_FEED_FORWARD = tuple(f"{block}.feed_forward.linear_{number}" for block in BLOCKS for number in (1, 2, 3))
_MODULATION = tuple(f"{block}.norm1.linear" for block in MODULATED)
_BLOCK_LAYERS = (*_ATTENTION, *_FEED_FORWARD, *_MODULATION)
_OUTSIDE = ("x_embedder", "time_caption_embed.*", "norm_out.linear_*")
_RENAMED = {
    **{"attn": "attention", "attn.to_out.0": "attention.out", "norm1": "attention_norm1", "norm2": "attention_norm2"},
    **{f"attn.norm_{name}": f"attention.{name}_norm" for name in "qk"},
    **{f"feed_forward.linear_{number}": f"feed_forward.w{number}" for number in (1, 2, 3)},
}
LUMINA2_KEYS = KeyTable(
    renamed={
        **{f"{block}.{ours}": f"{block}.{theirs}" for block in BLOCKS for ours, theirs in _RENAMED.items()},
        **{f"{block}.norm1.norm": f"{block}.attention_norm1" for block in MODULATED},
        **{f"{block}.norm1.linear": f"{block}.adaLN_modulation.1" for block in MODULATED},
        "time_caption_embed.caption_embedder": "cap_embedder",
        **{f"time_caption_embed.timestep_embedder.linear_{n + 1}": f"t_embedder.mlp.{2 * n}" for n in (0, 1)},
        **{"norm_out.linear_1": "final_layer.adaLN_modulation.1", "norm_out.linear_2": "final_layer.linear"},
    },
    fused={f"{block}.attention.qkv": tuple(f"{block}.{layer}" for layer in _QKV) for block in BLOCKS},
    unused=("norm_final",),
    without_alpha=("comfyui",),
    architecture="lumina-2",
    kohya_network="networks.lora_lumina",
)

LUMINA2 = FamilySpec(
    name="lumina2",
    title="Lumina 2",
    family_class="simpletuner.models.lumina2.family:Lumina2",
    flavours={
        "2.0": Flavour("2.0", "Alpha-VLLM/Lumina-Image-2.0", "up to 1024 px", "Apache-2.0", 2_609_769_152),
        "neta": Flavour("neta", "neta-art/Neta-Lumina-diffusers", "drawings", _FAIR, 2_609_769_152),
    },
    default_flavour="2.0",
    components=flow_components("Lumina2Transformer2DModel", "Gemma2Model", "GemmaTokenizer"),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=256,
    negative_mark="<Negative> ",
    prompt_tensors=("prompt_embeds",),
    pipeline_class="Lumina2Pipeline",
    pipeline_aliases=("Lumina2Text2ImgPipeline",),
    adaptable=(
        AdaptableModule("Attention", tuple(f"{block}.attn" for block in BLOCKS)),
        AdaptableModule("LuminaFeedForward", tuple(f"{block}.feed_forward" for block in BLOCKS)),
        AdaptableModule("Lumina2TransformerBlock", BLOCKS),
        AdaptableModule("Linear", (*_BLOCK_LAYERS, *_OUTSIDE)),
    ),
    class_aliases={"FeedForward": "LuminaFeedForward"},
    default_lora_targets=_BLOCK_LAYERS,  # diffusers reads ComfyUI's form of whole blocks alone
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "modulation": _MODULATION},
    keys=LUMINA2_KEYS,
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("kohya",), ("lora", "dora"), instead=SILENT),
        Reader("diffusers", ("comfyui",), ("lora",), refuses=_OUTSIDE, whole_blocks=_BLOCK_LAYERS),
        Reader("diffusers", ("comfyui",), ("dora",), instead=NO_LENGTHS, refuses=_OUTSIDE, whole_blocks=_BLOCK_LAYERS),
        Reader("ComfyUI", ("kohya", "comfyui"), ("lora", "lokr", "loha")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("dora",), instead=OTHER_DORA),
        Reader("kohya's scripts", ("kohya",), ("lora",)),
    ),
    reads_single_files=True,
    block_classes=("Lumina2TransformerBlock",),
    preview_decoder="madebyollin/taef1",
    defaults={"lora_format": "comfyui", "validation_guidance": 4.0, "validation_resolution": "1024x1024"},
)
