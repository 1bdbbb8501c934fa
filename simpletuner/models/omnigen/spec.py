"""What is known of OmniGen without loading it.

Sources: arXiv 2409.11340; the released `Shitao/OmniGen-v1-diffusers`; diffusers' `transformer_omnigen.py`.
"""

from __future__ import annotations

from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.omnigen.keys import OMNIGEN_KEYS, OMNIGEN_READERS

_OWN_TIMES = "OmniGen is trained on logit-normal times with mean 0 and deviation 1, without a shift"

_ATTENTION = tuple(f"layers.*.self_attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))

OMNIGEN = FamilySpec(
    name="omnigen",
    title="OmniGen",
    family_class="simpletuner.models.omnigen.family:OmniGen",
    flavours={
        "v1": Flavour(
            name="v1",
            hub_id="Shitao/OmniGen-v1-diffusers",
            description="3.8 billion parameters, Phi-3 token layout, SDXL VAE, up to 1024 px",
            licence="MIT",
            parameters=3_762_072_592,
            edits=True,
        )
    },
    default_flavour="v1",
    components=(
        Component(
            "transformer", "diffusers.models.transformers.transformer_omnigen.OmniGenTransformer2DModel", "denoiser"
        ),
        Component("vae", "diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL", "vae"),
        Component("tokenizer", "transformers.AutoTokenizer", "tokenizer", config_file="tokenizer_config.json"),
        Component(
            "scheduler",
            "diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteScheduler",
            "scheduler",
            config_file="scheduler_config.json",
        ),
    ),
    prediction_type="flow",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_size=3072,
    max_prompt_tokens=1024,
    # The original takes the input images of a dropped instruction away too (OmniGen/train_helper/data.py).
    max_references=3,
    drops_references=True,
    caches_prompt_embeds=False,
    # The original was trained with this string in place of a dropped instruction (OmniGen/train_helper/data.py).
    dropped_caption="<cfg>",
    pipeline_class="OmniGenPipeline",
    adaptable=(
        AdaptableModule("Attention", ("layers.*.self_attn",)),
        AdaptableModule("OmniGenFeedForward", ("layers.*.mlp",)),
        AdaptableModule("OmniGenBlock", ("layers.*",)),
        AdaptableModule("TimestepEmbedding", ("time_token", "t_embedder")),
        AdaptableModule("AdaLayerNorm", ("norm_out",)),
        AdaptableModule("OmniGenPatchEmbed", ("patch_embedding",)),
        AdaptableModule("Conv2d", ("patch_embedding.input_image_proj", "patch_embedding.output_image_proj")),
        AdaptableModule(
            "Linear",
            (
                "layers.*.self_attn.to_q",
                "layers.*.self_attn.to_k",
                "layers.*.self_attn.to_v",
                "layers.*.self_attn.to_out.0",
                "layers.*.mlp.gate_up_proj",
                "layers.*.mlp.down_proj",
                "time_token.linear_*",
                "t_embedder.linear_*",
                "norm_out.linear",
                "proj_out",
            ),
        ),
    ),
    class_aliases={"FeedForward": "OmniGenFeedForward"},
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": ("layers.*.mlp.gate_up_proj", "layers.*.mlp.down_proj")},
    keys=OMNIGEN_KEYS,
    readers=OMNIGEN_READERS,
    block_classes=("OmniGenBlock",),
    preview_decoder="madebyollin/taesdxl",
    pipeline_options=("img_guidance_scale",),
    defaults={
        "validation_guidance": 2.5,
        "validation_num_inference_steps": 30,
        "validation_resolution": "1024x1024",
    },
    ignored_options={
        "flow_schedule_shift": _OWN_TIMES,
        "flow_schedule_auto_shift": _OWN_TIMES,
        "flow_schedule_auto_shift_curve": _OWN_TIMES,
    },
    unusable_options={
        "reference_dropout_probability": (
            (None, 1, 1.0),
            "OmniGen reads references through its caption, so that a dropped one has none",
        ),
        "flow_sigmoid_scale": ((None, 1, 1.0), _OWN_TIMES),
        "flow_logit_mean": ((None, 0, 0.0), _OWN_TIMES),
        "flow_schedule_terminal": ((None, 0, 0.0), _OWN_TIMES),
        "flow_use_uniform_schedule": ((None, False), _OWN_TIMES),
        "flow_use_beta_schedule": ((None, False), _OWN_TIMES),
        "flow_use_mode_schedule": ((None, False), _OWN_TIMES),
        "flow_custom_timesteps": ((None, ""), _OWN_TIMES),
        "validation_noise_scheduler": (
            (None, ""),
            "OmniGen counts time from noise to data, and only its own scheduler (invert_sigmas) does the same",
        ),
    },
)
