"""Adapter files at work: apply one to a denoiser, and prove that a written one works outside of this program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.formats import named
from simpletuner.adapters.layers import floating_dtype
from simpletuner.adapters.lycoris import LycorisAdapter, apply_network, isolated_lycoris, register_network
from simpletuner.adapters.lycoris_modules import beside_the_base, prepare_module
from simpletuner.adapters.reading import adapter_from_tensors, format_of, read_adapter, read_adapter_file
from simpletuner.adapters.weights import AdapterWeights
from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import FamilySpec

if TYPE_CHECKING:
    from lycoris.modules.base import LycorisBaseModule
    from lycoris.wrapper import LycorisNetwork


def apply_adapter_file(denoiser: nn.Module, path: Path, spec: FamilySpec, strength: float = 1.0) -> LycorisAdapter:
    """Apply an adapter file of any format to a denoiser, to generate with it.

    Args:
        denoiser: without an adapter; gets one as its child.
        strength: multiplies what the file changes, on top of the `multiplier` of its configuration.

    Raises:
        DataError: unreadable, or a tensor has no place in this denoiser.
    """
    return apply_weights(denoiser, read_adapter(path, spec, denoiser), spec, str(path), strength)


def apply_weights(
    denoiser: nn.Module, weights: AdapterWeights, spec: FamilySpec, file: str, strength: float = 1.0
) -> LycorisAdapter:
    """As `apply_adapter_file`, from weights: LyCORIS' modules compute what every algorithm means."""
    network = network_from(weights, denoiser, spec, strength * weights.multiplier, file)
    network.loras = [beside_the_base(module) for module in network.loras]
    for module in network.loras:
        prepare_module(module, weights.lycoris.get("bypass_mode", True))
    register_network(denoiser, network, floating_dtype(denoiser))
    network.eval().requires_grad_(False)
    adapter = LycorisAdapter(network, weights.lycoris, spec, [MatchCount(Path(file).name, "", len(network.loras))])
    adapter.notices += [f"{file}: {line}" for line in weights.notices]
    return adapter


def check_saved_adapter(
    path: Path,
    fresh_denoiser: nn.Module,
    spec: FamilySpec,
    run: Callable[[nn.Module], Tensor],
    reference: Tensor,
    tolerance: float = 1e-5,
    reference_base: Tensor | None = None,
) -> float:
    """Reload a written file through the public loader of its format onto a stock denoiser and compare outputs.

    PEFT loads diffusers' form, as diffusers does; LyCORIS loads its own; kohya's and ComfyUI's forms are mapped back
    by the family's key table first.

    Args:
        fresh_denoiser: the public class with the base weights, without adapter and without this project's changes;
            carries the adapter afterwards.
        run: the forward pass to compare, on the denoiser that it is given.
        reference: its output with the trained adapter.
        tolerance: largest difference allowed, relative to the largest reference value where that is above 1.
        reference_base: output without the adapter where `reference` was computed. By it the difference between two
            devices is known, and the size of the change, which rounding follows: `allowed_difference`.

    Returns:
        The largest difference.

    Raises:
        DataError: a tensor of the file maps onto nothing, did not survive the reload, or the outputs differ.
    """
    tensors, metadata = read_adapter_file(path)
    dtype = floating_dtype(fresh_denoiser)
    expected = reference.float()
    allowed = tolerance * max(1.0, float(expected.abs().max()))
    if reference_base is not None:
        with torch.no_grad():
            base = run(fresh_denoiser).float()
        allowed = allowed_difference(allowed, expected, reference_base.float(), base)
    weights = adapter_from_tensors(tensors, metadata, spec, fresh_denoiser, str(path))
    if format_of(tensors) == "diffusers":
        loader = load_with_peft(tensors, fresh_denoiser, spec, path)
    else:
        network = network_from(weights, fresh_denoiser, spec, weights.multiplier, str(path))
        apply_network(network, dtype)
        loader = "LyCORIS"
    with torch.no_grad():
        output = run(fresh_denoiser).float()
    difference = float((output - expected).abs().max())
    # Written so that NaN fails too.
    if not difference <= allowed:
        raise DataError(
            Problem(
                f"reloaded by {loader}, the adapter gives a different output: it differs by {difference:.3g}, "
                f"allowed is {allowed:.3g}",
                file=str(path),
            )
        )
    return difference


# A tensor that is lost, or of another strength, costs more of what an adapter changes than this.
SHARE_OF_CHANGE = 1e-3
# Two devices sum in other orders; a base that differs by more than this many times the tolerance is another base.
MOST_NOISE = 10.0


def allowed_difference(allowed: float, expected: Tensor, reference_base: Tensor, base: Tensor) -> float:
    """How far the output of a reloaded adapter may be from that of the live one.

    Args:
        allowed: within one device, for a small change.
        expected: output with the live adapter.
        reference_base: without it, on the same device.
        base: without it, where the file is reloaded.
    """
    noise = float((reference_base - base).abs().max())
    change = float((expected - reference_base).abs().max())
    return max(allowed, min(4 * noise, MOST_NOISE * allowed), SHARE_OF_CHANGE * change)


def load_with_peft(tensors: dict[str, Tensor], denoiser: nn.Module, spec: FamilySpec, path: Path) -> str:
    """Load a file of diffusers' form as diffusers does: by `load_lora_adapter` where the class has it, else by PEFT.

    Returns:
        The loader's name.

    Raises:
        DataError: a tensor of the file has no place.
    """
    prefix = spec.component("denoiser").name
    load = getattr(denoiser, "load_lora_adapter", None)
    if load is not None:
        load(path.parent, weight_name=path.name, prefix=prefix, adapter_name="file", local_files_only=True)
        return "diffusers"
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    bare = {key.removeprefix(f"{prefix}."): tensor for key, tensor in tensors.items()}
    ranks = {key.removesuffix(".lora_A.weight"): len(bare[key]) for key in bare if key.endswith(".lora_A.weight")}
    config = LoraConfig(
        r=next(iter(ranks.values())),
        lora_alpha=next(iter(ranks.values())),
        rank_pattern={f"^{name}": rank for name, rank in ranks.items()},
        alpha_pattern={f"^{name}": rank for name, rank in ranks.items()},
        target_modules=list(ranks),
        use_dora=any("lora_magnitude_vector" in key for key in bare),
    )
    inject_adapter_in_model(config, denoiser, adapter_name="file", state_dict=bare)
    result = cast(Any, set_peft_model_state_dict(denoiser, bare, adapter_name="file"))
    unexpected = result.unexpected_keys
    if unexpected:
        names = ", ".join(unexpected[:5])
        raise DataError(Problem(f"PEFT cannot place {len(unexpected)} tensors: {names}", file=str(path)))
    return "PEFT"


def network_from(
    weights: AdapterWeights, denoiser: nn.Module, spec: FamilySpec, multiplier: float, file: str
) -> LycorisNetwork:
    """LyCORIS' own loader, which leaves out silently what it cannot place; here that is an error.

    Raises:
        DataError: a module cannot be loaded, or a weight is not what the file says.
    """
    from lycoris.wrapper import create_lycoris_from_weights

    tensors = named(weights.modules, spec, "lycoris")  # the multiplier is the network's
    with isolated_lycoris():
        try:
            network, _ = create_lycoris_from_weights(multiplier, file, denoiser, weights_sd=_loadable(tensors))
        except RuntimeError as error:  # of shapes
            message = f"LyCORIS cannot load it onto {type(denoiser).__name__}: {error}"
            raise DataError(Problem(message, file=file, fix="use the model that the adapter was trained on")) from error
    network.loras += _scaling_modules(weights, denoiser, multiplier)
    lost = {key.split(".")[0] for key in tensors} - {module.lora_name for module in network.loras}
    if lost:
        raise DataError(Problem(f"LyCORIS cannot load {len(lost)} modules: {', '.join(sorted(lost)[:5])}", file=file))
    _require_same_weights(network, tensors, file)
    return network


def _loadable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without (IA)^3: for that, LyCORIS 4.1's loader fails with a TypeError, whatever the file."""
    scaling = {key.split(".")[0] for key in tensors if key.endswith(".on_input")}
    return {key: tensor for key, tensor in tensors.items() if key.split(".")[0] not in scaling}


def _scaling_modules(weights: AdapterWeights, denoiser: nn.Module, multiplier: float) -> list[LycorisBaseModule]:
    """LyCORIS' (IA)^3 modules, built as its network builds them for training."""
    from lycoris.modules.ia3 import IA3Module

    modules = []
    for path, tensors in weights.modules.items():
        if "on_input" not in tensors:
            continue
        name = f"lycoris_{path}".replace(".", "_")
        layer = denoiser.get_submodule(path)
        module = IA3Module(name, layer, multiplier, train_on_input=bool(tensors["on_input"]))
        module.weight.data.copy_(tensors["weight"])
        modules.append(module)
    return modules


def _require_same_weights(network: LycorisNetwork, tensors: dict[str, Tensor], file: str) -> None:
    """Every trained tensor of the file is in the reloaded network, unchanged. alpha is a setting, not a weight: for
    full matrices LyCORIS writes one number and reads another, and neither has an effect."""
    loaded = {
        f"{module.lora_name}.{name}": tensor for module in network.loras for name, tensor in module.state_dict().items()
    }
    wrong = [
        key
        for key, tensor in tensors.items()
        if not key.endswith((".alpha", ".diff", ".diff_b"))
        and not (key in loaded and torch.equal(loaded[key].to(tensor), tensor))
    ]
    if wrong:
        raise DataError(Problem(f"{len(wrong)} tensors are lost on reloading: {', '.join(wrong[:5])}", file=file))
