"""A checkpoint as the folder that generation reads: of OmniGen2's own program (a pickle), or of this one.

Source of the layouts: VectorSpaceLab/OmniGen2 (Apache-2.0), `convert_ckpt_to_hf_format.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import storage
from simpletuner.adapters.reading import read_tensor_file
from simpletuner.commands.convert import SUFFIXES, read_pickle
from simpletuner.config.paths import ADAPTER_FILES
from simpletuner.config.yaml_reader import YamlDocument, read_yaml
from simpletuner.errors import ConfigError, DataError, Problem

if TYPE_CHECKING:
    from torch import Tensor

LORA_FILE, FULL_FILE = "pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"
_ARCHITECTURE = "model.arch_opt."


def convert_checkpoint(config_path: Path, model_path: Path, save_path: Path, say: Callable[[str], None]) -> Path:
    """Write the folder; returns it.

    Args:
        config_path: the options file of the run.
        model_path: a weights file of OmniGen2's program, or any path inside of a checkpoint of this one.
        save_path: for `pytorch_lora_weights.safetensors`, or a denoiser as `from_pretrained` loads it.

    Raises:
        ConfigError: a path that leads nowhere, or a folder that has such files already.
        DataError: the weights are damaged or do not fit the options.
    """
    document = read_yaml(config_path)
    checkpoint = own_checkpoint(model_path)
    weights = None if checkpoint is None else _weights_in(checkpoint)
    if weights is not None and weights.parent.resolve() == save_path.resolve():
        say(f"{save_path} is part of a checkpoint of this program, which needs no conversion")
        return save_path
    if there := [name for name in (LORA_FILE, FULL_FILE) if (save_path / name).exists()]:
        raise ConfigError(Problem(f"{save_path} has {there[0]} already", key="--save_path", fix="name another folder"))
    if weights is not None:
        say(f"{model_path} is in {checkpoint}, a checkpoint of this program: {weights} is taken")
        return _copied(weights, save_path)
    if model_path.suffix.lower() not in (*SUFFIXES, ".safetensors") or not model_path.is_file():
        message = f"there is no weights file {model_path}, and it is in no checkpoint of this program"
        raise ConfigError(Problem(message, key="--model_path", allowed=f"{', '.join(SUFFIXES)}, .safetensors"))
    tensors = _tensors(model_path)
    is_lora = any(".lora_" in name for name in tensors)
    if bool(document.values.get("train.lora_ft")) != is_lora:
        held = "a LoRA" if is_lora else "no LoRA"
        message = f"{model_path} holds {held}"
        raise ConfigError(document.problem("train.lora_ft", message, fix="name the options file of this run"))
    return (
        _write_lora(tensors, document, save_path) if is_lora else _write_full(tensors, document, save_path, model_path)
    )


def own_checkpoint(path: Path) -> Path | None:
    """The checkpoint of this program that a path is, or leads into, whether or not its last part exists."""
    for place in (path, *path.parents):
        if place.is_dir() and not storage.verify_dir(place, full=False):
            return place
    return None


def _weights_in(checkpoint: Path) -> Path:
    """The weights that a checkpoint holds: of a LoRA, or of a whole denoiser in a folder of its own.

    Raises:
        DataError: it holds neither.
    """
    places = [checkpoint / name for name in ADAPTER_FILES] + sorted(checkpoint.glob(f"*/{FULL_FILE}"))
    found = next((path for path in (*places, checkpoint / FULL_FILE) if path.is_file()), None)
    if found is None:
        message = f"{checkpoint} holds neither {LORA_FILE} nor {FULL_FILE}"
        raise DataError(Problem(message, key="--model_path", fix="use simpletuner export for its adapter"))
    return found


def _copied(weights: Path, save_path: Path) -> Path:
    files = {LORA_FILE: weights}
    if weights.name == FULL_FILE:
        files = {FULL_FILE: weights, "config.json": weights.parent / "config.json"}
    save_path.mkdir(parents=True, exist_ok=True)
    for name, source in files.items():
        with storage.replacing_file(save_path / name) as temporary:
            shutil.copyfile(source, temporary)
    return save_path


def _tensors(path: Path) -> dict[str, Tensor]:
    return read_tensor_file(path)[0] if path.suffix == ".safetensors" else read_pickle(path)


def _write_lora(tensors: dict[str, Tensor], document: YamlDocument, save_path: Path) -> Path:
    """The adapter alone; its scale is 1, since OmniGen2's program sets alpha to the rank."""
    found = {
        f"transformer.{name.replace('.default.', '.')}": tensor for name, tensor in tensors.items() if ".lora_" in name
    }
    ranks = {tensor.shape[0] for name, tensor in found.items() if name.endswith("lora_A.weight")}
    rank = document.values.get("train.lora_rank")
    if ranks != {rank}:
        held = ", ".join(map(str, sorted(ranks)))
        raise DataError(document.problem("train.lora_rank", f"the checkpoint's LoRA has rank {held}, not {rank}"))
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted({_module(name) for name in found})}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in settings.items()})}
    save_path.mkdir(parents=True, exist_ok=True)
    storage.save_tensors(save_path / LORA_FILE, found, {"format": "pt", **metadata})
    return save_path


def _module(name: str) -> str:
    return name.removeprefix("transformer.").partition(".lora_")[0]


def _write_full(tensors: dict[str, Tensor], document: YamlDocument, save_path: Path, file: Path) -> Path:
    """The denoiser as `arch_opt` builds it; every tensor must be there and fit."""
    import torch

    from simpletuner.families.registry import get_spec
    from simpletuner.importing import import_class

    options: dict[str, Any] = {
        key.removeprefix(_ARCHITECTURE): value
        for key, value in document.values.items()
        if key.startswith(_ARCHITECTURE)
    }
    try:
        with torch.device("meta"):
            denoiser = import_class(get_spec("omnigen2").component("denoiser").class_name)(**options)
    except TypeError as error:
        raise ConfigError(document.problem("model.arch_opt", f"cannot be used: {error}")) from error
    try:
        denoiser.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        message = f"does not match model.arch_opt: {' '.join(str(error).split())[:400]}"
        raise DataError(Problem(message, file=str(file), fix="name the options file of this run")) from error
    denoiser.save_pretrained(save_path)
    return save_path
