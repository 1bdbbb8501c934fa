"""LyCORIS adapters: attach one to a frozen denoiser as `lycoris_config.json` says, train it, switch it off, save it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.base import ADAPTER_CHILD, Adapter, MatchCount, values_replaced
from simpletuner.adapters.formats import LYCORIS_PREFIX, with_multiplier_in_weights
from simpletuner.adapters.layers import device_of, layer_class
from simpletuner.adapters.lokr import is_structured
from simpletuner.adapters.lokr_kernels import choose_kernels, fused_kernels
from simpletuner.adapters.lycoris_modules import is_usable_norm, merges, prepare_module, unloadable
from simpletuner.adapters.lycoris_start import start_module
from simpletuner.adapters.metadata import adapter_metadata
from simpletuner.adapters.reading import LYCORIS_CONFIG, split_key
from simpletuner.adapters.smoke_test import smoke_test
from simpletuner.adapters.targets import LycorisTargets, count_matches, require_matches, resolve_targets
from simpletuner.adapters.weights import AdapterWeights, scaled
from simpletuner.config.json_reader import Document
from simpletuner.config.lycoris import check_lycoris
from simpletuner.config.lycoris_algorithms import DEFAULT_ALGORITHM
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.randomness import keyed_seed
from simpletuner.storage import save_tensors

if TYPE_CHECKING:
    from lycoris.wrapper import LycorisNetwork


class LycorisAdapter(Adapter):
    """A LyCORIS network that is applied to a denoiser.

    Args:
        network: applied, and a registered child of the denoiser.
        lycoris: the configuration as the user wrote it; goes into the file's metadata.
        spec: the family, for the metadata.
        report: adapted layers per entry.
        paths: LyCORIS' name of a layer -> its path in the denoiser.
    """

    file_name = "pytorch_lora_weights.safetensors"

    def __init__(
        self,
        network: LycorisNetwork,
        lycoris: Mapping[str, Any],
        spec: FamilySpec,
        report: list[MatchCount],
        paths: Mapping[str, str] | None = None,
    ):
        super().__init__(report)
        self.network = network
        self.lycoris = lycoris
        self.spec = spec
        self.paths = paths or {}
        # These files hold a difference, whole ranks, or weights that a scalar or the multiplier is multiplied into.
        self.file_is_exact = (
            set(self.trainable_parameters()) <= set(network.state_dict())
            and not lycoris.get("use_scalar")
            and self.multiplier == 1
        )

    @property
    def multiplier(self) -> float:
        """Of the whole change, in training; files have it in their weights."""
        return float(self.lycoris.get("multiplier", 1.0))

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Names are those of the network: `lycoris_layers_0_self_attn_to_q.lokr_w1`."""
        return dict(self.network.named_parameters())

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Put the layers' own `forward` back for a while, so that nothing is added, not even zeros."""
        layers = [module.org_module[0] for module in self.network.loras]
        adapted = [layer.forward for layer in layers]
        try:
            for layer in layers:
                layer.forward = layer._lycoris_original_forward
            yield
        finally:
            for layer, forward in zip(layers, adapted, strict=True):
                layer.forward = forward

    @contextmanager
    def scaled(self, strength: float) -> Iterator[None]:
        """Every module of the network has a multiplier of its own."""
        multipliers = [module.multiplier for module in self.network.loras]
        try:
            for module, multiplier in zip(self.network.loras, multipliers, strict=True):
                module.multiplier = multiplier * strength
            yield
        finally:
            for module, multiplier in zip(self.network.loras, multipliers, strict=True):
                module.multiplier = multiplier

    def choose_kernels(self, device: torch.device, dtype: torch.dtype, known: Mapping[str, bool]) -> list[str]:
        from lycoris.modules.lokr import LokrModule

        modules = [m for m in self.network.loras if isinstance(m, LokrModule) and is_structured(m)]
        try:
            kernels = fused_kernels(device)
        except Exception as failure:  # noqa: BLE001 - imports of a compiler, which may be broken in any way
            return [f"LoKr: two products, since LyCORIS' kernels cannot be loaded: {failure}"]
        if kernels is None:
            wanted = any(known.values())
            return ["LoKr: two products; this run had LyCORIS' kernels before, so the last bits differ"] * wanted
        trials = choose_kernels(modules, kernels, device, dtype, known)
        self.kernel_choice = {trial.name: trial.is_won for trial in trials}
        return [str(trial) for trial in trials]

    def start_from(self, weights: AdapterWeights, file: str) -> list[str]:
        """Begin with the weights of a file of the same algorithm; see `Adapter.start_from`."""
        modules = {self.paths[module.lora_name]: module for module in self.network.loras}
        strangers = [path for path in weights.modules if path not in modules]
        if strangers:
            message = f"adapts {len(strangers)} layers that are not trained here: {', '.join(strangers[:3])}"
            fix = "name them in apply_preset"
            raise DataError(Problem(message, key="init_lora", file=file, fix=fix))
        with torch.no_grad():
            for path, tensors in weights.modules.items():
                start = scaled(tensors, weights.multiplier / self.multiplier)
                if start is None:
                    message = f"{path} was trained with the multiplier {weights.multiplier:g}"
                    fix = "set multiplier in lycoris_config.json"
                    raise DataError(Problem(message, key="init_lora", file=file, fix=fix))
                start_module(modules[path], start, path, file)
        return [path for path in modules if path not in weights.modules]

    def read_by(self) -> str:
        kind = self._weights(self.network.state_dict()).kind
        return self.spec.read_by("lycoris", kind, [self.paths[module.lora_name] for module in self.network.loras])

    def _weights(self, tensors: Mapping[str, Tensor]) -> AdapterWeights:
        """By LyCORIS' names of the layers."""
        modules: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, tensor_name = split_key(key)
            modules.setdefault(name, {})[tensor_name] = tensor
        return AdapterWeights(modules, lycoris=self.lycoris)

    def save(self, path: Path, extra_metadata: Mapping[str, str], state: Mapping[str, Tensor] | None = None) -> None:
        """Write the file that LyCORIS itself would write, plus metadata: its configuration and the ModelSpec header."""
        with torch.no_grad(), values_replaced(self.trainable_parameters(), state):
            tensors = {
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in self.network.state_dict().items()
            }
        weights = self._weights(tensors)
        if self.multiplier != 1:
            weights = with_multiplier_in_weights(weights)
            tensors = {f"{name}.{key}": t for name, module in weights.modules.items() for key, t in module.items()}
        metadata = adapter_metadata(weights, self.spec)
        metadata |= {LYCORIS_CONFIG: json.dumps(weights.lycoris)} | dict(extra_metadata)
        save_tensors(path, tensors, metadata)


def attach_lycoris(
    denoiser: nn.Module,
    lycoris: Mapping[str, Any],
    spec: FamilySpec,
    dtype: torch.dtype,
    seed: int,
    file: str | None = None,
) -> LycorisAdapter:
    """Freeze the denoiser and attach a new adapter to it, as `lycoris` says.

    The adapter starts as no change at all. Equal seeds give equal weights. A quantized base is quantized before this.

    Args:
        denoiser: gets the adapter as its child `adapter`.
        lycoris: the parsed `lycoris_config.json`.
        dtype: of the adapter's weights.
        seed: of the run.
        file: path of the configuration, for messages.

    Raises:
        ConfigError: the configuration cannot be used, an entry adapts nothing, or the adapter turns out dead.
    """
    if problems := check_lycoris(Document(file or LYCORIS_CONFIG, lycoris), spec):
        raise ConfigError(problems)
    targets = resolve_targets(lycoris, spec, {layer_class(module) for module in denoiser.modules()})
    paths = {f"{LYCORIS_PREFIX}_{name}".replace(".", "_"): name for name, _ in denoiser.named_modules()}
    network = _create_network(denoiser, lycoris, targets, seed, file)
    report = count_matches(denoiser, (paths[module.lora_name] for module in network.loras), targets)
    require_matches(report, denoiser, targets, file)
    for module in network.loras:
        prepare_module(module, lycoris.get("bypass_mode", True))
    _require_loadable(network, paths, file)
    register_network(denoiser, network, dtype)
    smoke_test(((m.org_module[0], m.org_module[0], m) for m in network.loras), LYCORIS_CONFIG, file)
    adapter = LycorisAdapter(network, lycoris, spec, report, paths)
    merged = sum(merges(module) and getattr(module.org_module[0], "is_in_8_bits", False) for module in network.loras)
    if merged:
        adapter.notices.append(
            f"{merged} layers compute with the adapter merged into their unpacked weight, and quantize no activations "
            "(dora_wd, rank_dropout, bypass_mode false and some algorithms do that)"
        )
    return adapter


def _require_loadable(network: LycorisNetwork, paths: Mapping[str, str], file: str | None) -> None:
    """Refuse now what could not be loaded after it was trained."""
    with isolated_lycoris(), torch.random.fork_rng(devices=[]):
        found = unloadable(network.loras)
    if found is not None:
        name, error = found
        message = f"LyCORIS could not load the file: it takes {paths[name]} for one of another size ({error})"
        fix = "use another factor, or leave this layer out (exclude_name)"
        raise ConfigError(Problem(message, key=LYCORIS_CONFIG, file=file, fix=fix))


def register_network(denoiser: nn.Module, network: LycorisNetwork, dtype: torch.dtype) -> None:
    """Apply a network to its layers and make it the denoiser's child; only the network trains afterwards."""
    denoiser.requires_grad_(False)
    apply_network(network, dtype)
    network.requires_grad_(True)
    network.train()
    denoiser.add_module(ADAPTER_CHILD, network)


def apply_network(network: LycorisNetwork, dtype: torch.dtype) -> None:
    """Apply a network, each module in `dtype` and where its layer is: packed layers are on the accelerator before the
    others are.

    alpha stays exact: it is not trained, and bfloat16 would turn 10000 into 9984.
    """
    devices = [device_of(module.org_module[0]) for module in network.loras]  # LyCORIS' `full` takes the weights away
    network.apply_to()
    for module, device in zip(network.loras, devices, strict=True):
        alpha = module.alpha.to(device, copy=True) if hasattr(module, "alpha") else None
        module.to(device=device, dtype=dtype)
        if alpha is not None:
            module.alpha = alpha


@contextmanager
def isolated_lycoris() -> Iterator[None]:
    """LyCORIS keeps presets in class attributes and a dict, and writes to the terminal; all of it ends here."""
    from lycoris.config import PRESET
    from lycoris.logging import logger
    from lycoris.wrapper import LycorisNetwork

    names = (
        "ENABLE_CONV", "TARGET_REPLACE_MODULE", "TARGET_REPLACE_NAME", "LORA_PREFIX", "MODULE_ALGO_MAP",
        "NAME_ALGO_MAP", "USE_FNMATCH", "TARGET_EXCLUDE_NAME",
    )  # fmt: skip
    attributes = {name: getattr(LycorisNetwork, name) for name in names}
    presets, level = dict(PRESET), logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        PRESET.clear()
        PRESET.update(presets)
        for name, value in attributes.items():
            setattr(LycorisNetwork, name, value)


def _create_network(
    denoiser: nn.Module, lycoris: Mapping[str, Any], targets: LycorisTargets, seed: int, file: str | None
) -> LycorisNetwork:
    from lycoris.config import PRESET
    from lycoris.modules.norms import NormModule
    from lycoris.wrapper import create_lycoris, network_module_dict

    from simpletuner.adapters.lycoris_full import FullDifference

    options = {key: value for key, value in lycoris.items() if key not in ("apply_preset", "preset")}
    if options.get("bypass_mode"):  # chosen by `prepare_module`: LyCORIS takes it where it is wrong too
        del options["bypass_mode"]
    # The classes that the layers have now: a quantized `Linear` may be a `QLinear`.
    classes: dict[str, set[str]] = {}
    for module in denoiser.modules():
        classes.setdefault(layer_class(module), set()).add(type(module).__name__)
    with isolated_lycoris(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(seed, "adapter"))
        # create_lycoris overwrites what apply_preset set with a preset of its own unless it is given one by name.
        PRESET["from_config"] = {
            "enable_conv": targets.enable_conv,
            "target_module": sorted({now for name in targets.classes.values() for now in classes.get(name, ())}),
            "target_name": list(targets.names),
            "module_algo_map": {
                now: settings
                for name, settings in targets.module_algo_map.items()
                for now in sorted(classes.get(name, ()))
            },
            "name_algo_map": targets.name_algo_map,
            "lora_prefix": LYCORIS_PREFIX,
            "use_fnmatch": targets.use_fnmatch,
            "exclude_name": list(targets.exclude),
        }
        full, network_module_dict["full"] = network_module_dict["full"], FullDifference
        try:
            network = create_lycoris(denoiser, **{"algo": DEFAULT_ALGORITHM, **options}, preset="from_config")
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(
                Problem(f"LyCORIS refuses this configuration: {error}", key=LYCORIS_CONFIG, file=file)
            ) from error
        finally:
            network_module_dict["full"] = full
    network.loras = [m for m in network.loras if not isinstance(m, NormModule) or is_usable_norm(m)]
    if lycoris.get("train_norm") and not any(isinstance(module, NormModule) for module in network.loras):
        message = "none of the layers is a LayerNorm or GroupNorm with weight and bias, and LyCORIS knows no other"
        raise ConfigError(Problem(message, key="train_norm", file=file, fix="remove it, or name such layers"))
    return network
