"""What is known of Stable Diffusion XL without loading it.

Sources: Podell et al., "SDXL" (arXiv 2307.01952); the released `stabilityai/stable-diffusion-xl-base-1.0`; diffusers'
`unet_2d_condition.py` and `pipeline_stable_diffusion_xl.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import Component, FamilySpec, Flavour
from simpletuner.models.diffsynth_names import UNET_IN_DIFFSYNTH
from simpletuner.models.unet_layers import ATTENTION, FEED_FORWARD, UNET_ADAPTABLE, original_unet_names

_CLIP = "transformers.CLIPText"


def _flavour(name: str, words: str, licence: str) -> Flavour:
    return Flavour(name, f"stabilityai/stable-diffusion-xl-{name}", words, licence, parameters=2_567_463_684)


SDXL = FamilySpec(
    name="sdxl",
    title="Stable Diffusion XL",
    family_class="simpletuner.models.sdxl.family:SDXL",
    flavours={
        "base-1.0": _flavour("base-1.0", "the base model, around 1024 px", "CreativeML Open RAIL++-M"),
        "base-0.9": _flavour("base-0.9", "the release before it; gated", "SDXL 0.9 Research License"),
    },
    default_flavour="base-1.0",
    components=(
        Component("unet", "diffusers.UNet2DConditionModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae", in_file=("first_stage_model.",)),
        Component("text_encoder", f"{_CLIP}Model", "text_encoder", in_file=("conditioner.embedders.0.",)),
        Component(
            "text_encoder_2", f"{_CLIP}ModelWithProjection", "text_encoder", in_file=("conditioner.embedders.1.",)
        ),
        Component("tokenizer", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("tokenizer_2", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.EulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="epsilon",
    latent_channels=4,
    vae_factor=8,
    patch_size=1,
    max_prompt_tokens=77,
    prompt_tensors=("prompt_embeds", "pooled_prompt_embeds"),
    empty_negative=" ",  # CLIP's tokens of nothing; "" is zeros
    pipeline_class="StableDiffusionXLPipeline",
    adaptable=UNET_ADAPTABLE,
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": FEED_FORWARD},
    keys=KeyTable(
        renamed=original_unet_names(),
        architecture="stable-diffusion-xl-v1-base",
        base_model_version="sdxl_base_v1-0",
    ),
    diffsynth=UNET_IN_DIFFSYNTH,
    # ComfyUI knows the attention of diffusers' form by the names of old versions alone.
    readers=usual_readers(left_out_by_comfyui=("*.attn*.to_*",), others=("A1111", "Forge")),
    reads_single_files=True,
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    preview_decoder="madebyollin/taesdxl",
    pipeline_options=("guidance_rescale",),
    other_prompt_options={"clip_skip": "it always reads the layer before the last, which others call clip skip 2"},
    defaults={
        "lora_format": "kohya",  # the form that every program reads
        "aspect_bucket_alignment": 64,  # of the sizes that it was trained on (arXiv 2307.01952, appendix I)
        "validation_guidance": 5.0,
        "validation_num_inference_steps": 30,
        "validation_resolution": "1024x1024",
    },
)
