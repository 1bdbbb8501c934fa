"""What is known of FLUX.2 without loading it.

Sources: black-forest-labs/flux2; diffusers' `transformer_flux2.py`, `pipeline_flux2.py`, `pipeline_flux2_klein.py`.
"""

from __future__ import annotations

from simpletuner.families.readers import NO_LENGTHS, Reader, usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.flux2.keys import FLUX2_KEYS
from simpletuner.models.flux_blocks import DOUBLE, DOUBLE_ATTENTION, SINGLE

# Of the single blocks with half of their feed-forward.
_ATTENTION = (*DOUBLE_ATTENTION, *(f"{SINGLE}.attn.to_{name}" for name in ("qkv_mlp_proj", "out")))
_FEED_FORWARD = tuple(f"{DOUBLE}.{part}.linear_{layer}" for part in ("ff", "ff_context") for layer in ("in", "out"))
_MODULATION = ("double_stream_modulation_*.linear", "single_stream_modulation.linear")
_OUTSIDE = ("x_embedder", "context_embedder", "time_guidance_embed.*_embedder.linear_*", "norm_out.linear", "proj_out")
_REFUSED = "its references are read at time 0 into a cache, by another network than klein-9b's"
_GATED = "FLUX Non-Commercial License"
_SIZES = {"4b": 3_875_544_576, "9b": 9_078_581_248, "dev": 32_223_281_152}


def _flavour(name: str, repository: str, words: str, licence: str, **defaults: float) -> Flavour:
    size = _SIZES[name.rpartition("-")[2]]
    return Flavour(name, f"black-forest-labs/FLUX.2-{repository}", words, licence, size, defaults)


_FEW_STEPS = {"validation_num_inference_steps": 4, "validation_guidance": 1.0}
_FLAVOURS = (
    _flavour("klein-base-4b", "klein-base-4B", "3.9 billion parameters, Qwen3-4B", "Apache-2.0"),
    _flavour("klein-base-9b", "klein-base-9B", "9.1 billion parameters, Qwen3-8B; gated", _GATED),
    _flavour("dev", "dev", "guidance-distilled, 32 billion parameters, Mistral Small 24B; gated", _GATED),
    _flavour("klein-4b", "klein-4B", "klein-base-4b distilled for four steps", "Apache-2.0", **_FEW_STEPS),
    _flavour("klein-9b", "klein-9B", "klein-base-9b distilled for four steps; gated", _GATED, **_FEW_STEPS),
)

FLUX2 = FamilySpec(
    name="flux2",
    title="FLUX.2",
    family_class="simpletuner.models.flux2.family:Flux2",
    flavours={flavour.name: flavour for flavour in _FLAVOURS},
    default_flavour="klein-base-4b",
    components=(
        Component("transformer", "diffusers.Flux2Transformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKLFlux2", "vae"),
        # Qwen3 for klein, Mistral 3 for dev, whose rows of left padding are the public pipeline's with sdpa alone.
        Component("text_encoder", "transformers.AutoModel", "text_encoder", attention="sdpa"),
        Component("tokenizer", "transformers.AutoTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    # Latents are counted as the network sees them: patches of 2 x 2 of the VAE's 32 channels, and one token each.
    latent_channels=128,
    vae_factor=16,
    patch_size=1,
    max_prompt_tokens=512,
    max_references=10,
    drops_references=False,  # guidance of the public pipeline leads away from no prompt with the same references
    pipeline_class="Flux2KleinPipeline",
    pipeline_aliases=("Flux2Pipeline",),
    refused_models=dict.fromkeys(("Flux2KleinKVPipeline", "black-forest-labs/FLUX.2-klein-9b-kv"), _REFUSED),
    adaptable=(
        AdaptableModule("Flux2Attention", (f"{DOUBLE}.attn",)),
        AdaptableModule("Flux2ParallelSelfAttention", (f"{SINGLE}.attn",)),
        AdaptableModule("Flux2FeedForward", (f"{DOUBLE}.ff", f"{DOUBLE}.ff_context")),
        AdaptableModule("Flux2TransformerBlock", (DOUBLE,)),
        AdaptableModule("Flux2SingleTransformerBlock", (SINGLE,)),
        AdaptableModule("Flux2Modulation", ("double_stream_modulation_*", "single_stream_modulation")),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_MODULATION, *_OUTSIDE)),
    ),
    class_aliases={"Attention": "Flux2Attention", "FeedForward": "Flux2FeedForward"},
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "modulation": _MODULATION},
    keys=FLUX2_KEYS,
    readers=(
        *usual_readers(
            left_out_of_kohya=(*_MODULATION, "norm_out.linear", "time_guidance_embed.guidance_embedder.*"),
            silent=("lycoris",),
            left_out_by_comfyui=("time_guidance_embed.*", *_MODULATION),
        ),
        Reader("diffusers", ("lycoris",), ("lokr",)),
        # By the original names it does not exchange the halves of the last norm.
        Reader("diffusers", ("comfyui",), ("lora",), misreads=("norm_out.linear",)),
        Reader("diffusers", ("comfyui",), ("dora",), instead=NO_LENGTHS),
    ),
    reads_single_files=True,
    block_classes=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    defaults={"validation_guidance": 4.0, "validation_num_inference_steps": 50, "validation_resolution": "1024x1024"},
)
