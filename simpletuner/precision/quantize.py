"""Puts packed layers into a model in place of its linear ones: layer by layer, so that no second copy is ever whole."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError, Problem
from simpletuner.precision.formats import WeightFormat
from simpletuner.precision.linear import QuantizedLinear, exact_activations
from simpletuner.precision.products import FAILURES

NO_CHANGE = "no_change"


@dataclass(frozen=True)
class NumberFormats:
    """How frozen weights are stored.

    Args:
        base: `base_model_precision`.
        quantizes_activations: of the base too, so that its products are made in 8 bits.
        packs_on_device: layers are packed where they will work, one at a time; else in main memory.
        encoders: `text_encoder_N_precision`, in the order of the family's text encoders.
        offloads_encoders: `text_encoder_offload`: their layers wait in main memory, and are packed there.
    """

    base: str = NO_CHANGE
    quantizes_activations: bool = False
    packs_on_device: bool = True
    encoders: tuple[str, ...] = ()
    offloads_encoders: bool = False

    def of_encoder(self, index: int) -> str:
        return self.encoders[index] if index < len(self.encoders) else NO_CHANGE


def quantizable(
    module: nn.Module, weight_format: WeightFormat, block_classes: Sequence[str] = (), kept: Sequence[str] = ()
) -> Iterator[tuple[str, nn.Linear]]:
    """Paths and layers that a format takes: linear layers inside of the repeated blocks, where nearly all weights are.

    What stands before, between and behind the blocks (embeddings, time, the final projection) is small, and errors
    there go into everything.

    Args:
        block_classes: class names of the repeated blocks; without any, the whole module counts.
        kept: fnmatch patterns of paths that stay as they are.
    """
    blocks = [name for name, child in module.named_modules() if type(child).__name__ in block_classes]
    for name, layer in module.named_modules():
        if type(layer) is not nn.Linear or any(fnmatch.fnmatch(name, pattern) for pattern in kept):
            continue
        is_inside = not block_classes or any(name.startswith(f"{block}.") for block in blocks)
        if is_inside and weight_format.fits(layer.out_features, layer.in_features):
            yield name, layer


def quantize(
    module: nn.Module,
    precision: str,
    *,
    block_classes: Sequence[str] = (),
    kept: Sequence[str] = (),
    device: torch.device | None = None,
    quantizes_activations: bool = False,
) -> nn.Module:
    """Pack the linear layers of a frozen module; returns it. Before an adapter is attached, never after.

    Args:
        precision: a value of `base_model_precision`.
        device: where layers are packed, and stay; None: where they are.
        quantizes_activations: see `QuantizedLinear`.

    Raises:
        ConfigError: no such format, or nothing in the module can be packed.
    """
    if precision == NO_CHANGE:
        return module
    weight_format = get_format(precision)
    found = list(quantizable(module, weight_format, block_classes, kept))
    if not found:
        message = f"{precision} finds no layer of {type(module).__name__} that it can pack"
        raise ConfigError(Problem(message, key="base_model_precision", fix="use another format, or no_change"))
    for name, layer in found:
        parent, _, child = name.rpartition(".")
        packed = QuantizedLinear(layer.to(device), weight_format, name, quantizes_activations)
        setattr(module.get_submodule(parent), child, packed)
    return module


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The packed layers by the paths that they had in the plain model."""
    return {layer.path: layer for layer in module.modules() if isinstance(layer, QuantizedLinear)}


def copy_unpacked(quantized: nn.Module, plain: nn.Module) -> None:
    """Give a plain copy of a model the weights that a quantized one computes with."""
    for name, layer in quantized_layers(quantized).items():
        own: Tensor = plain.get_submodule(name).weight  # type: ignore[assignment]
        own.data.copy_(layer.unpacked(own.dtype))


def saved_bytes(module: nn.Module, precision: str, block_classes: Sequence[str] = (), kept: Sequence[str] = ()) -> int:
    """What packing a module of any device, `meta` too, would save."""
    if precision == NO_CHANGE:
        return 0
    weight_format = get_format(precision)
    return sum(
        layer.weight.numel() * layer.weight.element_size()
        - weight_format.num_bytes(layer.out_features, layer.in_features, layer.weight.element_size())
        for _, layer in quantizable(module, weight_format, block_classes, kept)
    )


def quantizes_activations(formats: NumberFormats) -> bool:
    """Whether the base's products are made in 8 bits: an option says so, or the format's name."""
    return formats.quantizes_activations or (
        formats.base != NO_CHANGE and get_format(formats.base).quantizes_activations
    )


def require_device(formats: NumberFormats, device: torch.device, dtype: torch.dtype) -> None:
    """Pack, compute and differentiate a small layer on a device, before a large one is loaded for it.

    Raises:
        ConfigError: the device or its libraries cannot do this, or not in 8 bits where that was asked for.
    """
    if formats.base == NO_CHANGE:
        return
    fix = "use int8-quanto or int8-torchao, which need nothing but torch"
    _require_step(formats.base, False, device, dtype, "", "base_model_precision", fix)
    if quantizes_activations(formats):
        fix = "use int8-torchao, with quantize_activations where its products work"
        key = "quantize_activations" if formats.quantizes_activations else "base_model_precision"
        _require_step(formats.base, True, device, dtype, " with quantized activations", key, fix)


def _require_step(
    precision: str, in_8_bits: bool, device: torch.device, dtype: torch.dtype, what: str, key: str, fix: str
) -> None:
    try:
        layer = QuantizedLinear(nn.Linear(128, 64).to(device, dtype), get_format(precision), "", in_8_bits)
        x = torch.ones(2, 128, device=device, dtype=dtype, requires_grad=True)
        with nullcontext() if in_8_bits else exact_activations(layer):
            layer(x).sum().backward()
    except FAILURES as error:
        message = f"{precision}{what} does not work on {device} here: {error}"
        raise ConfigError(Problem(message, key=key, fix=fix)) from error


def get_format(name: str) -> WeightFormat:
    """The format of a value of `base_model_precision`; imports its library.

    Raises:
        ConfigError: no such format.
    """
    scheme, _, library = name.partition("-")
    if library == "quanto":
        from simpletuner.precision.quanto import FORMATS
    elif library == "torchao":
        from simpletuner.precision.torchao import FORMATS
    elif library == "bnb":
        from simpletuner.precision.bnb import FORMATS
    else:
        FORMATS = {}
    if scheme not in FORMATS:
        raise ConfigError(Problem(f'"{name}" is not a number format', key="base_model_precision"))
    return FORMATS[scheme]()
