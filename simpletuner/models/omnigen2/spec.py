"""What is known of OmniGen2 without loading it.

Sources: VectorSpaceLab/OmniGen2; arXiv 2506.18871; the released `OmniGen2/OmniGen2`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour

# Stands for an instruction that was dropped: OmniGen2 was trained with another system prompt in its place.
DROPPED_INSTRUCTION = "<|dropped_instruction|>"

_MODULATED = ("layers.*", "noise_refiner.*", "ref_image_refiner.*")
_BLOCKS = (*_MODULATED, "context_refiner.*")
_ATTENTION = tuple(f"{block}.attn.to_{name}" for block in _BLOCKS for name in ("q", "k", "v", "out.0"))
_FEED_FORWARD = tuple(f"{block}.feed_forward.linear_{number}" for block in _BLOCKS for number in (1, 2, 3))
_MODULATION = tuple(f"{block}.norm1.linear" for block in _MODULATED)
_TIME = "time_caption_embed.timestep_embedder"

OMNIGEN2 = FamilySpec(
    name="omnigen2",
    title="OmniGen2",
    family_class="simpletuner.models.omnigen2.family:OmniGen2",
    flavours={
        "v1": Flavour(
            name="v1",
            hub_id="OmniGen2/OmniGen2",
            description="4 billion parameters, Qwen2.5-VL-3B, FLUX.1's VAE; edits, up to 5 input images",
            licence="Apache-2.0",
            parameters=3_967_161_400,
            edits=True,
        )
    },
    default_flavour="v1",
    components=(
        Component("transformer", "simpletuner.models.omnigen2.transformer.OmniGen2Transformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component("mllm", "transformers.Qwen2_5_VLForConditionalGeneration", "text_encoder"),
        Component("processor", "transformers.AutoTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=888,
    prompt_tensors=("prompt_embeds",),
    max_references=5,
    stretches=True,
    dropped_caption=DROPPED_INSTRUCTION,
    pipeline_class="OmniGen2Pipeline",
    adaptable=(
        AdaptableModule("Attention", tuple(f"{block}.attn" for block in _BLOCKS)),
        AdaptableModule("LuminaFeedForward", tuple(f"{block}.feed_forward" for block in _BLOCKS)),
        AdaptableModule("OmniGen2TransformerBlock", _BLOCKS),
        AdaptableModule("LuminaRMSNormZero", tuple(f"{block}.norm1" for block in _MODULATED)),
        AdaptableModule("LuminaLayerNormContinuous", ("norm_out",)),
        AdaptableModule("TimestepEmbedding", (_TIME,)),
        AdaptableModule(
            "Linear",
            (
                *(*_ATTENTION, *_FEED_FORWARD, *_MODULATION),
                *("x_embedder", "ref_image_patch_embedder", "norm_out.linear_*"),
                *(f"{_TIME}.linear_*", "time_caption_embed.caption_embedder.1"),
            ),
        ),
    ),
    class_aliases={"FeedForward": "LuminaFeedForward"},
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "modulation": _MODULATION},
    keys=KeyTable(architecture="omnigen2", base_model_version="omnigen2"),
    readers=(
        Reader("OmniGen2", ("diffusers",), ("lora",)),
        Reader("PEFT", ("diffusers",), ("lora", "dora")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("lora", "lokr", "loha")),
    ),
    block_classes=("OmniGen2TransformerBlock",),
    preview_decoder="madebyollin/taef1",
    pipeline_options=("img_guidance_scale",),
    defaults={
        "validation_guidance": 5.0,
        "validation_num_inference_steps": 50,
        "validation_resolution": "1024x1024",
    },
    unusable_options={
        "validation_noise_scheduler": (
            (None, "", "dpm++"),
            "OmniGen2 generates by steps of its flow: with Euler's, which is its own, or with dpm++",
        ),
    },
)
