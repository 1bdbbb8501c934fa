"""Standard LoRA and DoRA: PEFT's layers around the linear layers of a frozen denoiser.

PEFT puts the adapter's parameters inside of the layers that they adapt, hence inside of the denoiser's blocks, where
DDP, FSDP and checkpointing find them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from simpletuner.activation_memory.linears import follow_input_dtype
from simpletuner.adapters.base import Adapter, MatchCount, values_replaced
from simpletuner.adapters.formats import Format, modules_in_file, named, peft_metadata
from simpletuner.adapters.lora_init import BASE_STARTS, start_factors
from simpletuner.adapters.metadata import adapter_metadata
from simpletuner.adapters.smoke_test import smoke_test
from simpletuner.adapters.targets import lora_layers
from simpletuner.adapters.weights import ALPHA, DORA, DOWN, UP, AdapterWeights, alpha_tensor, rank_of, scale_of
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.randomness import keyed_seed
from simpletuner.storage import save_tensors

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

TRAINED, START = (
    "default",
    "start",
)  # PEFT's names of the trained adapter and of the frozen one that takes its start away


@dataclass(frozen=True)
class LoraSettings:
    """What `lora_*` and `use_dora` say.

    Args:
        targets: names of the family's target groups, `default`, `all-linear`, or fnmatch patterns of module paths.
        alpha: the change is multiplied with alpha / rank; None is the rank.
        init: how the first weights are made.
        file_format: of the file that training writes.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "default"
    use_dora: bool = False
    targets: Sequence[str] = ("default",)
    file_format: Format = "diffusers"

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / self.rank


class LoraAdapter(Adapter):
    """PEFT's LoRA in a denoiser.

    Args:
        denoiser: with PEFT's layers in it.
        layers: path -> PEFT's layer, in the denoiser's order.
    """

    file_name = "pytorch_lora_weights.safetensors"
    file_is_exact = False  # formats rename, join and scale

    def __init__(
        self,
        denoiser: nn.Module,
        layers: Mapping[str, LoraLayer],
        settings: LoraSettings,
        spec: FamilySpec,
        report: list[MatchCount],
    ):
        super().__init__(report)
        self.denoiser = denoiser
        self.layers = layers
        self.settings = settings
        self.spec = spec

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Names are those of a diffusers file without its prefix: `layers.0.self_attn.to_q.lora_A.weight`."""
        found: dict[str, nn.Parameter] = {}
        for path, layer in self.layers.items():
            found[f"{path}.lora_A.weight"] = _parameter(layer, "lora_A", TRAINED)
            found[f"{path}.lora_B.weight"] = _parameter(layer, "lora_B", TRAINED)
            if self.settings.use_dora:
                found[f"{path}.lora_magnitude_vector"] = _parameter(layer, "lora_magnitude_vector", TRAINED)
        return found

    def all_parameters(self) -> list[nn.Parameter]:
        """With the frozen start of PiSSA and OLoRA."""
        added = ("lora_A", "lora_B", "lora_magnitude_vector")
        return [each for layer in self.layers.values() for name in added for each in getattr(layer, name).parameters()]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Let each layer compute with its base alone.

        Not by PEFT's `enable_adapters`, which also changes which parameters get gradients.
        """
        try:
            for layer in self.layers.values():
                layer._disable_adapters = True
            yield
        finally:
            for layer in self.layers.values():
                layer._disable_adapters = False

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Let the output of each layer be that much of the way from the base's output to its own.

        On the outputs, because a weight-decomposed layer is no sum with a part that could be multiplied.
        """
        modules = [self.denoiser.get_submodule(path) for path in self.layers]
        hooks = [module.register_forward_hook(partial(_on_the_way, strength)) for module in modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def weights(self) -> AdapterWeights:
        """The live weights; a frozen start is part of them, so that they belong on the untouched base."""
        modules = {}
        for path, layer in self.layers.items():
            names = [name for name in (TRAINED, START) if name in layer.lora_A]
            down = torch.cat([_parameter(layer, "lora_A", name).detach() for name in names])
            up = torch.cat([_parameter(layer, "lora_B", name).detach() for name in names], dim=1)
            module = {DOWN: down, UP: up, ALPHA: alpha_tensor(self.settings.scale * down.shape[0])}
            if self.settings.use_dora:
                magnitude = _parameter(layer, "lora_magnitude_vector", TRAINED).detach()
                module[DORA] = magnitude.reshape(-1, *[1] * (up.dim() - 1))
            modules[path] = {name: tensor.to("cpu", copy=True) for name, tensor in module.items()}
        return AdapterWeights(modules)

    def read_by(self) -> str:
        return self.spec.read_by(
            self.settings.file_format, "dora" if self.settings.use_dora else "lora", [*self.layers]
        )

    def save(self, path: Path, extra_metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        """Write the file in the format of the settings, by the family's key table."""
        with torch.no_grad(), values_replaced(self.trainable_parameters(), state):
            weights = self.weights()
        held = modules_in_file(weights, self.spec, self.settings.file_format, self.denoiser)
        metadata = adapter_metadata(AdapterWeights(held), self.spec)
        if self.settings.file_format == "diffusers":
            metadata |= peft_metadata(weights, self.spec)
        save_tensors(path, named(held, self.spec, self.settings.file_format), metadata | dict(extra_metadata))

    def start_from(self, weights: AdapterWeights, file: str) -> list[str]:
        """Begin with the weights of a file; a smaller rank is filled up without changing what it does.

        Returns:
            paths of adapted layers that the file does not contain.

        Raises:
            DataError: the file is no plain LoRA, or adapts layers or has a rank that this adapter has not.
        """
        if problems := self._misfits(weights, file):
            raise DataError(problems)
        parameters = self.trainable_parameters()
        with torch.no_grad():
            for path, module in weights.modules.items():
                rank = rank_of(module)
                up = parameters[f"{path}.lora_B.weight"]
                parameters[f"{path}.lora_A.weight"][:rank] = module[DOWN].to(up)
                up.zero_()[:, :rank] = module[UP].to(up) * (scale_of(module) / self.settings.scale)
                if self.settings.use_dora:
                    magnitude = parameters[f"{path}.lora_magnitude_vector"]
                    magnitude.copy_(module[DORA].reshape(magnitude.shape))
        return [path for path in self.layers if path not in weights.modules]

    def _misfits(self, weights: AdapterWeights, file: str) -> list[Problem]:
        if not weights.is_plain_lora:
            algorithms = ", ".join(weights.algorithms)
            fix = "start from a plain LoRA; `simpletuner export --rank` makes one"
            return [Problem(f"holds {algorithms}, and standard LoRA is trained", key="init_lora", file=file, fix=fix)]
        problems = []
        if strangers := [path for path in weights.modules if path not in self.layers]:
            message = f"adapts {len(strangers)} layers that are not trained here: {', '.join(strangers[:3])}"
            problems.append(Problem(message, key="init_lora", file=file, fix="add them to lora_target"))
        if (rank := max(weights.ranks)) > self.settings.rank:
            message = f"has rank {rank}, and lora_rank is {self.settings.rank}"
            problems.append(Problem(message, key="init_lora", file=file, fix=f"set lora_rank to {rank}"))
        has_dora = {DORA in module for module in weights.modules.values()}
        if has_dora != {self.settings.use_dora}:
            what = "is weight-decomposed (DoRA)" if True in has_dora else "is not weight-decomposed"
            fix = f"set use_dora to {str(True in has_dora).lower()}"
            problems.append(Problem(what, key="init_lora", file=file, fix=fix))
        return problems


def _on_the_way(strength: float, layer: LoraLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    base = layer.base_layer(*inputs)
    return base + strength * (output - base)


def attach_lora(
    denoiser: nn.Module, settings: LoraSettings, spec: FamilySpec, dtype: torch.dtype, seed: int
) -> LoraAdapter:
    """Freeze the denoiser and put a new LoRA into it. Equal seeds give equal weights.

    Args:
        dtype: of the adapter's weights.

    Raises:
        ConfigError: a target adapts nothing, a layer cannot be adapted, or the adapter turns out dead.
    """
    paths, report = lora_layers(denoiser, settings.targets, spec)
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "adapter"))
        _inject(denoiser, paths, settings, TRAINED)
        if settings.init in BASE_STARTS:
            _inject(denoiser, paths, settings, START)
    layers: dict[str, LoraLayer] = {path: denoiser.get_submodule(path) for path in paths}  # type: ignore[misc]
    if settings.init in BASE_STARTS:
        _take_start(layers, settings)
    adapter = LoraAdapter(denoiser, layers, settings, spec, report)
    for layer in layers.values():
        for module in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            module.to(dtype).requires_grad_(False)
        if isinstance(layer.get_base_layer(), nn.Linear):
            _compute_in_input_dtype(layer)
            if settings.use_dora:
                from simpletuner.adapters.dora import use_own_dora  # imports PEFT, which takes seconds

                use_own_dora(layer)
    for parameter in adapter.trainable_parameters().values():
        parameter.requires_grad_(True)
    modules = [(denoiser.get_submodule(path), layer.get_base_layer()) for path, layer in layers.items()]
    smoke_test(((module, base, module) for module, base in modules), "lora_target")
    return adapter


def _parameter(layer: LoraLayer, kind: str, name: str) -> nn.Parameter:
    """`lora_A`, `lora_B` or `lora_magnitude_vector` of one of a layer's adapters."""
    parameter = getattr(layer, kind)[name].weight
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _compute_in_input_dtype(layer: LoraLayer) -> None:
    """Let the factors follow the activations, where PEFT turns wide activations to the factors' dtype and back."""
    layer.cast_input_dtype_enabled = False
    follow_input_dtype((*layer.lora_A.values(), *layer.lora_B.values()))


def _inject(denoiser: nn.Module, paths: Sequence[str], settings: LoraSettings, name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    init = True if settings.init in ("default", *BASE_STARTS) else settings.init
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,  # type: ignore[arg-type]
        lora_dropout=settings.dropout if name == TRAINED else 0.0,
        init_lora_weights=init,  # type: ignore[arg-type]
        use_dora=settings.use_dora,
        # As a pattern of whole paths: in a list PEFT takes the end of a path too.
        target_modules="|".join(re.escape(path) for path in paths),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a second adapter, which is meant
            inject_adapter_in_model(config, denoiser, adapter_name=name)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(Problem(f"PEFT refuses this adapter: {error}", key="lora_type")) from error
    if name == START:
        for path in paths:
            cast("LoraLayer", denoiser.get_submodule(path)).set_adapter([TRAINED, START])


def _take_start(layers: Mapping[str, LoraLayer], settings: LoraSettings) -> None:
    """Give the trained LoRA its part of each weight, and the frozen one the opposite."""
    for path, layer in layers.items():
        weight = cast(Tensor, layer.get_base_layer().weight)
        if weight.is_meta:
            continue
        # A quantized weight is of a class of its own, even where it calls itself floating.
        if weight.dim() != 2 or not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
            message = f"{settings.init} decomposes the weight of {path}, which is packed or no matrix"
            raise ConfigError(Problem(message, key="lora_init_type", fix="use default or gaussian"))
        # A singular value decomposition of a large matrix takes a CPU seconds, hundreds of times.
        place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else weight.device
        down, up = start_factors(weight.to(place), settings.rank, settings.scale, settings.init)
        with torch.no_grad():
            for name, sign in ((TRAINED, 1), (START, -1)):
                _parameter(layer, "lora_A", name).copy_(down)
                _parameter(layer, "lora_B", name).copy_(sign * up)
