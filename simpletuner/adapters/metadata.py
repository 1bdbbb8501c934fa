"""What an adapter file says about itself, for model managers, other trainers, and whoever wants to make it again.

No date is written, so that equal runs give equal files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from simpletuner.adapters.weights import ALPHA, DOWN, AdapterWeights
from simpletuner.models.spec import FamilySpec

# Our own entry: what `run.lock.json` says of the run that made the file.
RUN_KEY = "simpletuner"


def modelspec_metadata(architecture: str, title: str) -> dict[str, str]:
    """The header fields that model managers read (github.com/Stability-AI/ModelSpec)."""
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": title,
    }


def adapter_metadata(weights: AdapterWeights, spec: FamilySpec) -> dict[str, str]:
    """ModelSpec's fields, and those of kohya's scripts (`ss_*`) that A1111, Forge and Civitai show."""
    is_lora = weights.is_plain_lora
    kind = "lora" if is_lora else "lycoris"
    architecture = f"{spec.keys.architecture or spec.name}/{kind}"
    algorithm = str(weights.lycoris.get("algo", "lora" if is_lora else weights.algorithms[0]))
    metadata = modelspec_metadata(architecture, f"{spec.title} {algorithm}")
    metadata["modelspec.prediction_type"] = {"v_prediction": "v"}.get(spec.prediction_type, spec.prediction_type)
    metadata["ss_base_model_version"] = spec.keys.base_model_version or spec.name
    metadata["ss_network_module"] = spec.keys.kohya_network if is_lora else "lycoris.kohya"
    if not is_lora:
        metadata["ss_network_args"] = json.dumps({"algo": algorithm, **_network_arguments(weights)}, sort_keys=True)
    metadata |= _network_size(weights)
    return metadata


def _network_size(weights: AdapterWeights) -> dict[str, str]:
    """Rank and alpha where all modules agree; kohya's word where they do not."""
    alphas = {float(module[ALPHA]) for module in weights.modules.values() if ALPHA in module and DOWN in module}
    ranks = weights.ranks
    dim = ranks.pop() if len(ranks) == 1 else weights.lycoris.get("linear_dim", "Dynamic")
    alpha = alphas.pop() if len(alphas) == 1 else weights.lycoris.get("linear_alpha", "Dynamic")
    return {"ss_network_dim": str(dim), "ss_network_alpha": str(alpha)}


def _network_arguments(weights: AdapterWeights) -> Mapping[str, object]:
    return {key: value for key, value in weights.lycoris.items() if isinstance(value, int | float | str)}
