"""What is known of Sana without loading it.

Sources: Xie et al. (arXiv 2410.10629 and 2501.18427); the released `Efficient-Large-Model/Sana*_diffusers`; diffusers'
`sana_transformer.py`, `pipeline_sana.py` and `train_dreambooth_lora_sana.py`.
"""

from __future__ import annotations

from typing import Any

from simpletuner.families.readers import SILENT, Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.pixart_names import ATTENTION, BLOCK, pixart_keys

# In front of texts that are encoded without the instruction: dropped captions and negative prompts.
PLAIN = "<plain>"
# All three are convolutions; the middle one looks at each channel by itself.
_CONVOLUTIONS = {"inverted": "inverted_conv", "depth": "depth_conv", "point": "point_conv"}
_FEED_FORWARD = (f"{BLOCK}.ff.conv_inverted", f"{BLOCK}.ff.conv_point")
_NORMS = {
    f"attn{number}.norm_{part}": f"{name}.{part}_norm"
    for number, name in ((1, "attn"), (2, "cross_attn"))
    for part in "qk"
}
_PARAMETERS = {"4.8b": 4_721_825_952, "1.5-1.6b": 1_604_641_952, "1.0-1.6b": 1_604_462_752, "0.6b": 591_747_872}


def _flavour(name: str, hub_id: str, words: str, **defaults: Any) -> Flavour:
    size = next(size for size in _PARAMETERS if size in name)
    licence = "NVIDIA NSCL v2 and Gemma Terms of Use"
    return Flavour(name, f"Efficient-Large-Model/{hub_id}_diffusers", words, licence, _PARAMETERS[size], defaults)


_FLAVOURS = (
    _flavour("1.5-1.6b", "SANA1.5_1.6B_1024px", "20 blocks, around 1024 px"),
    _flavour("1.5-4.8b", "SANA1.5_4.8B_1024px", "60 blocks, around 1024 px"),
    _flavour("1.0-1.6b", "Sana_1600M_1024px_BF16", "the release before it, around 1024 px"),
    _flavour("1.0-1.6b-512", "Sana_1600M_512px", "the same, around 512 px", validation_resolution="512x512"),
    _flavour("1.0-0.6b", "Sana_600M_1024px", "28 narrower blocks, around 1024 px"),
    _flavour("1.0-0.6b-512", "Sana_600M_512px", "the same, around 512 px", validation_resolution="512x512"),
)

SANA = FamilySpec(
    name="sana",
    title="Sana",
    family_class="simpletuner.models.sana.family:Sana",
    flavours={flavour.name: flavour for flavour in _FLAVOURS},
    default_flavour="1.5-1.6b",
    components=(
        Component("transformer", "diffusers.SanaTransformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderDC", "vae"),
        Component("text_encoder", "transformers.Gemma2Model", "text_encoder"),
        Component("tokenizer", "transformers.GemmaTokenizerFast", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.DPMSolverMultistepScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=32,
    vae_factor=32,
    patch_size=1,
    max_prompt_tokens=300,
    dropped_caption=PLAIN,
    empty_negative=PLAIN,
    negative_mark=PLAIN,
    pipeline_class="SanaPipeline",
    refused_models={
        "SanaSprintPipeline": "Sana-Sprint is distilled for few steps of another kind, whose training is not built",
        "SanaControlNetPipeline": "its transformer is steered by a second network, which is not trained here",
    },
    adaptable=(
        AdaptableModule("Attention", (f"{BLOCK}.attn1", f"{BLOCK}.attn2")),
        AdaptableModule("GLUMBConv", (f"{BLOCK}.ff",)),
        AdaptableModule("SanaTransformerBlock", (BLOCK,)),
        AdaptableModule("Conv2d", (*_FEED_FORWARD, "patch_embed.proj")),
        AdaptableModule(
            "Linear",
            (
                *(*ATTENTION, "time_embed.linear", "time_embed.emb.timestep_embedder.linear_*"),
                *("caption_projection.linear_*", "proj_out"),
            ),
        ),
    ),
    unadaptable=(f"{BLOCK}.ff.conv_depth",),
    class_aliases={"FeedForward": "GLUMBConv"},
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=pixart_keys(
        *("patch_embed", "time_embed"),
        {
            **{f"{BLOCK}.ff.conv_{ours}": f"blocks.*.mlp.{theirs}.conv" for ours, theirs in _CONVOLUTIONS.items()},
            **{f"{BLOCK}.{ours}": f"blocks.*.{theirs}" for ours, theirs in _NORMS.items()},
            "caption_norm": "attention_y_norm",
        },
        "sana",
    ),
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("kohya",), ("lora", "dora", "lokr", "loha"), instead=SILENT),
    ),
    reads_single_files=True,
    block_classes=("SanaTransformerBlock",),
    defaults={"validation_guidance": 4.5, "validation_num_inference_steps": 20, "validation_resolution": "1024x1024"},
)
