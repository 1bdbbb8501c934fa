"""What is known of Z-Image and Z-Image-Turbo without loading them.

Sources: Tongyi-MAI/Z-Image; the released `Tongyi-MAI/Z-Image` and `Tongyi-MAI/Z-Image-Turbo`; diffusers'
`transformer_z_image.py` and `pipeline_z_image.py`.
"""

from __future__ import annotations

from simpletuner.families.readers import NO_LENGTHS, OTHER_DORA, Reader
from simpletuner.families.spec import AdaptableModule, FamilySpec, Flavour, flow_components
from simpletuner.models.z_image.keys import STACKS, Z_IMAGE_KEYS

_BLOCKS = tuple(f"{stack}.*" for stack in STACKS)
_MODULATED = ("layers.*", "noise_refiner.*")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_ATTENTION = tuple(f"{block}.attention.{name}" for block in _BLOCKS for name in _PROJECTIONS)
_FEED_FORWARD = tuple(f"{block}.feed_forward.w{number}" for block in _BLOCKS for number in (1, 2, 3))
_MODULATION = tuple(f"{block}.adaLN_modulation.0" for block in _MODULATED)
_OUTSIDE = ("all_x_embedder.2-1", "all_final_layer.2-1.*")
_PARAMETERS = 6_154_908_736
_ASSISTANT = "ostris/zimage_turbo_training_adapter"  # made on images of Turbo itself

Z_IMAGE = FamilySpec(
    name="z_image",
    title="Z-Image",
    family_class="simpletuner.models.z_image.family:ZImage",
    flavours={
        flavour.name: flavour
        for flavour in (
            Flavour(
                "base",
                "Tongyi-MAI/Z-Image",
                "6 billion parameters, guidance and negative prompts",
                "Apache-2.0",
                _PARAMETERS,
            ),
            Flavour(
                "turbo",
                "Tongyi-MAI/Z-Image-Turbo",
                "distilled: generates in 8 steps without guidance",
                "Apache-2.0",
                _PARAMETERS,
                {
                    "validation_guidance": 0.0,
                    "validation_num_inference_steps": 8,
                    "assistant_lora_path": f"{_ASSISTANT}/zimage_turbo_training_adapter_v2.safetensors",
                },
            ),
        )
    },
    default_flavour="base",
    components=flow_components("ZImageTransformer2DModel", "Qwen3Model", "Qwen2Tokenizer"),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=512,
    pipeline_class="ZImagePipeline",
    adaptable=(
        AdaptableModule("Attention", tuple(f"{block}.attention" for block in _BLOCKS)),
        AdaptableModule("FeedForward", tuple(f"{block}.feed_forward" for block in _BLOCKS)),
        AdaptableModule("ZImageTransformerBlock", _BLOCKS),
        AdaptableModule("FinalLayer", ("all_final_layer.2-1",)),
        AdaptableModule("TimestepEmbedder", ("t_embedder",)),
        AdaptableModule(
            "Linear",
            (
                *(*_ATTENTION, *_FEED_FORWARD, *_MODULATION, "t_embedder.mlp.*", "cap_embedder.1"),
                *("all_x_embedder.2-1", "all_final_layer.2-1.linear", "all_final_layer.2-1.adaLN_modulation.1"),
            ),
        ),
    ),
    default_lora_targets=tuple(f"layers.*.attention.{name}" for name in _PROJECTIONS),
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "modulation": _MODULATION},
    keys=Z_IMAGE_KEYS,
    readers=(
        Reader("diffusers", ("diffusers", "comfyui"), ("lora",)),
        Reader("diffusers", ("diffusers",), ("dora",)),
        Reader("diffusers", ("comfyui",), ("lokr",)),
        Reader("diffusers", ("kohya",), ("lora",), _OUTSIDE),
        Reader("diffusers", ("kohya", "comfyui"), ("dora",), instead=NO_LENGTHS),
        Reader("ComfyUI", ("diffusers", "comfyui", "kohya", "lycoris"), ("lora",)),
        Reader("ComfyUI", ("comfyui", "kohya", "lycoris"), ("lokr", "loha")),
        Reader("ComfyUI", ("comfyui", "kohya", "lycoris"), ("dora",), instead=OTHER_DORA),
    ),
    reads_single_files=True,
    block_classes=("ZImageTransformerBlock",),
    preview_decoder="madebyollin/taef1",
    defaults={
        "validation_guidance": 4.0,
        "validation_num_inference_steps": 30,
        "validation_resolution": "1024x1024",
    },
)
