"""What each of DiffSynth-Studio's scripts trains: family, flags of its weights, names of its layers, its images.

Source: modelscope/DiffSynth-Studio (Apache-2.0), `examples/train`, and the models in `diffsynth/models`, which the
layers' names are from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_ATTENTION = ("to_q", "to_k", "to_v", "to_out")
_SD3_NEGATIVE = (
    "bad quality, poor quality, doll, disfigured, jpg, toy, bad anatomy, missing limbs, missing fingers, 3d, cgi, "
    "extra tails"
)


@dataclass(frozen=True)
class Script:
    """One training script.

    Args:
        name: as the command calls it.
        family: of this program.
        flavor: whose hub id has the tokenizers and configurations that the original files lack.
        paths: flag of each file or folder of weights -> help.
        safetensors: the repository that has these weights in diffusers' layout, without pickles.
        targets: of `--lora_target_modules`.
        config: further options: its noise levels, the length of its captions, and how its images are generated.
    """

    name: str
    family: str
    paths: Mapping[str, str]
    safetensors: str
    targets: tuple[str, ...]
    flavour: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


def _images(steps: int, guidance: float, negative: str = "") -> dict[str, Any]:
    return {
        "validation_seed": 0,
        "validation_num_inference_steps": steps,
        "validation_guidance": guidance,
        "validation_negative_prompt": negative,
    }


# Noise levels equally often, then moved by 3: sigmas from 1 to 0.003 / 1.002.
_FLOW = {"flow_use_uniform_schedule": True, "flow_schedule_shift": 3.0}
SCRIPTS: Mapping[str, Script] = {
    script.name: script
    for script in (
        Script(
            "flux",
            "flux",
            {
                "pretrained_text_encoder_path": "CLIP: text_encoder/model.safetensors.",
                "pretrained_text_encoder_2_path": "T5: text_encoder_2, a folder or a file.",
                "pretrained_dit_path": "The transformer: flux1-dev.safetensors.",
                "pretrained_vae_path": "The VAE: ae.safetensors.",
            },
            "black-forest-labs/FLUX.1-dev",
            (
                *("a_to_qkv", "b_to_qkv", "ff_a.0", "ff_a.2", "ff_b.0", "ff_b.2", "a_to_out", "b_to_out"),
                *("proj_out", "norm.linear", "norm1_a.linear", "norm1_b.linear", "to_qkv_mlp"),
            ),
            config={**_FLOW, **_images(30, 3.5)},
        ),
        Script(
            "kolors",
            "kolors",
            {
                "pretrained_unet_path": "unet/diffusion_pytorch_model.safetensors.",
                "pretrained_text_encoder_path": "ChatGLM3: text_encoder, a folder with safetensors.",
                "pretrained_fp16_vae_path": "A VAE that fits float16: sdxl-vae-fp16-fix.",
            },
            "Kwai-Kolors/Kolors-diffusers",
            _ATTENTION,
            config=_images(100, 7.5),
        ),
        Script(
            "sd3",
            "sd3",
            {"pretrained_path": "One file (T5 may be missing), several with commas, a diffusers folder or a hub id."},
            "stabilityai/stable-diffusion-3-medium-diffusers",
            ("a_to_qkv", "b_to_qkv"),
            flavour="3-medium",
            config={**_FLOW, "tokenizer_max_length": 77, **_images(100, 7.5, _SD3_NEGATIVE)},
        ),
        Script(
            "hunyuan-dit",
            "hunyuan_dit",
            {"pretrained_path": "A diffusers folder or a hub id."},
            "Tencent-Hunyuan/HunyuanDiT-v1.1-Diffusers or Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers",
            _ATTENTION,
            config=_images(100, 7.5),
        ),
    )
}
