"""What is known of Krea 2 without loading it.

Sources: the released Krea-2-Raw and Krea-2-Turbo; diffusers' `transformer_krea2.py` and `pipeline_krea2.py`, and its
training script `train_dreambooth_lora_krea2.py`.
"""

from __future__ import annotations

from simpletuner.families.readers import NO_LENGTHS, SILENT, Reader, usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.krea2.keys import KREA2_KEYS

_BLOCK = "transformer_blocks.*"
_TEXT = ("text_fusion.layerwise_blocks.*", "text_fusion.refiner_blocks.*")
_LAYERS = tuple(f"attn.to_{name}" for name in ("q", "k", "v", "gate", "out.0"))
_ATTENTION = tuple(f"{_BLOCK}.{layer}" for layer in _LAYERS)
_FEED_FORWARD = tuple(f"{_BLOCK}.ff.{layer}" for layer in ("gate", "up", "down"))
_TEXT_LAYERS = tuple(f"{block}.{layer}" for block in _TEXT for layer in (*_LAYERS, "ff.gate", "ff.up", "ff.down"))
_OUTSIDE = ("img_in", "final_layer.linear", "text_fusion.projector", "txt_in.*", "time_embed.*", "time_mod_proj")
_LICENCE = "Krea 2 Community License"
_PARAMETERS = 12_820_073_036
# Turbo has no guidance at all: Krea counts it from 0.
_TURBO = {"validation_num_inference_steps": 8, "validation_guidance": 0.0}

KREA2 = FamilySpec(
    name="krea2",
    title="Krea 2",
    family_class="simpletuner.models.krea2.family:Krea2",
    flavours={
        "raw": Flavour("raw", "krea/Krea-2-Raw", "undistilled, up to 1024 px; gated", _LICENCE, _PARAMETERS),
        "turbo": Flavour(
            *("turbo", "krea/Krea-2-Turbo", "distilled for eight steps; gated", _LICENCE, _PARAMETERS), _TURBO
        ),
    },
    default_flavour="raw",
    components=(
        Component("transformer", "diffusers.Krea2Transformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKLQwenImage", "vae"),
        Component("text_encoder", "transformers.Qwen3VLModel", "text_encoder"),
        Component("tokenizer", "transformers.AutoTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=16,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=512,
    pipeline_class="Krea2Pipeline",
    adaptable=(
        AdaptableModule("Krea2Attention", (f"{_BLOCK}.attn", *(f"{block}.attn" for block in _TEXT))),
        AdaptableModule("Krea2SwiGLU", (f"{_BLOCK}.ff", *(f"{block}.ff" for block in _TEXT))),
        AdaptableModule("Krea2TransformerBlock", (_BLOCK,)),
        AdaptableModule("Krea2TextFusionBlock", _TEXT),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_TEXT_LAYERS, *_OUTSIDE)),
    ),
    class_aliases={"Attention": "Krea2Attention", "FeedForward": "Krea2SwiGLU"},
    # The public script leaves the gates of the feed-forward out.
    default_lora_targets=(*_ATTENTION, f"{_BLOCK}.ff.up", f"{_BLOCK}.ff.down"),
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD, "text": _TEXT_LAYERS},
    keys=KREA2_KEYS,
    readers=(
        *usual_readers(left_out_of_kohya=None, silent=("kohya",), others=("musubi-tuner",)),
        Reader("diffusers", ("kohya",), ("lokr", "loha"), instead=SILENT),
        Reader("diffusers", ("comfyui",), ("lora",)),
        Reader("diffusers", ("comfyui",), ("dora",), instead=NO_LENGTHS),
    ),
    reads_single_files=True,
    block_classes=("Krea2TransformerBlock",),
    defaults={"validation_guidance": 4.5, "validation_num_inference_steps": 28, "validation_resolution": "1024x1024"},
)
