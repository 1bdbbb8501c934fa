"""LyCORIS' named presets (`"preset": "attn-mlp"`), said in a family's own layers.

LyCORIS' lists name the classes of the models that it was written for; in another model they match nothing, or by
chance something else. What the names mean is clear, and the family says which of its layers are that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simpletuner.families.spec import FamilySpec

PRESETS = ("full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only")
UNUSABLE_PRESETS = {
    "ia3": "it names layers of Stable Diffusion; list this model's keys, values and feed-forward outputs in "
    "apply_preset.name_algo_map, the last with train_on_input",
}
_GROUPS = {"attn-only": ("attention",), "attn-mlp": ("attention", "feed-forward")}
_CONV_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")


def with_preset_applied(lycoris: Mapping[str, Any], spec: FamilySpec) -> Mapping[str, Any]:
    """The configuration with `apply_preset` in place of a preset's name; unchanged where it names none.

    Raises:
        ValueError: unknown, or the family has no such layers; the text says which names it has.
    """
    name = lycoris.get("preset")
    if name is None:
        return lycoris
    rest = {key: value for key, value in lycoris.items() if key != "preset"}
    targets = preset_targets(str(name), spec)
    return rest | {"apply_preset": targets} if targets else rest


def usable_presets(spec: FamilySpec) -> list[str]:
    """Names of the presets that have layers in a family."""
    return [name for name in PRESETS if _targets(name, spec) is not None]


def preset_targets(name: str, spec: FamilySpec) -> Mapping[str, Any]:
    """The `apply_preset` that a name stands for; empty where every layer is meant."""
    if name in UNUSABLE_PRESETS:
        raise ValueError(UNUSABLE_PRESETS[name])
    targets = _targets(name, spec) if name in PRESETS else None
    if targets is None:
        raise ValueError("this model has no such layers" if name in PRESETS else "there is no preset of this name")
    return targets


def _targets(name: str, spec: FamilySpec) -> Mapping[str, Any] | None:
    """None where the family has none of these layers."""
    if name in ("full", "unet-only"):
        return {}
    if name == "full-lin":
        return {"target_module": ["Linear"], "enable_conv": False}
    if name in _GROUPS:
        if not all(group in spec.target_groups for group in _GROUPS[name]):
            return None
        patterns = [pattern for group in _GROUPS[name] for pattern in spec.target_groups[group]]
        return {"target_name": patterns, "use_fnmatch": True}
    if name == "unet-transformer-only":
        return {"target_module": list(spec.block_classes), "enable_conv": False} if spec.block_classes else None
    present = [each.class_name for each in spec.adaptable if each.class_name in _CONV_BLOCKS]
    return {"target_module": present} if present else None
