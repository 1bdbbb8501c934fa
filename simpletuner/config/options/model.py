"""What is trained: family, weights, memory."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import REQUIRED, OptionGroup, option
from simpletuner.config.values import Bool, Checkpointing, Int, Interval, Memory, Text, TextOrList

# How prompts are encoded, where a family has a choice (`FamilySpec.prompt_options`).
PROMPT_OPTIONS = ("clip_skip", "force_zeros_for_empty_prompt")


AttentionKernel = Literal["diffusers", "native-flash", "native-efficient", "native-math", "cudnn"]
RefusedAttention = Literal[
    "xformers",
    "flash-attn-2",
    "flash-attn-3",
    "flex",
    "sageattention",
    "metal-flash-attention",
]
_INSTALLED_APART = "its package is not part of this one, and torch has the same algorithm; use native-flash"
REFUSED_ATTENTION = {
    "xformers": "torch has the same algorithm; use native-efficient",
    "flash-attn-2": _INSTALLED_APART,
    "flash-attn-3": "its package is not part of this one; use cudnn, which is near to it on the same cards",
    "flex": "it helps only with sparse attention, which no family has; use native-flash",
    "sageattention": "it rounds queries and keys and has no backward pass; use native-flash",
    "metal-flash-attention": "it has no backward pass; use diffusers",
}


class ModelOptions(OptionGroup):
    """Model"""

    model_family: Text = option(
        REQUIRED,
        takes="one of those that `simpletuner models` lists",
        help="Name of the model family; an unknown name is refused with the list of all.",
        level="basic",
    )
    model_flavour: Text | None = option(
        None,
        help="Which published checkpoint of the family; its weights are used unless "
        "`pretrained_model_name_or_path` names others. Unset: the family's first.",
        level="basic",
    )
    model_type: Literal["lora", "full"] = option(
        "lora",
        help="`lora` trains an adapter next to the frozen model (see `lora_type`), `full` the model itself.",
        level="basic",
    )
    pretrained_model_name_or_path: Text | None = option(
        None, help="Folder in diffusers layout, or hub id (owner/name). Unset: the flavor's hub id.", level="basic"
    )
    pretrained_transformer_model_name_or_path: Text | None = option(
        None,
        help="Single `.safetensors` file with the denoiser, and perhaps more, as ComfyUI and the original releases "
        "keep it; what it holds is taken from it, all else from the model. A whole model in one file may be named by "
        "`pretrained_model_name_or_path`; what it lacks comes from the flavor's hub id. "
        "`pretrained_unet_model_name_or_path` is read too.",
    )
    pretrained_vae_model_name_or_path: Text | None = option(
        None, help="File (`.safetensors`), folder or hub id to take the VAE from instead of the model's own."
    )
    text_encoder_paths: TextOrList | None = option(
        None,
        takes="path, or list of paths",
        help="Text encoders in place of the model's, in the family's order: each a `.safetensors` file, a folder with "
        "`config.json` and weights, or a hub id. An empty text takes the model's, and `none` does without one, where "
        "the family can (the third of Stable Diffusion 3).",
    )
    tokenizer_max_length: Int | None = option(
        None,
        help="Tokens of a caption that reach the model, for families that take several lengths: those of T5 (FLUX.1, "
        "Chroma, Stable Diffusion 3), or for SDXL, Stable Diffusion 1.5 and 2.1 one to four chunks of CLIP (77, 152, "
        "227, 302). Unset: the family's own.",
        unit="tokens",
        ge=1,
    )
    clip_skip: Int = option(
        1,
        help="Which layer of the CLIP encoder is the text, counted from the last, for families that take several: 1 is "
        "the last, 2 the one before it, which most anime models of Stable Diffusion 1.5 want. Programs count alike "
        "but for diffusers, where it is one less.",
        unit="layers",
        ge=1,
        le=12,
    )
    force_zeros_for_empty_prompt: Bool | None = option(
        None,
        help="Of SDXL's kind: what a dropped caption and a missing negative prompt are, zeros (`true`, what SDXL was "
        "trained with) or the encoded empty text (`false`, what most models for drawings were trained with and other "
        "programs generate with). Unset: what the model says of itself.",
    )
    revision: Text | None = option(None, help="Hub revision (branch, tag or commit) of the model.")
    variant: Text | None = option(None, help="Variant of the weight files, for example `fp16`.")
    memory: Memory | None = option(
        None,
        takes="number of GB above 0, or auto",
        help="Memory that the run may take of the device; `auto`: what is free at the start. Options that are not "
        "written are chosen so that it fits, in this order: `activation_memory`, `gradient_checkpointing`, inputs in "
        "main memory, an 8-bit base, swapped blocks; for encoding packed text encoders, a smaller `vae_batch_size`, "
        "tiles. A run that cannot fit is refused at the start.",
        unit="GB",
        level="basic",
    )
    gradient_checkpointing: Checkpointing = option(
        True,
        help="Recompute activations in the backward pass: much less memory for about a quarter more time. The result "
        "is the same.",
        level="basic",
    )
    gradient_checkpointing_interval: Interval | None = option(
        None,
        takes="whole number above 0, or auto",
        help="Checkpoint the first of every n blocks only: less time, more memory. `auto`: only as many blocks as the "
        "measured free memory demands; the first step of each image size measures.",
    )
    gradient_checkpointing_backend: Literal["torch", "unsloth"] = option(
        "torch",
        help="Where the inputs of checkpointed blocks wait: on the device, or in main memory (`unsloth`), which saves "
        "more and costs copies.",
    )
    activation_memory: Literal["high", "low", "lowest"] | None = option(
        None,
        help="What a block keeps for the backward pass. `high`: what torch saves, which is fastest. `low`: what is "
        "cheap to compute is computed again, for a few percent more time. `lowest`: the first product of its MLP too, "
        "which takes less memory and less time than `gradient_checkpointing`. The result is the same. Of compiled "
        "blocks the compiler decides. Unset: `high` on a CPU, which has the memory, and `low` elsewhere; with "
        "`gradient_checkpointing_interval` `auto` it is `lowest` where not all blocks can keep that much.",
    )
    attention_mechanism: AttentionKernel | RefusedAttention = option(
        "diffusers",
        help="Which of torch's attention kernels is tried first; `diffusers` leaves it to torch.",
        planned_values=REFUSED_ATTENTION,
    )
    vae_enable_slicing: Bool = option(
        False, help="Encode and decode the images of a batch one by one, which takes less memory."
    )
    vae_enable_tiling: Bool = option(
        False,
        help="Encode and decode large images in tiles that overlap, which takes less memory. Latents differ a "
        "little, and are cached apart.",
    )
    controlnet: Bool = option(False, help="Train a ControlNet.", planned="ControlNets cannot be trained yet")
    enable_group_offload: Bool = option(
        False,
        help="Keep the frozen weights of all blocks in main memory; they come to the device block by block. "
        "Needs `gradient_checkpointing`.",
    )
    musubi_blocks_to_swap: Int = option(
        0,
        help="Keep the frozen weights of so many blocks in main memory. Needs `gradient_checkpointing`.",
        unit="blocks",
        ge=0,
    )
    ramtorch: Bool = option(
        False, help="Keep weights in main memory.", planned="enable_group_offload does this for all blocks"
    )
    train_text_encoder: Bool = option(
        False, help="Train the text encoder too.", planned="text encoders stay as they are"
    )
