"""What is known of PixArt-Sigma without loading it.

Sources: Chen et al. (arXiv 2403.04692); the released `PixArt-alpha/PixArt-Sigma-XL-2-1024-MS`; diffusers'
`pixart_transformer_2d.py` and `pipeline_pixart_sigma.py`; of ComfyUI its pull request 6055.
"""

from __future__ import annotations

from simpletuner.families.readers import OTHER_DORA, Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.pixart_names import ATTENTION, BLOCK, pixart_keys

_FEED_FORWARD = (f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2")

PIXART_SIGMA = FamilySpec(
    name="pixart_sigma",
    title="PixArt-Sigma",
    family_class="simpletuner.models.pixart_sigma.family:PixArtSigma",
    flavours={
        "1024": Flavour(
            *("1024", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "around 1024 px", "CreativeML Open RAIL++-M"),
            parameters=610_856_096,
        ),
        "900m-0.6": Flavour(
            *("900m-0.6", "terminusresearch/pixart-900m-1024-ft-v0.6"),
            *("42 blocks in place of 28, trained on by others", "CreativeML Open RAIL-M"),
            parameters=908_433_824,
        ),
    },
    default_flavour="1024",
    components=(
        Component("transformer", "diffusers.PixArtTransformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component("text_encoder", "transformers.T5EncoderModel", "text_encoder"),
        Component(
            "tokenizer", "transformers.T5Tokenizer", "tokenizer", "tokenizer_config.json", package="sentencepiece"
        ),
        Component("scheduler", "diffusers.DPMSolverMultistepScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="epsilon",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=300,
    pipeline_class="PixArtSigmaPipeline",
    refused_models={
        "PixArtAlphaPipeline": "PixArt-Alpha is given the sizes of images and shorter texts, and has another VAE",
    },
    adaptable=(
        AdaptableModule("Attention", (f"{BLOCK}.attn1", f"{BLOCK}.attn2")),
        AdaptableModule("FeedForward", (f"{BLOCK}.ff",)),
        AdaptableModule("BasicTransformerBlock", (BLOCK,)),
        AdaptableModule("Conv2d", ("pos_embed.proj",)),
        AdaptableModule(
            "Linear",
            (
                *(*ATTENTION, *_FEED_FORWARD, "adaln_single.linear", "adaln_single.emb.timestep_embedder.linear_*"),
                *("caption_projection.linear_*", "proj_out"),
            ),
        ),
    ),
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=pixart_keys(
        *("pos_embed", "adaln_single"),
        {f"{BLOCK}.ff.net.0.proj": "blocks.*.mlp.fc1", f"{BLOCK}.ff.net.2": "blocks.*.mlp.fc2"},
        "pixart-sigma",
    ),
    # diffusers has no loader for it (its issue 14004).
    readers=(
        Reader("PEFT", ("diffusers",), ("lora", "dora")),
        Reader("ComfyUI", ("diffusers", "kohya", "comfyui"), ("lora",)),
        Reader("ComfyUI", ("kohya", "comfyui"), ("lokr", "loha")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("dora",), instead=OTHER_DORA),
    ),
    reads_single_files=True,
    block_classes=("BasicTransformerBlock",),
    preview_decoder="madebyollin/taesdxl",
    defaults={
        "aspect_bucket_alignment": 64,
        "validation_guidance": 4.5,
        "validation_num_inference_steps": 20,
        "validation_resolution": "1024x1024",
    },
)
