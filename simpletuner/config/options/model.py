"""What is trained: family, weights, memory."""

from __future__ import annotations

from typing import Literal

from simpletuner.config.options.declare import REQUIRED, OptionGroup, option
from simpletuner.config.values import Bool, Text

NO_OTHER_FAMILY = "no family that is built uses it"


class ModelOptions(OptionGroup):
    """Model"""

    model_family: Text = option(
        REQUIRED, help="Name of the model family; a wrong one is answered with the list of all.", level="basic"
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
        None, help="Folder in diffusers layout, or hub id (owner/name). Unset: the flavour's hub id.", level="basic"
    )
    pretrained_vae_model_name_or_path: Text | None = option(
        None, help="Folder or hub id to take the VAE from instead of the model's own."
    )
    revision: Text | None = option(None, help="Hub revision (branch, tag or commit) of the model.")
    variant: Text | None = option(None, help="Variant of the weight files, for example `fp16`.")
    gradient_checkpointing: Bool = option(
        True,
        help="Recompute activations in the backward pass: much less memory for about a quarter more time. The result "
        "is the same.",
        level="basic",
    )
    gradient_checkpointing_interval: Text | None = option(
        None, help="Checkpoint every n-th block only.", planned="every block is checkpointed"
    )
    attention_mechanism: Text = option(
        "diffusers",
        help="Which attention kernel the denoiser uses.",
        planned="torch's own choice of attention kernel is used",
        neutral=("diffusers",),
    )
    vae_enable_slicing: Bool = option(
        False, help="Encode and decode the pictures of a batch one by one, which takes less memory."
    )
    vae_enable_tiling: Bool = option(
        False,
        help="Encode and decode large pictures in tiles that overlap, which takes less memory. Latents differ a "
        "little, and are cached apart.",
    )
    controlnet: Bool = option(False, help="Train a ControlNet.", planned="ControlNets cannot be trained yet")
    enable_group_offload: Bool = option(
        False, help="Keep groups of blocks in main memory.", planned="the denoiser stays on its device"
    )
    musubi_blocks_to_swap: Text = option(
        "0", help="Number of blocks kept in main memory.", planned="the denoiser stays on its device", neutral=("0",)
    )
    ramtorch: Bool = option(False, help="Keep weights in main memory.", planned="the denoiser stays on its device")
    train_text_encoder: Bool = option(
        False, help="Train the text encoder too.", planned="text encoders stay as they are"
    )
