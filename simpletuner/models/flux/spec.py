"""What is known of FLUX.1 without loading it.

Sources: black-forest-labs/flux; the released FLUX.1-dev, -schnell, -Krea-dev and -Kontext-dev; diffusers'
`transformer_flux.py`, `pipeline_flux.py` and `pipeline_flux_kontext.py`.
"""

from __future__ import annotations

from typing import Any

from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.diffsynth_names import FLUX_IN_DIFFSYNTH
from simpletuner.models.flux.keys import FLUX_KEYS
from simpletuner.models.flux_blocks import ATTENTION, DOUBLE, FEED_FORWARD, SINGLE

_MODULATION = (f"{DOUBLE}.norm1.linear", f"{DOUBLE}.norm1_context.linear", f"{SINGLE}.norm.linear")
_OUTSIDE = ("x_embedder", "context_embedder", "time_text_embed.*", "norm_out.linear", "proj_out")
_NON_COMMERCIAL = "FLUX.1 [dev] Non-Commercial License"
_DEV_PARAMETERS, _SCHNELL_PARAMETERS = 11_901_408_320, 11_891_178_560  # schnell has no guidance as an input


def _flavour(name: str, words: str, licence: str = _NON_COMMERCIAL, **defaults: Any) -> Flavour:
    repository = {"krea": "Krea-dev", "kontext": "Kontext-dev"}.get(name, name)
    hub_id = f"black-forest-labs/FLUX.1-{repository}"
    parameters = _SCHNELL_PARAMETERS if name == "schnell" else _DEV_PARAMETERS
    return Flavour(name, hub_id, words, licence, parameters, defaults, edits=name == "kontext")


FLUX = FamilySpec(
    name="flux",
    title="FLUX.1",
    family_class="simpletuner.models.flux.family:Flux",
    flavours={
        flavour.name: flavour
        for flavour in (
            _flavour("dev", "guidance-distilled, 12 billion parameters; gated"),
            _flavour("krea", "dev with a photographic look; gated"),
            _flavour("kontext", "edits a reference image; gated", validation_guidance=2.5),
            _flavour(
                "schnell",
                "generates in four steps",
                "Apache-2.0",
                validation_num_inference_steps=4,
                assistant_lora_path="ostris/FLUX.1-schnell-training-adapter",
            ),
        )
    },
    default_flavour="dev",
    components=(
        Component("transformer", "diffusers.FluxTransformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component("text_encoder", "transformers.CLIPTextModel", "text_encoder"),
        Component("text_encoder_2", "transformers.T5EncoderModel", "text_encoder"),
        Component("tokenizer", "transformers.CLIPTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("tokenizer_2", "transformers.T5TokenizerFast", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=512,
    prompt_lengths=range(1, 513),
    prompt_tensors=("prompt_embeds", "pooled_prompt_embeds"),
    max_references=1,
    pipeline_class="FluxPipeline",
    pipeline_aliases=("FluxKontextPipeline",),
    adaptable=(
        AdaptableModule("FluxAttention", (f"{DOUBLE}.attn", f"{SINGLE}.attn")),
        AdaptableModule("FeedForward", (f"{DOUBLE}.ff", f"{DOUBLE}.ff_context")),
        AdaptableModule("FluxTransformerBlock", (DOUBLE,)),
        AdaptableModule("FluxSingleTransformerBlock", (SINGLE,)),
        AdaptableModule("AdaLayerNormZero", (f"{DOUBLE}.norm1", f"{DOUBLE}.norm1_context")),
        AdaptableModule("AdaLayerNormZeroSingle", (f"{SINGLE}.norm",)),
        AdaptableModule("AdaLayerNormContinuous", ("norm_out",)),
        AdaptableModule(
            "Linear",
            (
                *(*ATTENTION, *FEED_FORWARD, *_MODULATION),
                *("x_embedder", "context_embedder", "norm_out.linear", "proj_out"),
                *(f"time_text_embed.{part}_embedder.linear_*" for part in ("timestep", "text", "guidance")),
            ),
        ),
    ),
    class_aliases={"Attention": "FluxAttention"},
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": FEED_FORWARD, "modulation": _MODULATION},
    keys=FLUX_KEYS,
    diffsynth=FLUX_IN_DIFFSYNTH,
    readers=usual_readers(_OUTSIDE, silent=("comfyui",)),
    reads_single_files=True,
    block_classes=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    preview_decoder="madebyollin/taef1",
    pipeline_options=("true_cfg_scale",),
    defaults={
        "validation_guidance": 3.5,
        "validation_num_inference_steps": 28,
        "validation_resolution": "1024x1024",
    },
)
