"""`--lora_target_modules`: the ends of DiffSynth's names of layers, as patterns of `lora_target`.

PEFT takes every layer whose path ends with one of the names. DiffSynth's models have layers of their own names, some of
which are several of diffusers' in one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

from simpletuner.errors import ConfigError, Problem

_JOINT = {
    "blocks.*.attn.a_to_qkv": tuple(f"transformer_blocks.*.attn.to_{name}" for name in "qkv"),
    "blocks.*.attn.b_to_qkv": tuple(f"transformer_blocks.*.attn.add_{name}_proj" for name in "qkv"),
    "blocks.*.attn.a_to_out": ("transformer_blocks.*.attn.to_out.0",),
    "blocks.*.attn.b_to_out": ("transformer_blocks.*.attn.to_add_out",),
    "blocks.*.ff_a.0": ("transformer_blocks.*.ff.net.0.proj",),
    "blocks.*.ff_a.2": ("transformer_blocks.*.ff.net.2",),
    "blocks.*.ff_b.0": ("transformer_blocks.*.ff_context.net.0.proj",),
    "blocks.*.ff_b.2": ("transformer_blocks.*.ff_context.net.2",),
    "blocks.*.norm1_a.linear": ("transformer_blocks.*.norm1.linear",),
    "blocks.*.norm1_b.linear": ("transformer_blocks.*.norm1_context.linear",),
}
_SINGLE = "single_transformer_blocks.*"
_UNET = "*transformer_blocks.*"  # in `down_blocks`, `mid_block` and `up_blocks`

# Family -> DiffSynth's path -> paths here.
LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd3": _JOINT,
    "flux": {
        **_JOINT,
        "single_blocks.*.to_qkv_mlp": (*(f"{_SINGLE}.attn.to_{name}" for name in "qkv"), f"{_SINGLE}.proj_mlp"),
        "single_blocks.*.proj_out": (f"{_SINGLE}.proj_out",),
        "single_blocks.*.norm.linear": (f"{_SINGLE}.norm.linear",),
        "final_proj_out": ("proj_out",),
        "final_norm_out.linear": ("norm_out.linear",),
    },
    "kolors": {
        **{
            f"blocks.*.transformer_blocks.*.attn{number}.to_{name}": (
                f"{_UNET}.attn{number}.to_{'out.0' if name == 'out' else name}",
            )
            for number in (1, 2)
            for name in ("q", "k", "v", "out")
        },
        "blocks.*.transformer_blocks.*.act_fn.proj": (f"{_UNET}.ff.net.0.proj",),
        "blocks.*.transformer_blocks.*.ff": (f"{_UNET}.ff.net.2",),
    },
    "hunyuan_dit": {
        **{
            f"blocks.*.attn{number}.to_{name}": (f"blocks.*.attn{number}.to_{'out.0' if name == 'out' else name}",)
            for number in (1, 2)
            for name in ("q", "k", "v", "out")
        },
        "blocks.*.modulation.1": ("blocks.*.norm1.linear",),
        "blocks.*.mlp.0": ("blocks.*.ff.net.0.proj",),
        "blocks.*.mlp.2": ("blocks.*.ff.net.2",),
    },
}


def lora_target(names: str, family: str) -> list[str]:
    """The patterns that a list of names with commas stands for, each once.

    Raises:
        ConfigError: a name ends no layer's path.
    """
    layers = LAYERS[family]
    found: dict[str, None] = {}
    problems = []
    for name in [each.strip() for each in names.split(",") if each.strip()] or [""]:
        paths = [path for path in layers if path == name or path.endswith(f".{name}")]
        if not paths or not name:
            allowed = ", ".join(dict.fromkeys(path.rpartition("*.")[2] for path in layers))
            fix = "name some of these, or give lora_target of this program: --lora_target=..."
            problems.append(
                Problem(f'"{name}" ends no layer\'s path', "--lora_target_modules", None, None, allowed, fix)
            )
        found |= dict.fromkeys(pattern for path in paths for pattern in layers[path])
    if problems:
        raise ConfigError(problems)
    return list(found)
