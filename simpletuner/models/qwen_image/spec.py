"""What is known of Qwen-Image without loading it.

Sources: the released Qwen-Image and Qwen-Image-2512; QwenLM/Qwen-Image; diffusers' `transformer_qwenimage.py` and
`pipeline_qwenimage.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import NO_LENGTHS, OTHER_DORA, Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour

_BLOCK = "transformer_blocks.*"
_ATTENTION = (
    *(f"{_BLOCK}.attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
    *(f"{_BLOCK}.attn.add_{name}_proj" for name in "qkv"),
)
_FEED_FORWARD = tuple(f"{_BLOCK}.{stream}_mlp.net.{layer}" for stream in ("img", "txt") for layer in ("0.proj", "2"))
_MODULATION = tuple(f"{_BLOCK}.{stream}_mod.1" for stream in ("img", "txt"))
_OUTSIDE = ("img_in", "txt_in", "time_text_embed.timestep_embedder.linear_*", "norm_out.linear", "proj_out")

# Of the denoiser; the language model has 8.3 billion more.
PARAMETERS = 20_430_401_088


QWEN_IMAGE = FamilySpec(
    name="qwen_image",
    title="Qwen-Image",
    family_class="simpletuner.models.qwen_image.family:QwenImage",
    flavours={
        "2512": Flavour(
            "2512",
            "Qwen/Qwen-Image-2512",
            "the release of December 2025, 20 billion parameters",
            "Apache-2.0",
            PARAMETERS,
        ),
        "v1": Flavour("v1", "Qwen/Qwen-Image", "the first release, August 2025", "Apache-2.0", PARAMETERS),
    },
    default_flavour="2512",
    components=(
        Component("transformer", "diffusers.QwenImageTransformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKLQwenImage", "vae"),
        Component("text_encoder", "transformers.Qwen2_5_VLForConditionalGeneration", "text_encoder"),
        Component("tokenizer", "transformers.Qwen2Tokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=512,
    prompt_tensors=("prompt_embeds",),
    # What the published examples lead away from; an empty text would be another prompt.
    dropped_caption=" ",
    empty_negative=" ",
    pipeline_class="QwenImagePipeline",
    adaptable=(
        AdaptableModule("Attention", (f"{_BLOCK}.attn",)),
        AdaptableModule("FeedForward", (f"{_BLOCK}.img_mlp", f"{_BLOCK}.txt_mlp")),
        AdaptableModule("QwenImageTransformerBlock", (_BLOCK,)),
        AdaptableModule("AdaLayerNormContinuous", ("norm_out",)),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_MODULATION, *_OUTSIDE)),
    ),
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "modulation": _MODULATION},
    # The release has the names that diffusers has.
    keys=KeyTable(architecture="Qwen-Image", base_model_version="qwen_image", kohya_network="networks.lora_qwen_image"),
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("kohya", "comfyui"), ("lora",)),
        Reader("diffusers", ("kohya", "comfyui"), ("dora",), instead=NO_LENGTHS),
        Reader("ComfyUI", ("kohya", "comfyui", "lycoris"), ("lora", "lokr", "loha")),
        Reader("ComfyUI", ("kohya", "comfyui", "lycoris"), ("dora",), instead=OTHER_DORA),
        Reader("ComfyUI", ("diffusers",), ("lora",)),
        Reader("musubi-tuner", ("kohya",), ("lora",)),
    ),
    reads_single_files=True,
    block_classes=("QwenImageTransformerBlock",),
    defaults={
        "validation_guidance": 4.0,
        "validation_num_inference_steps": 50,
        "validation_resolution": "1024x1024",
    },
)
