"""SDXL's modules by the names of the original release (`sgm/modules/diffusionmodules/openaimodel.py`).

The original counts every module that has a resolution of its own: three input blocks for a level (two and a
downsampler), three output blocks. Source: Stability-AI/generative-models; diffusers'
`convert_original_stable_diffusion_to_diffusers.py`.
"""

from __future__ import annotations

from simpletuner.families.keys import KeyTable

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _blocks() -> dict[str, str]:
    """Path of a residual network or transformer in the denoiser -> its path in the original."""
    blocks = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for level in range(3):
        for place in range(2):
            blocks[f"down_blocks.{level}.resnets.{place}"] = f"input_blocks.{3 * level + place + 1}.0"
            if level > 0:
                blocks[f"down_blocks.{level}.attentions.{place}"] = f"input_blocks.{3 * level + place + 1}.1"
        for place in range(3):
            blocks[f"up_blocks.{level}.resnets.{place}"] = f"output_blocks.{3 * level + place}.0"
            if level < 2:
                blocks[f"up_blocks.{level}.attentions.{place}"] = f"output_blocks.{3 * level + place}.1"
    return blocks


def _renamed() -> dict[str, str]:
    blocks = _blocks()
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
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }


SDXL_KEYS = KeyTable(
    renamed=_renamed(),
    architecture="stable-diffusion-xl-v1-base",
    base_model_version="sdxl_base_v1-0",
)
