"""What is known of AuraFlow without loading it.

Sources: the released `fal/AuraFlow-v0.3`; diffusers' `auraflow_transformer_2d.py` and `pipeline_aura_flow.py`.
"""

from __future__ import annotations

from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour

BLOCKS = ("joint_transformer_blocks.*", "single_transformer_blocks.*")

AURAFLOW = FamilySpec(
    name="auraflow",
    title="AuraFlow",
    family_class="tests.families.auraflow.family:AuraFlow",
    flavours={"v0.3": Flavour("v0.3", "fal/AuraFlow-v0.3", "6.8 billion parameters, Pile-T5 text encoder")},
    default_flavour="v0.3",
    components=(
        Component("transformer", "diffusers.AuraFlowTransformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        Component("text_encoder", "transformers.UMT5EncoderModel", "text_encoder"),
        Component("tokenizer", "transformers.AutoTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_size=1536,
    max_prompt_tokens=256,
    prompt_tensors=("prompt_embeds",),
    pipeline_class="AuraFlowPipeline",
    adaptable=(
        AdaptableModule("Attention", tuple(f"{block}.attn" for block in BLOCKS)),
        AdaptableModule("AuraFlowFeedForward", (f"{BLOCKS[0]}.ff", f"{BLOCKS[0]}.ff_context", f"{BLOCKS[1]}.ff")),
        AdaptableModule("Linear", tuple(f"{block}.attn.to_*" for block in BLOCKS)),
    ),
    class_aliases={"FeedForward": "AuraFlowFeedForward"},
    block_classes=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    default_lora_targets=tuple(f"{block}.attn.to_{name}" for block in BLOCKS for name in ("q", "k", "v", "out.0")),
    defaults={"validation_guidance": 3.5, "validation_resolution": "1024x1024"},
)
