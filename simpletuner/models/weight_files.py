"""The safetensors files of a component, and single tensors out of them, without loading the component."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import Component
from simpletuner.models.components import ModelSource, component_file
from simpletuner.models.safe_loading import shard_names

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(source: ModelSource, component: Component, names: Sequence[str]) -> dict[str, Tensor]:
    """Name -> tensor, in the order of `names`, out of the weights of a component; nothing else of them is read.

    Raises:
        DataError: a name is in none of the files, or they are damaged or cannot be fetched.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Tensor] = {}
    paths = weight_files(source, component)
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unfit(path, f"{path.name} cannot be read: {error}", source.key_of(component)) from error
    if missing := [name for name in names if name not in found]:
        raise _unfit(paths[0], f"the weights of {component.name} have no {missing[0]}", source.key_of(component))
    return {name: found[name] for name in names}


def _unfit(path: Path, message: str, key: str) -> DataError:
    return DataError(
        Problem(
            message,
            key=key,
            file=str(path),
            allowed="the safetensors files that the model was published with",
            fix="fetch this file of the model again",
        )
    )


def weight_files(source: ModelSource, component: Component) -> list[Path]:
    """The safetensors files that a component is loaded from.

    Raises:
        DataError: there are none.
    """
    if (file := source.file_of(component)) is not None:
        return [Path(file)]
    variant = f".{source.variant}" if source.variant else ""
    stem = ("model" if component.role == "text_encoder" else "diffusion_pytorch_model") + variant
    own = source.own_place(component)
    if Path(own).is_dir() if own else source.is_local:
        whole = component_file(source, component, f"{stem}.safetensors")
        files = [whole] if whole.is_file() else sorted(whole.parent.glob("*.safetensors"))
    else:
        files = _fetched_weights(source, component, stem)
        whole = files[0]
    if not files:
        raise DataError(
            Problem(
                f"{whole.parent} holds no safetensors weights",
                key=source.key_of(component),
                allowed="a component folder with *.safetensors",
                fix="complete the folder, or name another model",
            )
        )
    return files


def _fetched_weights(source: ModelSource, component: Component, stem: str) -> list[Path]:
    """The weights of a component of a hub repository: one file, or those that its index names."""
    try:
        return [component_file(source, component, f"{stem}.safetensors")]
    except DataError:
        name, _, variant = stem.partition(".")
        index = f"{name}.safetensors.index{f'.{variant}' if variant else ''}.json"
        return [component_file(source, component, shard) for shard in _shards(component_file(source, component, index))]


def _shards(index: Path) -> list[str]:
    try:
        return shard_names(index)
    except ValueError as error:
        raise DataError(Problem(str(error), key="pretrained_model_name_or_path", file=str(index))) from error
