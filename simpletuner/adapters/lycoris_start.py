"""A LyCORIS module begins with the weights of a file, for `init_lora`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.adapters.weights import ALPHA, UP, Module, algorithm_of, is_whole_lokr, scale_of
from simpletuner.errors import DataError, Problem

if TYPE_CHECKING:
    from lycoris.modules.base import LycorisBaseModule


def start_module(module: LycorisBaseModule, tensors: Module, path: str, file: str) -> None:
    """Copy a file's tensors into a new module of the same algorithm and size.

    Raises:
        DataError: another algorithm, another size, or another alpha where that cannot be put into the weights.
    """
    values = {name: tensor for name, tensor in tensors.items() if name not in (ALPHA, "on_input")}
    parameters = {name: parameter for name, parameter in module.named_parameters() if name != "scalar"}
    if UP in tensors:
        values[UP] = values[UP] * (scale_of(tensors) / _scale(module))
        values = _in_blocks(module, values)
    if "diff" in tensors:
        names = {"diff": "weight", "diff_b": "bias"}
        values = {names[name]: tensor for name, tensor in values.items()}
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    given = {name: tuple(tensor.shape) for name, tensor in values.items()}
    if wanted != given:
        raise DataError(
            Problem(
                f"{path} is {algorithm_of(tensors)} with {_shapes(given)}; here it has {_shapes(wanted)}",
                key="init_lora",
                file=file,
                fix="use the algorithm, dimensions and factor of the file in lycoris_config.json",
            )
        )
    counts = not {UP, "diff"} & set(tensors) and ALPHA in tensors and not is_whole_lokr(tensors)
    if counts and float(tensors[ALPHA]) != float(module.alpha):
        message = f"{path} has alpha {float(tensors[ALPHA]):g} there and {float(module.alpha):g} here"
        raise DataError(Problem(message, key="init_lora", file=file, fix="set linear_alpha in lycoris_config.json"))
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
    if "scalar" in dict(module.named_parameters()):
        module.scalar.copy_(torch.ones_like(module.scalar))  # files have it multiplied into the weights


def _scale(module: Any) -> float:
    """What the module multiplies `up @ down` with; DyLoRA's own attribute counts blocks instead of ranks."""
    return float(module.alpha) / module.lora_dim if hasattr(module, "up_list") else float(module.scale)


def _in_blocks(module: Any, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA's tensors as DyLoRA keeps them, in blocks of ranks; others as they are."""
    if not hasattr(module, "up_list"):
        return dict(values)
    ups = values[UP].flatten(1).split(module.block_size, dim=1)
    downs = values["lora_down.weight"].flatten(1).split(module.block_size)
    return {f"up_list.{index}": up for index, up in enumerate(ups)} | {
        f"down_list.{index}": down for index, down in enumerate(downs)
    }


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items()))
