"""The builder of `lycoris_config.json`: from algorithm, size and layers to the file, and from a file back to these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from simpletuner.config.json_reader import JsonPath, parse_json
from simpletuner.config.json_writer import remove_value, set_value
from simpletuner.config.lycoris_algorithms import DEFAULT_ALGORITHM
from simpletuner.families.spec import FamilySpec

# Which layers are adapted; "as written": as the file says, in words of its own.
Layers = Literal["all", "attention", "as written"]
LAYERS: Mapping[Layers, str] = {
    "all": "attention and feed-forward: learns most",
    "attention": "attention only: smaller and more stable",
}
ATTENTION, FEED_FORWARD = "Attention", "FeedForward"

PROPOSED_FACTOR = 16
# More than any layer has: LoKr then keeps its second matrix whole.
WHOLE = 10000
# Algorithm -> rank (`linear_dim`) that is proposed; None where something else sets the size.
ALGORITHMS: Mapping[str, int | None] = {
    "lokr": None,
    "loha": 8,
    "locon": 16,
    "dylora": 16,
    "glora": 8,
    "diag-oft": 4,
    "boft": 4,
    "ia3": None,
    "full": None,
}
# For these the rank is a number of blocks, and nothing is divided by it.
_WITHOUT_ALPHA = ("diag-oft", "boft")


@dataclass(frozen=True)
class Lycoris:
    """What is asked of an adapter of LyCORIS.

    Args:
        factor: of LoKr: the larger, the smaller the adapter; None is proposed.
        rank: of the others; None is proposed.
        layers: None is proposed.
    """

    algorithm: str = "lokr"
    factor: int | None = None
    rank: int | None = None
    layers: Layers | None = None


def lycoris_settings(spec: FamilySpec, chosen: Lycoris) -> dict[str, Any]:
    """The content of `lycoris_config.json`."""
    settings: dict[str, Any] = {"algo": chosen.algorithm, "multiplier": 1.0}
    factor = chosen.factor or PROPOSED_FACTOR
    rank = chosen.rank or ALGORITHMS[chosen.algorithm]
    if chosen.algorithm == "lokr":
        settings |= {"linear_dim": WHOLE, "linear_alpha": 1, "factor": factor}
    elif rank is not None:
        settings["linear_dim"] = rank
        settings |= {} if chosen.algorithm in _WITHOUT_ALPHA else {"linear_alpha": rank}
    return {**settings, "apply_preset": _targets(spec, chosen, factor)}


def has_both_kinds_of_layers(spec: FamilySpec) -> bool:
    """Whether a family calls its layers so that there is something to choose."""
    return {ATTENTION, FEED_FORWARD} <= _known_classes(spec)


def read_lycoris(content: Any) -> Lycoris:
    """What a file asks for, as far as it can be asked about."""
    if not isinstance(content, dict):
        return Lycoris()
    algorithm, factor, rank = (content.get(key) for key in ("algo", "factor", "linear_dim"))
    algorithm = str(algorithm or DEFAULT_ALGORITHM)
    algorithm = "locon" if algorithm == "lora" else algorithm  # LyCORIS has two names for it
    has_rank = isinstance(rank, int) and ALGORITHMS.get(algorithm) is not None
    return Lycoris(
        algorithm=algorithm if algorithm in ALGORITHMS else "lokr",
        factor=factor if isinstance(factor, int) else None,
        rank=rank if has_rank else None,
        layers=_read_layers(content),
    )


def edited_lycoris(text: str, spec: FamilySpec, chosen: Lycoris) -> str:
    """A file's text with what was chosen otherwise; everything that nobody asks about stays."""
    content = parse_json(text, "").value
    if not isinstance(content, dict):
        return text
    found = read_lycoris(content)
    old, new = lycoris_settings(spec, found), lycoris_settings(spec, chosen)
    if chosen.layers != found.layers and chosen.layers in LAYERS:
        for key in ("preset", "apply_preset"):
            text = remove_value(text, (key,)) if key in content else text
        text = set_value(text, ("apply_preset",), new["apply_preset"])
        old["apply_preset"] = new["apply_preset"]
    return _with_differences(text, (), old, new)


def _targets(spec: FamilySpec, chosen: Lycoris, factor: int) -> dict[str, Any]:
    """Attention and feed-forward layers, as the family calls them, else its usual LoRA targets."""
    wanted = (ATTENTION,) if chosen.layers == "attention" else (ATTENTION, FEED_FORWARD)
    targets = [name for name in wanted if name in _known_classes(spec)]
    if not targets:
        return {"target_name": list(spec.default_lora_targets), "use_fnmatch": True}
    preset: dict[str, Any] = {"target_module": targets}
    if chosen.algorithm == "lokr":
        factors = {ATTENTION: factor, FEED_FORWARD: max(1, factor // 2)}
        preset["module_algo_map"] = {name: {"factor": factors[name]} for name in targets}
    return preset


def _known_classes(spec: FamilySpec) -> set[str]:
    return {module.class_name for module in spec.adaptable} | set(spec.class_aliases)


def _read_layers(content: Mapping[str, Any]) -> Layers:
    preset = content.get("apply_preset")
    if not isinstance(preset, dict) or set(preset) - {"target_module", "module_algo_map"}:
        return "as written"
    targets = preset.get("target_module")
    kinds: dict[Layers, list[str]] = {"all": [ATTENTION, FEED_FORWARD], "attention": [ATTENTION]}
    return next((layers for layers, names in kinds.items() if targets == names), "as written")


def _with_differences(text: str, place: JsonPath, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The text with what differs between two contents; nothing is put where the file has no place for it."""
    for key in old:
        if key not in new and (*place, key) in parse_json(text, "").spans:
            text = remove_value(text, (*place, key))
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, dict) and isinstance(before, dict):
            text = _with_differences(text, (*place, key), before, value)
        elif before != value and place in parse_json(text, "").spans:
            text = set_value(text, (*place, key), value)
    return text
