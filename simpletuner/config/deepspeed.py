"""The DeepSpeed file of a run: what it may hold. What the trainer decides belongs into config.json."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simpletuner.config.json_reader import read_json_file
from simpletuner.errors import ConfigError, Problem

KEY = "deepspeed_config"
# Keys of DeepSpeed that say what an option of ours says.
OUR_KEYS = {
    "train_batch_size": "train_batch_size",
    "train_micro_batch_size_per_gpu": "train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "lr_scheduler",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "amp": "mixed_precision",
}


def read_deepspeed(path: Path) -> dict[str, Any]:
    """The file as a dict.

    Raises:
        ConfigError: it is not there, no JSON object, or says what it may not say; all of it at once.
    """
    content = read_json_file(path, key=KEY).value
    if problems := list(_problems(content, str(path))):
        raise ConfigError(problems)
    return dict(content)


def stage_of(settings: Mapping[str, Any]) -> Any:
    zero = settings.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, Mapping) else None


def _problems(settings: Mapping[str, Any], file: str) -> Iterator[Problem]:
    if importlib.util.find_spec("deepspeed") is None:
        yield Problem("DeepSpeed is not installed", key=KEY, fix="pip install deepspeed")
    for key, ours in OUR_KEYS.items():
        if key in settings and not _is_open(key, settings[key]):
            yield Problem(
                f"{key} is set in the DeepSpeed file",
                key=KEY,
                file=file,
                allowed='"auto", or no such key',
                fix=f"set {ours} in config.json and take it out there",
            )
    if stage_of(settings) not in (1, 2, 3):
        yield Problem(
            f"zero_optimization.stage is {stage_of(settings)}",
            key=KEY,
            file=file,
            allowed="1 (shards the optimizer's state), 2 (gradients too), 3 (weights too)",
            fix='write {"zero_optimization": {"stage": 2}}',
        )


def _is_open(key: str, value: Any) -> bool:
    """Whether the file leaves a setting to ours. A number format that is not enabled is off."""
    if isinstance(value, Mapping):
        return value.get("enabled", OUR_KEYS[key] != "mixed_precision") in ("auto", False)
    return value == "auto"
