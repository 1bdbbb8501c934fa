"""What may change between a checkpoint and the run that resumes it.

Model, adapter and optimizer decide what the saved tensors mean: a difference is an error. Everything else that acts on
the weights may be changed on purpose: a difference is logged, and the run goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.config.options import all_options
from simpletuner.errors import ConfigError, Problem, plain_value

if TYPE_CHECKING:
    from simpletuner.adapters.assistant import Assistant
    from simpletuner.config.loading import LoadedRun
    from simpletuner.data.dataset import Dataset

FIXED_OPTIONS = ("model_family", "model_type", "lora_type", "optimizer", "base_model_precision")
# Decide, with the shapes, what the weights of standard LoRA mean.
LORA_OPTIONS = ("lora_alpha", "lora_init_type")
# Groups of options that change no weight, and those of the others that change none. All else is logged.
SILENT_GROUPS = ("Several processes", "Validation images", "Checkpoints", "Reporting")
SILENT_OPTIONS = (
    *("data_backend_config", "cache_dir", "vae_batch_size", "vae_cache_ondemand", "vae_cache_disable"),
    *("text_cache_ondemand", "text_cache_disable", "write_batch_size", "lycoris_config", "init_lora", "lora_format"),
    "text_encoder_offload",
    *("eval_steps_interval", "eval_epoch_interval", "eval_loss_disable", "eval_dataset_pooling"),
    *("max_train_steps", "num_train_epochs"),  # `resuming.py` says where the run ends now
    *("checkpoint_keep_best", "evaluation_type", "pretrained_evaluation_model_name_or_path"),
)


def run_identity(
    loaded: LoadedRun,
    datasets: Collection[Dataset],
    shapes: Mapping[str, Sequence[int]],
    num_processes: int,
    assistant: Assistant | None = None,
) -> dict[str, Any]:
    """JSON-able facts that a resume is compared with.

    Args:
        datasets: that are trained on.
        shapes: of the trained weights.
        assistant: the frozen LoRA that is on while training.
    """
    return {
        "fixed": {**fixed_settings(loaded), "parameters": dict(shapes)},
        "told": {
            "datasets": {each.id: {"images": each.num_images, "fingerprint": each.fingerprint} for each in datasets},
            "schedules": {
                each.id: {
                    "repeats": each.repeats,
                    "batch_size": each.batch_size,
                    **asdict(each.schedule),
                    **({"with_replacement": True} if each.with_replacement else {}),
                }
                for each in datasets
            },
            "processes": num_processes,
            "torch": torch.__version__,
            "assistant": assistant.identity if assistant else {},
        },
    }


def fixed_settings(loaded: LoadedRun) -> dict[str, Any]:
    """What of the configuration may not change, known before anything is loaded."""
    config = loaded.config
    names = (*FIXED_OPTIONS, *(LORA_OPTIONS if config.adapter.lora_type == "standard" else ()))
    return {**{key: config.value(key) for key in names}, "lycoris_config": loaded.lycoris}


def compare_identity(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> list[str]:
    """One line for each difference of data and machine, which is allowed.

    Raises:
        ConfigError: a difference that is not.
    """
    refuse_changes(saved["fixed"], current["fixed"], path)
    before, now = saved["told"], current["told"]
    lines = [*_dataset_changes(before.get("datasets", {}), now["datasets"])]
    shared = before.get("schedules", {}).keys() & now["schedules"].keys()
    for name in sorted(shared):
        lines += [f"dataset {name}: {line}" for line in differences(before["schedules"][name], now["schedules"][name])]
    machine = {"processes": "number of processes", "torch": "version of torch"}
    old, new = ({title: side.get(key) for key, title in machine.items() if key in before} for side in (before, now))
    lines += differences(old, new)
    lines += _assistant_changes(before.get("assistant", {}), now.get("assistant", {}))
    return [f"changed since {path.name}: {line}" for line in lines]


def refuse_changes(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Raise where the weights of a checkpoint would mean something else.

    Args:
        current: `fixed_settings`, and where they are known the shapes of the trained weights.

    Raises:
        ConfigError: with every such difference.
    """
    problems = [
        Problem(
            f"{path} was trained with another value: {line}",
            key=key,
            fix="put the old value back, or choose another output_dir for a fresh start",
        )
        for key in current
        if key != "parameters"
        for line in _setting_changes(key, saved.get(key), current[key])
    ]
    if not problems and saved.get("parameters") != current.get("parameters", saved.get("parameters")):
        lines = ", ".join(_shape_changes(saved.get("parameters") or {}, current["parameters"]))
        problems = [
            Problem(
                f"{path} holds other trained weights than this configuration has: {lines}",
                key="resume_from_checkpoint",
                fix="put the old settings of the adapter back, or choose another output_dir for a fresh start",
            )
        ]
    if problems:
        raise ConfigError(problems)


def option_changes(saved: Mapping[str, Any], loaded: LoadedRun, path: Path) -> list[str]:
    """One line for each option that acts on the weights and is not what it was.

    Args:
        saved: every option as the checkpoint was trained with.
    """
    current = loaded.resolved()
    acting = [
        name
        for name, info in all_options().items()
        if info.group not in SILENT_GROUPS and name not in (*SILENT_OPTIONS, *FIXED_OPTIONS) and name in saved
    ]
    lines = differences({name: saved[name] for name in acting}, {name: current[name] for name in acting})
    return [f"changed since {path.name}: {line}" for line in lines]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`factor 16 → 4`: one text for each value that differs, however deep it lies."""
    old, new = dict(_leaves(before)), dict(_leaves(now))
    return [
        f"{name} {plain_value(old.get(name))} → {plain_value(new.get(name))}"
        for name in dict.fromkeys((*old, *new))
        if old.get(name) != new.get(name)
    ]


def _setting_changes(key: str, before: Any, now: Any) -> list[str]:
    if isinstance(before, dict) != isinstance(now, dict):  # a file of settings that the other side has not
        before, now = ("set" if isinstance(each, dict) else each for each in (before, now))
    return differences(_named(key, before), _named(key, now))


def _named(key: str, value: Any) -> dict[str, Any]:
    """The settings of a file stand for themselves; an option has its name."""
    return value if isinstance(value, dict) else {key: value}


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if item == {} else item


def _dataset_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    old = {name: value if isinstance(value, dict) else {"fingerprint": value} for name, value in before.items()}
    gone = {name: value["fingerprint"] for name, value in old.items() if name not in now}
    for name, value in now.items():
        if name not in old:
            source = next((other for other, content in gone.items() if content == value["fingerprint"]), None)
            if source is None:
                yield f"dataset {name} added with {_images(value['images'])}"
            else:
                del gone[source]
                yield f"dataset renamed {source} → {name}"
        elif old[name]["fingerprint"] != value["fingerprint"]:
            was, count = old[name].get("images", value["images"]), value["images"]
            change = "its images, captions or crops are not the same"
            if was != count:
                change = f"{_images(abs(count - was))} {'added' if count > was else 'removed'} ({was} → {count})"
            yield f"dataset {name}: {change}"
    yield from (f"dataset {name} removed" for name in gone)


def _assistant_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if bool(before) != bool(now):
        yield f"an assistant LoRA {'is on while training now' if now else 'was on while training'}"
    elif before.get("sha256") != now.get("sha256"):  # digests say nothing to anybody
        yield "the assistant LoRA is another file"


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _shape_changes(before: Mapping[str, Sequence[int]], now: Mapping[str, Sequence[int]]) -> Iterator[str]:
    missing, left = [name for name in now if name not in before], [name for name in before if name not in now]
    if missing:
        yield f"{len(missing)} weights are not in it, such as {missing[0]}"
    if left:
        yield f"{len(left)} weights have no place, such as {left[0]}"
    other = [name for name in now if name in before and list(before[name]) != list(now[name])]
    if other:
        sizes = (" x ".join(map(str, shapes[other[0]])) for shapes in (before, now))
        yield f"{len(other)} weights have another size, such as {other[0]}: {' → '.join(sizes)}"
