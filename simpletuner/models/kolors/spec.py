"""What is known of Kolors without loading it.

Sources: the released `Kwai-Kolors/Kolors-diffusers` and Kwai-Kolors/Kolors' code; diffusers' `pipeline_kolors.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import NO_LENGTHS, OTHER_DORA, Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.diffsynth_names import UNET_IN_DIFFSYNTH
from simpletuner.models.unet_layers import ATTENTION, FEED_FORWARD, UNET_ADAPTABLE, original_unet_names

_COMFYUI = "ComfyUI with a node for Kolors"

KOLORS = FamilySpec(
    name="kolors",
    title="Kolors",
    family_class="simpletuner.models.kolors.family:Kolors",
    flavours={
        "1.0": Flavour(
            "1.0",
            "Kwai-Kolors/Kolors-diffusers",
            "Chinese and English captions, around 1024 px",
            "Kolors Model License",
            parameters=2_579_458_820,
        )
    },
    default_flavour="1.0",
    components=(
        Component("unet", "diffusers.UNet2DConditionModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component(
            "text_encoder",
            "diffusers.pipelines.kolors.text_encoder.ChatGLMModel",
            "text_encoder",
            library="kolors",
        ),
        Component(
            "tokenizer",
            "diffusers.pipelines.kolors.tokenizer.ChatGLMTokenizer",
            "tokenizer",
            "tokenizer_config.json",
            library="kolors",
            package="sentencepiece",
        ),
        Component("scheduler", "diffusers.EulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="epsilon",
    latent_channels=4,
    vae_factor=8,
    patch_size=1,
    max_prompt_tokens=256,
    pipeline_class="KolorsPipeline",
    adaptable=(*UNET_ADAPTABLE, AdaptableModule("Linear", ("encoder_hid_proj",))),
    default_lora_targets=ATTENTION,
    target_groups={"attention": ATTENTION, "feed-forward": FEED_FORWARD},
    keys=KeyTable(
        renamed=original_unet_names(),
        architecture="kolors",
        base_model_version="kolors",
        # KolorsPipeline reads kohya's form under diffusers' names alone.
        own_names=("kohya",),
    ),
    diffsynth=UNET_IN_DIFFSYNTH,
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("kohya",), ("lora",), ("add_embedding.*", "encoder_hid_proj")),
        Reader("diffusers", ("kohya",), ("dora",), instead=NO_LENGTHS),
        Reader(_COMFYUI, ("kohya", "comfyui", "lycoris"), ("lora", "lokr", "loha")),
        Reader(_COMFYUI, ("kohya", "comfyui", "lycoris"), ("dora",), instead=OTHER_DORA),
    ),
    reads_single_files=True,
    block_classes=("BasicTransformerBlock", "ResnetBlock2D"),
    preview_decoder="madebyollin/taesdxl",
    defaults={
        "lora_format": "kohya",  # the form that every program reads
        "aspect_bucket_alignment": 64,
        "validation_guidance": 5.0,
        "validation_num_inference_steps": 50,
        "validation_resolution": "1024x1024",
    },
)
