"""What is known of Chroma without loading it.

Sources: lodestone-rock/flow; the released Chroma1-HD, Chroma1-Base and Chroma1-Flash; diffusers'
`transformer_chroma.py` and `pipeline_chroma.py`.
"""

from __future__ import annotations

from typing import Any

from simpletuner.families.readers import usual_readers
from simpletuner.families.spec import AdaptableModule, FamilySpec, Flavour, flow_components
from simpletuner.models.chroma.keys import CHROMA_KEYS
from simpletuner.models.flux_blocks import ATTENTION, DOUBLE, FEED_FORWARD, SINGLE

_OUTSIDE = ("x_embedder", "context_embedder", "proj_out")
_APPROXIMATOR = "distilled_guidance_layer"


def _flavour(name: str, words: str, **defaults: Any) -> Flavour:
    return Flavour(name.lower(), f"lodestones/Chroma1-{name}", words, "Apache-2.0", 8_899_983_424, defaults)


CHROMA = FamilySpec(
    name="chroma",
    title="Chroma",
    family_class="simpletuner.models.chroma.family:Chroma",
    flavours={
        flavour.name: flavour
        for flavour in (
            _flavour("HD", "around 1024 px, what most adapters are trained on"),
            _flavour("Base", "around 512 px, for long training", validation_resolution="512x512"),
            _flavour("Flash", "few steps without guidance", validation_guidance=1.0, validation_num_inference_steps=16),
        )
    },
    default_flavour="hd",
    components=flow_components("ChromaTransformer2DModel", "T5EncoderModel", "T5TokenizerFast"),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=512,
    prompt_lengths=range(1, 513),
    pipeline_class="ChromaPipeline",
    adaptable=(
        AdaptableModule("FluxAttention", (f"{DOUBLE}.attn", f"{SINGLE}.attn")),
        AdaptableModule("FeedForward", (f"{DOUBLE}.ff", f"{DOUBLE}.ff_context")),
        AdaptableModule("ChromaTransformerBlock", (DOUBLE,)),
        AdaptableModule("ChromaSingleTransformerBlock", (SINGLE,)),
        AdaptableModule("ChromaApproximator", (_APPROXIMATOR,)),
        AdaptableModule(
            "Linear",
            (
                *(*ATTENTION, *FEED_FORWARD, *_OUTSIDE),
                *(f"{_APPROXIMATOR}.{name}" for name in ("in_proj", "layers.*.linear_1", "layers.*.linear_2")),
                f"{_APPROXIMATOR}.out_proj",
            ),
        ),
    ),
    class_aliases={"Attention": "FluxAttention"},
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": FEED_FORWARD},
    keys=CHROMA_KEYS,
    readers=usual_readers(_OUTSIDE, silent=("comfyui",), refused_of_kohya=(f"{_APPROXIMATOR}.*",)),
    reads_single_files=True,
    block_classes=("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    preview_decoder="madebyollin/taef1",
    defaults={
        "validation_guidance": 3.0,
        "validation_num_inference_steps": 40,
        "validation_resolution": "1024x1024",
    },
)
