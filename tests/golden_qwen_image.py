"""The golden cases of Qwen-Image (`tests/golden/qwen_image`), as the families of this project are asked for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from simpletuner.batch import Conditioning
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from tests.tiny import GOLDEN

FOLDER = GOLDEN / "qwen_image"


@dataclass(frozen=True)
class Case:
    """One call of the denoiser.

    Args:
        facts: its entry in `cases.json`.
        tensors: its file.
    """

    facts: dict[str, Any]
    tensors: dict[str, Tensor]

    def conditioning(self, prefix: str = "") -> Conditioning:
        """What the family is told; a mask only where there is padding."""
        tensors = {"prompt_embeds": self.tensors[f"{prefix}prompt_embeds"]}
        if self.facts["mask_given"]:
            tensors["prompt_mask"] = self.tensors["prompt_mask"].bool()
        count = len(self.facts["latent_sizes"]) - 1
        rows = [
            [self.tensors[f"reference.{k}"][row] for k in range(count)] for row in range(len(self.tensors["sigma"]))
        ]
        return Conditioning(tensors, rows)


def golden_case(number: int) -> Case:
    return Case(
        json.loads((FOLDER / "cases.json").read_text())[number], load_file(FOLDER / f"case_{number}.safetensors")
    )


def golden_folder(path: Path, pipeline_class: str = "QwenImagePipeline", **config: Any) -> Path:
    """A model folder with the golden denoiser and language model, written into `path`; returns it."""
    for folder, files in {
        "transformer": ({"config.json": FOLDER / "config.json"}, FOLDER / "weights.safetensors"),
        "vae": ({"config.json": FOLDER / "vae_config.json"}, FOLDER / "vae_weights.safetensors"),
        "scheduler": ({"scheduler_config.json": FOLDER / "scheduler_config.json"}, None),
    }.items():
        (path / folder).mkdir(parents=True)
        for name, source in files[0].items():
            settings = json.loads(source.read_text()) | (config if folder == "transformer" else {})
            (path / folder / name).write_text(json.dumps(settings))
        if files[1]:
            (path / folder / "diffusion_pytorch_model.safetensors").symlink_to(files[1])
    for folder in ("text_encoder", "tokenizer", "processor"):
        (path / folder).symlink_to(FOLDER / "vlm" / folder)
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline_class}))
    return path


def golden_family(name: str, path: Path, pipeline_class: str = "QwenImagePipeline", **config: Any) -> ModelFamily:
    """A family on the golden weights, written into `path`."""
    spec, source = get_spec(name), ModelSource(str(golden_folder(path, pipeline_class, **config)))
    return get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """To `tolerance` of the largest expected value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
