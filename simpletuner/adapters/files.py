"""Adapter files: load one onto a denoiser, and prove that a written one works outside of this program."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.lycoris import KEY, PREFIX, LycorisAdapter, isolated_lycoris, prefer_bypass, register_network
from simpletuner.errors import DataError, Problem
from simpletuner.models.spec import FamilySpec

if TYPE_CHECKING:
    from lycoris.wrapper import LycorisNetwork


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        DataError: no such file, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(Problem("there is no adapter file here", file=str(path)))
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise DataError(Problem(f"is not a readable safetensors file: {error}", file=str(path))) from error


def load_lycoris_file(denoiser: nn.Module, path: Path, spec: FamilySpec, strength: float = 1.0) -> LycorisAdapter:
    """Apply a saved LyCORIS file to a denoiser, to draw with it.

    Args:
        denoiser: without an adapter; gets one as its child.
        strength: multiplies what the file changes, on top of the `multiplier` of its configuration.

    Raises:
        DataError: unreadable, or a tensor has no place in this denoiser.
    """
    tensors, metadata = read_adapter_file(path)
    lycoris = _config_in(metadata, path)
    network = _network_from(tensors, denoiser, strength * _multiplier(lycoris), path)
    if lycoris.get("bypass_mode", True):
        for module in network.loras:
            prefer_bypass(module)
    register_network(denoiser, network, next(tensor.dtype for key, tensor in tensors.items() if "alpha" not in key))
    network.eval().requires_grad_(False)
    return LycorisAdapter(network, lycoris, spec, [MatchCount(path.name, "", len(network.loras))])


def check_saved_adapter(
    path: Path,
    fresh_denoiser: nn.Module,
    run: Callable[[nn.Module], Tensor],
    reference: Tensor,
    tolerance: float = 1e-5,
) -> float:
    """Reload a written file through LyCORIS alone onto a stock denoiser and compare outputs.

    Args:
        fresh_denoiser: the public class with the base weights, without adapter and without this project's changes;
            carries the adapter afterwards.
        run: the forward pass to compare, on the denoiser that it is given.
        reference: its output with the trained adapter.
        tolerance: largest difference allowed, relative to the largest reference value where that is above 1.

    Returns:
        The largest difference.

    Raises:
        DataError: a tensor of the file maps onto nothing, did not survive the reload, or the outputs differ.
    """
    tensors, metadata = read_adapter_file(path)
    network = _network_from(tensors, fresh_denoiser, _multiplier(_config_in(metadata, path)), path)
    _require_same_weights(network, tensors, path)
    network.apply_to()
    network.to(next(fresh_denoiser.parameters()).device)
    with torch.no_grad():
        output = run(fresh_denoiser).float()
    expected = reference.float()
    difference = float((output - expected).abs().max())
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise DataError(
            Problem(
                f"reloaded by LyCORIS, the adapter gives another output: it differs by {difference:.3g}, "
                f"allowed is {allowed:.3g}",
                file=str(path),
            )
        )
    return difference


def unmatched_keys(tensors: dict[str, Tensor], denoiser: nn.Module) -> list[str]:
    """Keys of an adapter file that belong to no module of the denoiser."""
    known = {f"{PREFIX}_{name}".replace(".", "_") for name, _ in denoiser.named_modules()}
    return [key for key in tensors if key.split(".")[0] not in known]


def _network_from(tensors: dict[str, Tensor], denoiser: nn.Module, multiplier: float, path: Path) -> LycorisNetwork:
    """LyCORIS' own loader, which leaves out silently what it cannot place; here that is an error."""
    from lycoris.wrapper import create_lycoris_from_weights

    if unmatched := unmatched_keys(tensors, denoiser):
        raise DataError(
            Problem(
                f"{len(unmatched)} of {len(tensors)} tensors belong to no module of {type(denoiser).__name__}: "
                f"{', '.join(unmatched[:5])}",
                file=str(path),
                fix="use the model that the adapter was trained on",
            )
        )
    with isolated_lycoris():
        network, _ = create_lycoris_from_weights(multiplier, str(path), denoiser, weights_sd=tensors)
    lost = {key.split(".")[0] for key in tensors} - {module.lora_name for module in network.loras}
    if lost:
        raise DataError(
            Problem(f"LyCORIS cannot load {len(lost)} modules: {', '.join(sorted(lost)[:5])}", file=str(path))
        )
    return network


def _require_same_weights(network: LycorisNetwork, tensors: dict[str, Tensor], path: Path) -> None:
    """Every trained tensor of the file is in the reloaded network, unchanged. alpha is a setting, not a weight: for
    full matrices LyCORIS writes one number and reads another, and neither has an effect."""
    loaded = {
        f"{module.lora_name}.{name}": tensor for module in network.loras for name, tensor in module.state_dict().items()
    }
    wrong = [
        key
        for key, tensor in tensors.items()
        if not key.endswith(".alpha") and not (key in loaded and torch.equal(loaded[key], tensor.to(loaded[key])))
    ]
    if wrong:
        raise DataError(Problem(f"{len(wrong)} tensors are lost on reloading: {', '.join(wrong[:5])}", file=str(path)))


def _config_in(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    if KEY not in metadata:
        return {}
    try:
        return json.loads(metadata[KEY])
    except json.JSONDecodeError as error:
        raise DataError(Problem(f"its {KEY} metadata is not JSON: {error}", file=str(path))) from error


def _multiplier(lycoris: dict[str, Any]) -> float:
    return float(lycoris.get("multiplier", 1.0))
