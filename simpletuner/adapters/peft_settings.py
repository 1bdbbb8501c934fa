"""What PEFT writes beside an adapter's weights: which scale they have, and whether they mean anything on the base.

PEFT keeps alpha out of the weights. It stands in `adapter_config.json` beside `adapter_model.safetensors`, or in a
header entry of diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from simpletuner.adapters.formats import PEFT_METADATA
from simpletuner.errors import DataError, Problem
from simpletuner.storage import read_json
from simpletuner.text import read_json_text

CONFIG_FILE = "adapter_config.json"
# The entry that stands for `adapter_config.json` in the metadata of weights that were read.
CONFIG_KEY = "adapter_config"
# Starts that change the base itself: the weights of such an adapter belong on what is left of it.
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")

# Settings with which PEFT computes something else than `up @ down` beside the layer.
_OTHER_FUNCTIONS = (
    *("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens"),
    "layer_replication",
)


def config_beside(weights: Path) -> dict[str, str]:
    """PEFT's configuration of a weight file, as a metadata entry; empty where there is none.

    Raises:
        DataError: the file is no JSON object, or of an adapter that is not a LoRA on the base as it is.
    """
    path = weights.with_name(CONFIG_FILE)
    if not path.is_file():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise DataError(Problem("is not a JSON object", file=str(path)))
    _require_lora(config, str(path))
    return {CONFIG_KEY: json.dumps(config)}


def _require_lora(config: Mapping[str, Any], file: str) -> None:
    kind = str(config.get("peft_type", "LORA"))
    if kind != "LORA":
        message = f"it is a {kind} adapter of PEFT, and only LORA can be read from it"
        raise DataError(Problem(message, key="peft_type", file=file, allowed="LORA"))
    if variants := [name for name in _OTHER_FUNCTIONS if config.get(name)]:
        message = f"{variants[0]} computes another function of its weights than LoRA"
        raise DataError(Problem(message, key=variants[0], file=file, allowed="unset"))
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGE_THE_BASE):
        message = f"its weights belong on a base that {start} has changed, not on the model as it is published"
        fix = "save it with path_initial_model_for_weight_conversion, which converts it to a plain LoRA"
        raise DataError(Problem(message, key="init_lora_weights", file=file, fix=fix))


def settings_in(metadata: Mapping[str, str], component: str, file: str) -> dict[str, Any] | None:
    """PEFT's settings of a file, by their own names; None where it has none.

    Args:
        component: the denoiser's name, which diffusers puts in front.
    """
    try:
        if CONFIG_KEY in metadata:
            return dict(read_json_text(metadata[CONFIG_KEY]).items())
        if PEFT_METADATA in metadata:
            entries = read_json_text(metadata[PEFT_METADATA])
            return {name.removeprefix(f"{component}."): value for name, value in entries.items()}
    except (ValueError, AttributeError) as error:
        raise DataError(Problem(f"its PEFT settings cannot be read: {error}", file=file)) from error
    return None


def scale_of_layer(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """What PEFT multiplies `up @ down` of a layer with: alpha over the rank, or over its root (rslora).

    Args:
        path: of the layer, by the file's name without prefix; patterns are matched as PEFT does.
        rank: of its weights.
    """
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), settings.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
