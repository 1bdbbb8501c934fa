"""Adapter files of OmniGen2 under the names that ComfyUI looks for: those of the released weights, in three forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from simpletuner.adapters.formats import encode
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.reading import read_adapter
from simpletuner.families.readers import FORMS, readers_of
from simpletuner.families.registry import get_spec
from tests.tiny_omnigen2 import tiny_omnigen2_transformer

GOLDEN = Path(__file__).parents[3] / "golden" / "omnigen2" / "weights.safetensors"
LOKR = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 2, "preset": "attn-mlp"}


def names_in_comfyui() -> set[str]:
    """ComfyUI's key map of a model without rules of its own (`comfy/lora.py`): bare, by its prefix, and as kohya's."""
    with safe_open(GOLDEN, framework="pt") as file:
        layers = {name.removesuffix(".weight") for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
    return (
        layers | {f"diffusion_model.{name}" for name in layers} | {f"lora_unet_{n.replace('.', '_')}" for n in layers}
    )


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_files_for_comfyui_have_names_of_the_release_and_no_other_form_has(kind: str, tmp_path: Path) -> None:
    spec, denoiser, known = get_spec("omnigen2"), tiny_omnigen2_transformer(), names_in_comfyui()
    if kind == "lora":
        attached = attach_lora(denoiser, LoraSettings(rank=2, alpha=2, targets=("all-linear",)), spec, torch.float32, 0)
    else:
        attached = attach_lycoris(denoiser, LOKR, spec, torch.float32, seed=0)
    attached.save(tmp_path / "file.safetensors", {})
    weights = read_adapter(tmp_path / "file.safetensors", spec, tiny_omnigen2_transformer())
    for form in FORMS if kind == "lora" else ("kohya", "comfyui", "lycoris"):
        tensors = encode(weights, spec, form, tiny_omnigen2_transformer())
        parts = (".lora_", ".lokr_", ".alpha", ".dora_scale")
        modules = {key[: min(key.find(part) for part in parts if part in key)] for key in tensors}
        readers = {reader.program for reader in readers_of(spec.readers, form, weights.kind)}
        assert len(modules) == len(weights.modules)
        assert (modules <= known, not modules & known) == (
            form in ("kohya", "comfyui"),
            form in ("diffusers", "lycoris"),
        )
        assert ("ComfyUI" in readers) == (form in ("kohya", "comfyui"))
