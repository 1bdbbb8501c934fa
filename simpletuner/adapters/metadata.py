"""What an adapter file says about itself, for model managers, other trainers, and whoever wants to make it again.

No date is written, so that equal runs give equal files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from simpletuner.adapters.weights import ALPHA, DOWN, AdapterWeights, rank_of
from simpletuner.config.options import all_options
from simpletuner.families.spec import FamilySpec

# Our own entry: what `run.lock.json` says of the run that made the file.
RUN_KEY = "simpletuner"
# Counts what readers must know of a file's layout. 2: the last block of SD3 has the halves of `norm1_context` as the
# original release has them, in files with the original's names; 1, which files do not say, has them as diffusers.
VERSION_KEY, VERSION = "simpletuner_file_version", "2"
_IMPLEMENTATION = "https://github.com/huggingface/diffusers"
# kohya's name, after `ss_` -> the option.
_KOHYA_NAMES = {
    "learning_rate": "learning_rate",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "optimizer": "optimizer",
    "seed": "seed",
    "max_train_steps": "max_train_steps",
    "batch_size_per_device": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "mixed_precision": "mixed_precision",
    "caption_dropout_rate": "caption_dropout_probability",
}
# Say where things are and run and who gets reports, not what is trained. The launcher picks a new port each time.
_NOT_OF_THE_RESULT = (
    *("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "text_encoder_paths"),
    *("resume_from_checkpoint", "report_to"),
    *("tracker_run_name", "tracker_project_name", "webhook_config", "hub_model_id", "push_to_hub"),
    *("main_process_ip", "main_process_port", "machine_rank"),
)


def modelspec_metadata(spec: FamilySpec, kind: str = "", what: str = "") -> dict[str, str]:
    """The header fields that model managers read (github.com/Stability-AI/ModelSpec).

    Args:
        kind: of an adapter, behind the architecture; empty for a model.
        what: behind the title.
    """
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "/".join(filter(None, (spec.keys.architecture or spec.name, kind))),
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": " ".join(filter(None, (spec.title, what))),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(spec.prediction_type, spec.prediction_type),
    }


def adapter_metadata(weights: AdapterWeights, spec: FamilySpec) -> dict[str, str]:
    """ModelSpec's fields, and those of kohya's scripts (`ss_*`) that A1111, Forge and Civitai show.

    Args:
        weights: as the file holds them.
        spec: of the weights that they belong to (`ModelFamily.spec_of_weights`).
    """
    is_lora = weights.is_plain_lora
    kind = "lora" if is_lora else "lycoris"
    algorithm = str(weights.lycoris.get("algo", "lora" if is_lora else weights.algorithms[0]))
    metadata = modelspec_metadata(spec, kind, algorithm)
    metadata["ss_base_model_version"] = spec.keys.base_model_version or spec.name
    metadata["ss_network_module"] = spec.keys.kohya_network if is_lora else "lycoris.kohya"
    if not is_lora:
        metadata["ss_network_args"] = json.dumps({"algo": algorithm, **_network_arguments(weights)}, sort_keys=True)
    metadata |= _network_size(weights)
    return metadata | {VERSION_KEY: VERSION}


def is_of_first_version(metadata: Mapping[str, str], spec: FamilySpec) -> bool:
    """Whether this program wrote a file before it wrote `VERSION_KEY`: known by the run, or by its own title."""
    if VERSION_KEY in metadata:
        return False
    has_own_title = metadata.get("modelspec.title", "").startswith(f"{spec.title} ")
    return RUN_KEY in metadata or (has_own_title and metadata.get("modelspec.implementation") == _IMPLEMENTATION)


def run_metadata(lock: Mapping[str, Any], step: int) -> dict[str, str]:
    """What `run.lock.json` says of the run that made a file: our own entry, and kohya's names for the same.

    Paths are left out, so that the same run in another folder makes the same file, and nothing private travels.
    """
    config = lock["config"]
    base = hashlib.sha256(json.dumps(lock["base"]["files"], sort_keys=True).encode()).hexdigest()
    own = {
        "version": lock["simpletuner"],
        "model_family": config["model_family"],
        "step": step,
        "config_sha256": _config_digest(config),
        "datasets": {name: data["fingerprint"] for name, data in lock["data"].items()},
        "base_model_sha256": base,
    }
    images = sum(data["pictures"] for data in lock["data"].values())
    metadata = {f"ss_{name}": str(config[key]) for name, key in _KOHYA_NAMES.items() if config.get(key) is not None}
    metadata |= _resolution(config)
    metadata |= {"ss_num_train_images": str(images), "ss_steps": str(step)}
    return metadata | {RUN_KEY: json.dumps(own, sort_keys=True), "global_step": str(step)}


def _resolution(config: Mapping[str, Any]) -> dict[str, str]:
    """As kohya writes it: width and height in pixels of a square of that size."""
    size = config.get("resolution")
    if size is None:
        return {}
    side = round(1000 * size**0.5) if config.get("resolution_type") == "area" else round(size)
    return {"ss_resolution": f"({side}, {side})"}


def _config_digest(config: Mapping[str, Any]) -> str:
    infos = all_options()
    kept = {
        key: value
        for key, value in config.items()
        if key not in _NOT_OF_THE_RESULT and not (key in infos and infos[key].path)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _network_size(weights: AdapterWeights) -> dict[str, str]:
    """Rank and alpha where all modules agree; kohya's word where they do not."""
    loras = [module for module in weights.modules.values() if DOWN in module]
    alphas = {float(module.get(ALPHA, rank_of(module))) for module in loras}
    ranks = weights.ranks
    dim = ranks.pop() if len(ranks) == 1 else weights.lycoris.get("linear_dim", "Dynamic")
    alpha = alphas.pop() if len(alphas) == 1 else weights.lycoris.get("linear_alpha", "Dynamic")
    return {"ss_network_dim": str(dim), "ss_network_alpha": alpha if isinstance(alpha, str) else f"{alpha:g}"}


def _network_arguments(weights: AdapterWeights) -> Mapping[str, object]:
    return {key: value for key, value in weights.lycoris.items() if isinstance(value, int | float | str)}
