"""Whether the disk has room for what a run surely writes: looked at before anything heavy is imported or fetched.

Only what is certain is counted, so that no run is refused that would fit. `simpletuner plan` counts all of it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from simpletuner.config.loading import LoadedRun
from simpletuner.config.options.model import ModelOptions
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.models.build import model_source
from simpletuner.models.components import ModelSource
from simpletuner.storage import require_free_space

# Beside weights, whose size is known once an adapter is made. `simpletuner plan` counts the same.
LOG_BYTES = 32 << 20
LOGS = "logs, report and images"


def check_disk_space(loaded: LoadedRun, environment: Mapping[str, str]) -> None:
    """Raise where the first checkpoint, or the model that is to be fetched, cannot fit.

    Raises:
        DataError: names the folder, what is needed and what is free.
    """
    spec, source = get_spec(loaded.config.model.model_family), model_source(loaded.config.model)
    weights = denoiser_bytes(spec, source, loaded.config.model)
    is_full = loaded.config.model.model_type == "full"
    # The state of the optimizer comes on top, where it has one.
    what = f"one checkpoint, with {LOGS}," if is_full else f"the output of a run, {LOGS} alone,"
    require_free_space(loaded.config.checkpoint.output_dir, LOG_BYTES + (weights if is_full else 0), what)
    if not source.is_local and weights:
        cache = hub_cache(environment)
        if not (cache / f"models--{source.model.replace('/', '--')}").is_dir():
            require_free_space(cache, weights, f"{source.model}, which is fetched from the hub,")


def denoiser_bytes(spec: FamilySpec, source: ModelSource, options: ModelOptions) -> int:
    """Bytes of the denoiser's weights as they lie on the disk, or will; 0 where nobody knows."""
    if source.is_local:
        folder = Path(source.model) / spec.component("denoiser").name
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    flavour = spec.flavours[options.model_flavour or spec.default_flavour]
    return flavour.weight_bytes() if source.model == flavour.hub_id else 0


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where the Hugging Face libraries keep what they fetch."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")  # noqa: PTH118 - may begin with ~
    return Path(home).expanduser() / "hub"
