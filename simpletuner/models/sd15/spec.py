"""What is known of Stable Diffusion 1.5 and 2.1 without loading them.

Sources: Rombach et al. (arXiv 2112.10752); the released `stable-diffusion-v1-5` and `stable-diffusion-2-1`; diffusers'
`unet_2d_condition.py` and `pipeline_stable_diffusion.py`.
"""

from __future__ import annotations

from typing import Any

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.clip_lengths import CLIP_LENGTHS
from simpletuner.models.unet_layers import ATTENTION, FEED_FORWARD, UNET_ADAPTABLE, original_unet_names

_SECOND = "CreativeML Open RAIL++-M"
# Of 1.5 these are convolutions, of 2.1 linear layers.
_PROJECTIONS = AdaptableModule("Conv2d", ("*attentions.*.proj_in", "*attentions.*.proj_out"))


def _flavour(name: str, hub_id: str, words: str, licence: str, parameters: int, **defaults: Any) -> Flavour:
    return Flavour(name, hub_id, words, licence, parameters, defaults)


def _second(name: str, words: str, **defaults: Any) -> Flavour:
    hub_id = f"sd2-community/stable-diffusion-{name.replace('.', '-')}"
    return _flavour(name, hub_id, words, _SECOND, 865_910_724, **defaults)


SD15 = FamilySpec(
    name="sd15",
    title="Stable Diffusion 1.5 and 2.1",
    family_class="simpletuner.models.sd15.family:SD15",
    flavours={
        "1.5": _flavour(
            *("1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5", "around 512 px, predicts the noise"),
            *("CreativeML Open RAIL-M", 859_520_964),
        ),
        "2.1": _second("2.1", "around 768 px, predicts v", validation_resolution="768x768"),
        "2.1-base": _second("2.1-base", "around 512 px, predicts the noise"),
    },
    default_flavour="1.5",
    components=(
        Component("unet", "diffusers.UNet2DConditionModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae", in_file=("first_stage_model.",)),
        Component(
            *("text_encoder", "transformers.CLIPTextModel", "text_encoder"),
            in_file=("cond_stage_model.transformer.", "cond_stage_model.model."),
        ),
        Component("tokenizer", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.PNDMScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="epsilon",
    latent_channels=4,
    vae_factor=8,
    patch_size=1,
    max_prompt_tokens=77,
    prompt_lengths=CLIP_LENGTHS,
    pipeline_class="StableDiffusionPipeline",
    adaptable=(*UNET_ADAPTABLE, _PROJECTIONS),
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": FEED_FORWARD},
    keys=KeyTable(
        renamed=original_unet_names(attention=(True, True, True, False)),
        architecture="stable-diffusion-v1",
        base_model_version="sd_v1",
        own_names=("kohya",),  # which are those that kohya's scripts have for this model
    ),
    # ComfyUI knows the attention of diffusers' form by the names of old versions alone.
    readers=usual_readers(left_out_by_comfyui=("*.attn*.to_*",), others=("A1111", "Forge")),
    reads_single_files=True,
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    preview_decoder="madebyollin/taesd",
    pipeline_options=("guidance_rescale",),
    prompt_options=("clip_skip",),
    defaults={
        "lora_format": "kohya",  # the form that every program reads
        "aspect_bucket_alignment": 64,
        "validation_guidance": 7.5,
        "validation_num_inference_steps": 30,
        "validation_resolution": "512x512",
    },
)
