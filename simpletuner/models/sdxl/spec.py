"""What is known of Stable Diffusion XL without loading it.

Sources: Podell et al., "SDXL" (arXiv 2307.01952); the released `stabilityai/stable-diffusion-xl-base-1.0`; diffusers'
`unet_2d_condition.py` and `pipeline_stable_diffusion_xl.py`.
"""

from __future__ import annotations

from typing import Any

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import Component, FamilySpec, Flavour
from simpletuner.models.clip_lengths import CLIP_LENGTHS
from simpletuner.models.diffsynth_names import UNET_IN_DIFFSYNTH
from simpletuner.models.unet_layers import ATTENTION, FEED_FORWARD, UNET_ADAPTABLE, original_unet_names

_CLIP = "transformers.CLIPText"


_FAIR = "Fair AI Public License 1.0-SD"
_V: dict[str, Any] = {"validation_guidance": 4.5, "validation_guidance_rescale": 0.7}
_EDM = "its noise levels are those of EDM, which are not supported"


def _flavour(name: str, hub_id: str, words: str, licence: str, **defaults: Any) -> Flavour:
    return Flavour(name, hub_id, words, licence, 2_567_463_684, defaults)


def _anime(name: str, hub_id: str, words: str, licence: str = _FAIR, **defaults: Any) -> Flavour:
    """What was made of SDXL with trainers that encode a dropped caption like any other."""
    return _flavour(name, hub_id, words, licence, force_zeros_for_empty_prompt=False, **defaults)


_FLAVOURS = (
    _flavour(
        *("base-1.0", "stabilityai/stable-diffusion-xl-base-1.0", "the base model, around 1024 px"),
        "CreativeML Open RAIL++-M",
    ),
    _flavour(
        *("base-0.9", "stabilityai/stable-diffusion-xl-base-0.9", "the release before it; gated"),
        "SDXL 0.9 Research License",
    ),
    _anime("illustrious-0.1", "OnomaAIResearch/Illustrious-xl-early-release-v0", "drawings by tags"),
    _anime("noobai-1.1", "Laxhar/noobai-XL-1.1", "drawings by tags, predicts the noise", f"{_FAIR}, not commercial"),
    _anime(
        *("noobai-v-1.0", "Laxhar/noobai-XL-Vpred-1.0", "drawings by tags, predicts v"),
        licence=f"{_FAIR}, not commercial",
        **_V,
    ),
    _anime("pony-6", "AstraliteHeart/pony-diffusion-v6", "drawings by tags", f"{_FAIR}, modified"),
)

SDXL = FamilySpec(
    name="sdxl",
    title="Stable Diffusion XL",
    family_class="simpletuner.models.sdxl.family:SDXL",
    flavours={flavour.name: flavour for flavour in _FLAVOURS},
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
    prompt_lengths=CLIP_LENGTHS,
    prompt_tensors=("prompt_embeds", "pooled_prompt_embeds"),
    empty_negative=" ",  # CLIP's tokens of nothing; "" is zeros
    pipeline_class="StableDiffusionXLPipeline",
    refused_models=dict.fromkeys(("stabilityai/cosxl", "playgroundai/playground-v2.5-1024px-aesthetic"), _EDM),
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
    prompt_options=("force_zeros_for_empty_prompt",),
    other_prompt_options={"clip_skip": "it always reads the layer before the last, which others call clip skip 2"},
    defaults={
        "lora_format": "kohya",  # the form that every program reads
        "aspect_bucket_alignment": 64,  # of the sizes that it was trained on (arXiv 2307.01952, appendix I)
        "validation_guidance": 5.0,
        "validation_num_inference_steps": 30,
        "validation_resolution": "1024x1024",
    },
)
