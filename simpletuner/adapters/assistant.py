"""A frozen LoRA that is on while a distilled model trains, and off where it generates.

Distilled weights (Turbo, schnell) forget how to generate in few steps when they are trained. A LoRA that undoes the
distillation takes that upon itself for as long as it is on; without it the model is distilled as before. It computes
beside the base, in the layers that it was made for: merged into 16-bit weights and subtracted again, a change of 1 % of
a weight leaves a sixth of itself behind. Its tensors are buffers that no state dict has, so no file can hold them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.adapters.layers import device_of, floating_dtype, is_linear
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import DORA, DOWN, UP, AdapterWeights, scale_of
from simpletuner.config.options import TrainConfig
from simpletuner.config.paths import adapter_file_in, adapter_on_hub
from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.models.components import fetch
from simpletuner.storage import file_digest

KEY = "assistant_lora_path"
# The layer's child that adds to its output.
CHILD = "assistant"


@dataclass(frozen=True)
class Assistant:
    """What is attached.

    Args:
        file: it was read from.
        digest: sha256 of the file: another one makes another run.
    """

    file: Path
    digest: str
    strength: float
    num_layers: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a resume compares."""
        return {"sha256": self.digest, "strength": self.strength}

    def __str__(self) -> str:
        return (
            f"{self.file.name} on {self.num_layers} layers, strength {self.strength:g}: on while training and for the "
            "eval loss, off in images, and in no file"
        )


class AssistantLayer(nn.Module):
    """`up (down x)`, which a layer's hook adds to the layer's output.

    Args:
        down: (rank, in).
        up: (out, rank), with scale and strength in it.
    """

    down: Tensor
    up: Tensor

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)
        self.is_on = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))


def find_assistant(config: TrainConfig, fetches: bool = True) -> Path | None:
    """The file that the options name; None where none is wanted.

    Args:
        fetches: from the hub what is not here yet; else that is None too.

    Raises:
        DataError: it cannot be fetched.
    """
    where = config.adapter.assistant_lora_path
    if where is None or not wants_assistant(config):
        return None
    on_hub = None if Path(where).exists() else adapter_on_hub(where)
    if on_hub is None:
        return adapter_file_in(Path(where))
    if fetches:
        return fetch(*on_hub, None, KEY)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(*on_hub)
    return Path(found) if isinstance(found, str) else None


def wants_assistant(config: TrainConfig) -> bool:
    return bool(
        config.adapter.assistant_lora_path
        and config.adapter.assistant_lora_strength
        and config.model.model_type == "lora"
    )


def attach_assistant(denoiser: nn.Module, file: Path, strength: float, spec: FamilySpec) -> Assistant:
    """Let the layers that a file names add its LoRA to their outputs. Before the adapter that trains is attached.

    Args:
        denoiser: of the family, packed or not.

    Raises:
        DataError: the file is no plain LoRA of linear layers, or does not fit this denoiser.
    """
    weights = read_adapter(file, spec, denoiser)
    layers = {path: denoiser.get_submodule(path) for path in weights.modules}
    if problems := _misfits(weights, layers, file):
        raise DataError(problems)
    dtype = floating_dtype(denoiser)
    for path, layer in layers.items():
        module, place = weights.modules[path], device_of(layer)
        up = module[UP].float() * scale_of(module) * weights.multiplier * strength
        layer.add_module(CHILD, AssistantLayer(module[DOWN].to(place, dtype), up.to(place, dtype)))
        layer.register_forward_hook(_add)
    return Assistant(file, file_digest(file), strength, len(layers))


@contextmanager
def without_assistant(denoiser: nn.Module) -> Iterator[None]:
    """Inside the context the denoiser computes without it; nothing changes where there is none."""
    layers = [module for module in denoiser.modules() if isinstance(module, AssistantLayer)]
    try:
        for layer in layers:
            layer.is_on = False
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def _add(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    assistant = layer.get_submodule(CHILD)
    return output + assistant(args[0]) if assistant.is_on else output


def _misfits(weights: AdapterWeights, layers: dict[str, nn.Module], file: Path) -> list[Problem]:
    if not weights.is_plain_lora or any(DORA in module for module in weights.modules.values()):
        message = f"holds {', '.join(weights.algorithms)} ({weights.kind}), and an assistant is a plain LoRA"
        return [Problem(message, key=KEY, file=str(file), fix="convert it: simpletuner export --rank")]
    problems = []
    for path, layer in layers.items():
        sizes = (weights.modules[path][UP].shape[0], weights.modules[path][DOWN].shape[1])
        own = (getattr(layer, "out_features", 0), getattr(layer, "in_features", 0))
        if not is_linear(layer):
            problems.append(Problem(f"changes {path}, which is not a linear layer", key=KEY, file=str(file)))
        elif sizes != own:
            what = f"changes {path} from {sizes[1]} to {sizes[0]} features, which has {own[1]} and {own[0]}"
            fix = "use the model that it was made for"
            problems.append(Problem(what, key=KEY, file=str(file), fix=fix))
    return problems[:1]
