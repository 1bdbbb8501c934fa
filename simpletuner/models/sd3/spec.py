"""What is known of Stable Diffusion 3 and 3.5 without loading them.

Sources: Esser et al. (arXiv 2403.03206); the released 3-medium, 3.5-medium and 3.5-large; diffusers'
`transformer_sd3.py` and `pipeline_stable_diffusion_3.py`.
"""

from __future__ import annotations

from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.diffsynth_names import SD3_IN_DIFFSYNTH
from simpletuner.models.sd3.keys import SD3_KEYS

_BLOCK = "transformer_blocks.*"
_ATTENTION = (
    *(f"{_BLOCK}.attn.to_{name}" for name in ("q", "k", "v", "out.0", "add_out")),
    *(f"{_BLOCK}.attn.add_{name}_proj" for name in "qkv"),
    *(f"{_BLOCK}.attn2.to_{name}" for name in ("q", "k", "v", "out.0")),
)
_FEED_FORWARD = tuple(f"{_BLOCK}.{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2"))
_CLIP = "transformers.CLIPTextModelWithProjection"


def _flavour(name: str, words: str, parameters: int, layout: str = "") -> Flavour:
    hub_id = f"stabilityai/stable-diffusion-{name}{layout}"
    return Flavour(name, hub_id, f"{words}; gated", "Stability AI Community License", parameters)


SD3 = FamilySpec(
    name="sd3",
    title="Stable Diffusion 3",
    family_class="simpletuner.models.sd3.family:SD3",
    flavours={
        "3.5-medium": _flavour("3.5-medium", "two attentions in the first blocks, up to 1440 px", 2_243_171_520),
        "3.5-large": _flavour("3.5-large", "the largest, around 1024 px", 8_056_627_520),
        "3-medium": _flavour("3-medium", "the first release, around 1024 px", 2_028_328_000, layout="-diffusers"),
    },
    default_flavour="3.5-medium",
    components=(
        Component("transformer", "diffusers.SD3Transformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae", in_file=("first_stage_model.",)),
        Component("text_encoder", _CLIP, "text_encoder", in_file=("text_encoders.clip_l.",)),
        Component("text_encoder_2", _CLIP, "text_encoder", in_file=("text_encoders.clip_g.",)),
        Component(
            "text_encoder_3",
            "transformers.T5EncoderModel",
            "text_encoder",
            in_file=("text_encoders.t5xxl.",),
            is_optional=True,
        ),
        Component("tokenizer", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("tokenizer_2", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("tokenizer_3", "transformers.T5TokenizerFast", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=256,
    prompt_lengths=range(1, 513),
    prompt_tensors=("prompt_embeds", "pooled_prompt_embeds"),
    pipeline_class="StableDiffusion3Pipeline",
    adaptable=(
        AdaptableModule("Attention", (f"{_BLOCK}.attn", f"{_BLOCK}.attn2")),
        AdaptableModule("FeedForward", (f"{_BLOCK}.ff", f"{_BLOCK}.ff_context")),
        AdaptableModule("JointTransformerBlock", (_BLOCK,)),
        AdaptableModule(
            "Linear",
            (
                *(*_ATTENTION, *_FEED_FORWARD, f"{_BLOCK}.norm1.linear", f"{_BLOCK}.norm1_context.linear"),
                *("time_text_embed.*_embedder.linear_*", "context_embedder", "norm_out.linear", "proj_out"),
            ),
        ),
    ),
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=SD3_KEYS,
    diffsynth=SD3_IN_DIFFSYNTH,
    readers=usual_readers(left_out_of_kohya=None, silent=("kohya",)),
    reads_single_files=True,
    block_classes=("JointTransformerBlock",),
    preview_decoder="madebyollin/taesd3",
    pipeline_options=("skip_guidance_layers",),
    defaults={
        "validation_guidance": 4.5,
        "validation_num_inference_steps": 28,
        "validation_resolution": "1024x1024",
    },
)
