"""What is known of Hunyuan-DiT without loading it.

Sources: the released `Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers` and `-v1.2-Diffusers`; Tencent/HunyuanDiT's training
code; diffusers' `hunyuan_transformer_2d.py` and `pipeline_hunyuandit.py`.
"""

from __future__ import annotations

from simpletuner.families.readers import OTHER_DORA, Reader
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour
from simpletuner.models.hunyuan_dit.keys import HUNYUAN_DIT_IN_DIFFSYNTH, HUNYUAN_DIT_KEYS

_BLOCK = "blocks.*"
_ATTENTION = tuple(f"{_BLOCK}.attn*.to_{name}" for name in ("q", "k", "v", "out.0"))
_FEED_FORWARD = (f"{_BLOCK}.ff.net.0.proj", f"{_BLOCK}.ff.net.2")
_OTHERS = (
    *(f"{_BLOCK}.norm1.linear", f"{_BLOCK}.skip_linear", "text_embedder.linear_*", "norm_out.linear", "proj_out"),
    *(f"time_extra_emb.{name}_embedder.linear_*" for name in ("timestep", "extra")),
)
_TOKENIZER = "tokenizer_config.json"
_PARAMETERS = {"1.1": 1_516_534_048, "1.2": 1_499_952_032}


def _flavour(version: str, words: str, distilled: bool = False) -> Flavour:
    kind = "-distilled" if distilled else ""
    return Flavour(
        version + kind,
        f"Tencent-Hunyuan/HunyuanDiT-v{version}-Diffusers{kind.title()}",
        words,
        "Tencent Hunyuan Community License",
        parameters=_PARAMETERS[version],
        defaults={"validation_num_inference_steps": 25} if distilled else {},
    )


HUNYUAN_DIT = FamilySpec(
    name="hunyuan_dit",
    title="Hunyuan-DiT",
    family_class="simpletuner.models.hunyuan_dit.family:HunyuanDiT",
    flavours={
        "1.2": _flavour("1.2", "Chinese and English captions, around 1024 px"),
        "1.2-distilled": _flavour("1.2", "the same, for fewer sampling steps", distilled=True),
        "1.1": _flavour("1.1", "the release before it, which is also given the sizes of images"),
        "1.1-distilled": _flavour("1.1", "the same, for fewer sampling steps", distilled=True),
    },
    default_flavour="1.2",
    components=(
        Component("transformer", "diffusers.HunyuanDiT2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKL", "vae"),
        # Its states are read and never its pooled vector, whose weights some files lack.
        Component("text_encoder", "transformers.BertModel", "text_encoder", load_options={"add_pooling_layer": False}),
        Component("text_encoder_2", "transformers.T5EncoderModel", "text_encoder"),
        Component("tokenizer", "transformers.BertTokenizer", "tokenizer", _TOKENIZER),
        Component("tokenizer_2", "transformers.T5Tokenizer", "tokenizer", _TOKENIZER, package="sentencepiece"),
        Component("scheduler", "diffusers.DDPMScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="v_prediction",
    latent_channels=4,
    vae_factor=8,
    patch_size=2,
    max_prompt_tokens=256,
    pipeline_class="HunyuanDiTPipeline",
    adaptable=(
        AdaptableModule("Attention", (f"{_BLOCK}.attn1", f"{_BLOCK}.attn2")),
        AdaptableModule("FeedForward", (f"{_BLOCK}.ff",)),
        AdaptableModule("HunyuanDiTBlock", (_BLOCK,)),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_OTHERS)),
    ),
    # It computes with the weights of its layers and never calls them, so an adapter on them would get no gradient.
    unadaptable=("time_extra_emb.pooler.*",),
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=HUNYUAN_DIT_KEYS,
    diffsynth=HUNYUAN_DIT_IN_DIFFSYNTH,
    readers=(
        Reader("PEFT", ("diffusers",), ("lora", "dora")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("lora", "lokr", "loha")),
        Reader("ComfyUI", ("kohya", "comfyui"), ("dora",), instead=OTHER_DORA),
        Reader("kohya_ss-hydit", ("kohya",), ("lora",)),
    ),
    block_classes=("HunyuanDiTBlock",),
    preview_decoder="madebyollin/taesdxl",
    pipeline_options=("guidance_rescale",),
    defaults={
        "aspect_bucket_alignment": 64,
        "validation_guidance": 5.0,
        "validation_num_inference_steps": 50,
        "validation_resolution": "1024x1024",
    },
)
