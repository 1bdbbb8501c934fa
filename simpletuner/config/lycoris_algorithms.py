"""LyCORIS' algorithms: which setting each of them reads, and what LyCORIS 4.1 does wrong with some.

What is wrong is refused before anything trains: such an adapter would learn something, and its file would be something
else, or could not be loaded at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simpletuner.config.options.adapter import AdapterOptions
from simpletuner.families.readers import Form, Kind

ALGORITHMS = ("lokr", "loha", "locon", "lora", "glora", "diag-oft", "boft", "full", "dylora", "ia3")
DEFAULT_ALGORITHM = "lora"  # as in LyCORIS
UNUSABLE_ALGORITHMS = {
    "tlora": "it masks its ranks by the timestep, which LyCORIS keeps in a global variable and its files do not hold",
}
ALGO_MAPS = ("module_algo_map", "name_algo_map")
NORMS = ("LayerNorm", "GroupNorm")

_LORA_LIKE = ("lokr", "loha", "locon", "lora")
# Settings that only some algorithms read; the others are read by all.
READ_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("factor", "decompose_both", "full_matrix", "unbalanced_factorization"), ("lokr",)),
    **dict.fromkeys(("use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "dora_wd", "wd_on_output"), _LORA_LIKE),
    **dict.fromkeys(("constraint", "rescaled"), ("diag-oft", "boft")),
    **dict.fromkeys(("linear_alpha", "conv_alpha"), (*_LORA_LIKE, "glora", "dylora")),
    **dict.fromkeys(("linear_dim", "conv_dim"), (*_LORA_LIKE, "glora", "dylora", "diag-oft", "boft")),
    "use_scalar": (*_LORA_LIKE, "glora"),
    "dropout": (*_LORA_LIKE, "glora", "diag-oft"),
    "rank_dropout": (*_LORA_LIKE, "glora", "diag-oft", "full"),
    "bypass_mode": (*_LORA_LIKE, "glora", "diag-oft", "boft", "full"),
    "block_size": ("dylora",),
}
# (setting, algorithms, why not)
_FAULTY = (
    ("rank_dropout", ("glora",), "LyCORIS keeps the ranks that it should drop, and drops the others"),
    ("bypass_mode", ("full",), "a full difference has no cheaper form to compute with"),
    ("unbalanced_factorization", ("lokr",), "LyCORIS cannot load files with the larger factor in front"),
    ("rs_lora", ("lokr", "glora"), "files do not hold it, so that the adapter would be weaker wherever it is loaded"),
)
_ROTATIONS = ("diag-oft", "boft")
_DEFAULT_RANKS, _DEFAULT_BLOCK = 4, 4

Place = tuple[str, ...]
Fault = tuple[Place, str, str]


def algorithms_in(lycoris: Mapping[str, Any]) -> set[str]:
    """Every algorithm that a configuration uses, also those of single layers."""
    return {str(settings.get("algo", lycoris.get("algo", DEFAULT_ALGORITHM))) for _, settings in _places(lycoris)}


def form_and_kind(options: AdapterOptions, lycoris: Mapping[str, Any] | None) -> tuple[Form, Kind]:
    """What a run's adapter file will be; `lycoris` is its `lycoris_config.json`."""
    if options.lora_type == "standard":
        return options.lora_format, "dora" if options.use_dora else "lora"
    return "lycoris", kind_of_lycoris(lycoris or {})


def kind_of_lycoris(lycoris: Mapping[str, Any]) -> Kind:
    """What the files of a `lycoris_config.json` hold."""
    used = algorithms_in(lycoris)
    kind = {"locon": "lora", "lora": "lora", "dylora": "lora", "lokr": "lokr", "loha": "loha"}
    kinds = {kind.get(algorithm, "other") for algorithm in used}
    if len(kinds) > 1 or lycoris.get("train_norm"):
        return "other"
    found = kinds.pop()
    if lycoris.get("dora_wd"):
        found = "dora" if found == "lora" else "other"
    return found  # type: ignore[return-value]


def useless_settings(lycoris: Mapping[str, Any]) -> list[str]:
    """What no algorithm of the configuration reads, one line each."""
    used = algorithms_in(lycoris)
    names = ", ".join(sorted(used))
    lines = [
        f"{key}: has no effect on {names}"
        for key, value in lycoris.items()
        if key in READ_BY and value and not used & set(READ_BY[key])
    ]
    if lycoris.get("bypass_mode") and (lycoris.get("dora_wd") or lycoris.get("rank_dropout")):
        lines.append("bypass_mode: has no effect with dora_wd and rank_dropout, which need the merged weight")
    return lines


def faults(lycoris: Mapping[str, Any], layer_classes: set[str], title: str) -> Iterator[Fault]:
    """(where, what is wrong, what to do) of settings that LyCORIS does not serve as it should.

    Args:
        lycoris: known keys with values of the right kind.
        layer_classes: of the family's layers.
        title: of the family.
    """
    if lycoris.get("multiplier") == 0:
        yield ("multiplier",), "0 would train nothing", "remove it"
    for place, settings in _places(lycoris):
        inherited = str(settings.get("algo", lycoris.get("algo", DEFAULT_ALGORITHM)))
        used = {inherited} if place else algorithms_in(lycoris)
        for key, algorithms, reason in _FAULTY:
            if settings.get(key) and used & set(algorithms):
                names = ", ".join(sorted(used & set(algorithms)))
                yield (*place, key), f"cannot be used with {names}: {reason}", "remove it"
        decomposes, on_output = ("weight_decompose", "wd_on_out") if place else ("dora_wd", "wd_on_output")
        if settings.get(decomposes) and settings.get(on_output) is False:
            message = "false cannot be used: LyCORIS reads every weight-decomposed file as one of the output"
            yield (*place, on_output), message, "remove it"
        if settings.get(decomposes) or used & set(_ROTATIONS):
            yield from _multiplier_stays(lycoris, decomposes if settings.get(decomposes) else used & set(_ROTATIONS))
        if "dylora" in used:
            yield from _broken_blocks(place, settings, lycoris)
    if lycoris.get("train_norm"):
        yield from _faults_of_norms(lycoris, layer_classes, title)


def _places(lycoris: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Where settings stand: at the top, and in each entry of a map of `apply_preset`."""
    yield (), lycoris
    preset = lycoris.get("apply_preset") or {}
    for key in ALGO_MAPS:
        for name, settings in preset.get(key, {}).items():
            yield ("apply_preset", key, name), settings


def _multiplier_stays(lycoris: Mapping[str, Any], kind: Any) -> Iterator[Fault]:
    """What has no factor in front of it cannot take the multiplier along in its file, where others would miss it."""
    if lycoris.get("multiplier", 1) != 1:
        names = kind if isinstance(kind, str) else ", ".join(sorted(kind))
        message = f"cannot be used with {names}: no other program would apply it to the file"
        yield ("multiplier",), message, "remove it, and use the strength where images are generated"


def _broken_blocks(place: Place, settings: Mapping[str, Any], lycoris: Mapping[str, Any]) -> Iterator[Fault]:
    """DyLoRA trains whole blocks of ranks."""
    block_size = settings.get("block_size") or lycoris.get("block_size") or _DEFAULT_BLOCK
    ranks = {"dim": settings.get("dim", lycoris.get("linear_dim", _DEFAULT_RANKS))}
    if not place:
        ranks = {"linear_dim": settings.get("linear_dim", _DEFAULT_RANKS)}
        ranks |= {"conv_dim": settings["conv_dim"]} if settings.get("conv_dim") else {}
    for key, rank in ranks.items():
        if rank % block_size:
            message = f"{rank} is not a multiple of block_size, which is {block_size}"
            yield (*place, key), message, "dylora trains whole blocks of ranks"


def _faults_of_norms(lycoris: Mapping[str, Any], layer_classes: set[str], title: str) -> Iterator[Fault]:
    if lycoris.get("rank_dropout"):
        message = "cannot be used with train_norm: LyCORIS keeps the rows that it should drop"
        yield ("rank_dropout",), message, "remove one of them"
    if not layer_classes & set(NORMS):
        message = f"{title} has no normalization that LyCORIS can train: it knows LayerNorm and GroupNorm"
        yield ("train_norm",), message, "remove it"
