"""What is known of Qwen-Image 2.1 without loading it.

Sources: the released Qwen-Image-2.1 and -Turbo; diffusers' `transformer_qwenimage21.py` and `pipeline_qwenimage21.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable
from simpletuner.families.readers import NO_LENGTHS, Reader, usual_readers
from simpletuner.families.spec import AdaptableModule, Component, FamilySpec, Flavour

_BLOCK = "transformer_blocks.*"
_ATTENTION = tuple(f"{_BLOCK}.attn.to_{name}" for name in ("q", "k", "v", "out.0"))
_FEED_FORWARD = tuple(f"{_BLOCK}.img_mlp.{name}" for name in ("proj", "gate_layer", "out"))
_OUTSIDE = ("img_in", "txt_in.*_layer", "modulation.1", "time_text_embed.*", "norm_out.linear", "proj_out")
# Of kohya's form: what diffusers leaves out, and with what it refuses the file.
_GATES, _REFUSED = (_FEED_FORWARD[1],), ("txt_in.*", "modulation.1")
# Sources disagree: Apache-2.0 on one card of converted weights, research alone elsewhere.
_LICENCE = "see its page on the hub"
_PARAMETERS = 7_115_124_736

QWEN_IMAGE_21 = FamilySpec(
    name="qwen_image_21",
    title="Qwen-Image 2.1",
    family_class="simpletuner.models.qwen_image_21.family:QwenImage21",
    flavours={
        "2.1": Flavour("2.1", "Qwen/Qwen-Image-2.1", "generates and edits", _LICENCE, _PARAMETERS, edits=True),
        "2.1-turbo": Flavour(
            *("2.1-turbo", "Qwen/Qwen-Image-2.1-Turbo", "distilled for eight steps", _LICENCE, _PARAMETERS),
            {"validation_num_inference_steps": 8},
        ),
    },
    default_flavour="2.1",
    components=(
        Component("transformer", "simpletuner.models.qwen_image_21.denoiser.QwenImage21Transformer2DModel", "denoiser"),
        Component("vae", "diffusers.AutoencoderKLQwenImage21", "vae"),
        Component("text_encoder", "transformers.Qwen3VLForConditionalGeneration", "text_encoder"),
        Component("processor", "transformers.AutoTokenizer", "tokenizer", "tokenizer_config.json"),
        Component("scheduler", "diffusers.FlowMatchEulerDiscreteScheduler", "scheduler", "scheduler_config.json"),
    ),
    prediction_type="flow",
    latent_channels=64,
    vae_factor=16,
    patch_size=2,  # of sizes: four latents stand for one token of the text; the network takes each by itself
    max_prompt_tokens=4096,
    max_references=10,
    prompts_see_references=True,
    drops_references=False,  # guidance of the public pipeline leads away from a text about the same references
    pipeline_class="QwenImage21Pipeline",
    adaptable=(
        AdaptableModule("QwenImage21Attention", (f"{_BLOCK}.attn",)),
        AdaptableModule("QwenImage21SwiGLUFeedForward", (f"{_BLOCK}.img_mlp",)),
        AdaptableModule("QwenImage21TransformerBlock", (_BLOCK,)),
        AdaptableModule("Linear", (*_ATTENTION, *_FEED_FORWARD, *_OUTSIDE)),
    ),
    class_aliases={"Attention": "QwenImage21Attention", "FeedForward": "QwenImage21SwiGLUFeedForward"},
    default_lora_targets=_ATTENTION,
    target_groups={"attention": _ATTENTION, "feed-forward": _FEED_FORWARD},
    keys=KeyTable(  # otherwise all names are those of diffusers
        fused_in_files={f"{_BLOCK}.img_mlp.gate_up": (f"{_BLOCK}.img_mlp.gate_layer", f"{_BLOCK}.img_mlp.proj")},
        architecture="qwen-image-2.1",
        base_model_version="qwen_image_2.1",
        kohya_network="networks.lora_qwen_image_2_1",
    ),
    readers=(
        Reader("diffusers", ("diffusers",), ("lora", "dora")),
        Reader("diffusers", ("comfyui",), ("lora",)),
        Reader("diffusers", ("comfyui",), ("dora",), instead=NO_LENGTHS),
        Reader("diffusers", ("kohya",), ("lora",), _GATES, refuses=_REFUSED),
        Reader("diffusers", ("kohya",), ("dora",), _GATES, instead=NO_LENGTHS, refuses=_REFUSED),
        *(each for each in usual_readers(left_out_of_kohya=None) if each.program == "ComfyUI"),
    ),
    reads_single_files=True,
    block_classes=("QwenImage21TransformerBlock",),
    defaults={"validation_guidance": 1.0, "validation_num_inference_steps": 40, "validation_resolution": "1024x1024"},
)
