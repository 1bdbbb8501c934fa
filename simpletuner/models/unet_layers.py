"""The layers of SDXL's UNet, which other models have too: what adapters attach to, and the names of the original.

The original counts every module that has a resolution of its own: three input blocks for a level (two and a
downsampler), three output blocks. Source: Stability-AI/generative-models
(`sgm/modules/diffusionmodules/openaimodel.py`); diffusers' `convert_original_stable_diffusion_to_diffusers.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from simpletuner.families.spec import AdaptableModule

# fnmatch's star crosses dots, so `*attentions.*` is every transformer on the way down, in the middle and on the way up.
BLOCK = "*attentions.*.transformer_blocks.*"
ATTENTION = tuple(f"{BLOCK}.attn*.to_{name}" for name in ("q", "k", "v", "out.0"))
FEED_FORWARD = (f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2")

UNET_ADAPTABLE = (
    AdaptableModule("Attention", (f"{BLOCK}.attn1", f"{BLOCK}.attn2")),
    AdaptableModule("FeedForward", (f"{BLOCK}.ff",)),
    AdaptableModule("BasicTransformerBlock", (BLOCK,)),
    AdaptableModule("Transformer2DModel", ("*attentions.*",)),
    AdaptableModule("ResnetBlock2D", ("*resnets.*",)),
    AdaptableModule("Downsample2D", ("down_blocks.*.downsamplers.*",)),
    AdaptableModule("Upsample2D", ("up_blocks.*.upsamplers.*",)),
    AdaptableModule("TimestepEmbedding", ("time_embedding", "add_embedding")),
    AdaptableModule("LayerNorm", (f"{BLOCK}.norm*",)),
    AdaptableModule("GroupNorm", ("*attentions.*.norm", "*resnets.*.norm1", "*resnets.*.norm2", "conv_norm_out")),
    AdaptableModule(
        "Conv2d",
        (
            *("conv_in", "conv_out", "*resnets.*.conv1", "*resnets.*.conv2", "*resnets.*.conv_shortcut"),
            *("down_blocks.*.downsamplers.*.conv", "up_blocks.*.upsamplers.*.conv"),
        ),
    ),
    AdaptableModule(
        "Linear",
        (
            *ATTENTION,
            *FEED_FORWARD,
            *("*attentions.*.proj_in", "*attentions.*.proj_out", "*resnets.*.time_emb_proj"),
            *("time_embedding.linear_*", "add_embedding.linear_*"),
        ),
    ),
)

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _blocks(attention: Sequence[bool]) -> dict[str, str]:
    """Path of a residual network, transformer or change of size in the denoiser -> its path in the original."""
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    last = len(attention) - 1
    for level, has_attention in enumerate(attention):
        for place in range(2):
            blocks[f"down_blocks.{level}.resnets.{place}"] = f"input_blocks.{3 * level + place + 1}.0"
            if has_attention:
                blocks[f"down_blocks.{level}.attentions.{place}"] = f"input_blocks.{3 * level + place + 1}.1"
        if level < last:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{3 * level + 3}.0.op"
    for level, has_attention in enumerate(reversed(attention)):
        for place in range(3):
            blocks[f"up_blocks.{level}.resnets.{place}"] = f"output_blocks.{3 * level + place}.0"
            if has_attention:
                blocks[f"up_blocks.{level}.attentions.{place}"] = f"output_blocks.{3 * level + place}.1"
        if level < last:
            place_after = 2 if has_attention else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{3 * level + 2}.{place_after}.conv"
    return blocks


def original_unet_names(attention: Sequence[bool] = (False, True, True)) -> dict[str, str]:
    """Path in the denoiser -> path in the original layout; see `KeyTable.renamed`.

    Args:
        attention: for each level on the way down, whether it has transformers; SDXL's.
    """
    blocks = _blocks(attention)
    inner = {
        f"{path}.{part}": f"{name}.{other}"
        for path, name in blocks.items()
        if ".resnets." in path
        for part, other in _RESNET.items()
    }
    return {
        **blocks,
        **inner,
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
