"""Loading the parts of a model from files that strangers wrote: tensors and JSON, never a program.

A pickle (`.bin`, `.pt`, `.ckpt`) may run anything when it is opened. The libraries that load models fall back on them
in more ways than one: where an index of shards names them, or an adapter lies beside the weights. Here each of these
is refused by name, and while something is loaded `torch.load` itself is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simpletuner.errors import DataError, Problem
from simpletuner.text import NotText, decode, read_file, read_json_text

# Of a JSON file of a model: a tokenizer of 250,000 words has 20 MB.
MAX_JSON_BYTES = 200_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CONVERT = "only safetensors are read, a pickle may run a program; to turn one into them: simpletuner convert FILE"
_ADAPTER = "adapter_config.json"
_KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_closing = threading.RLock()


def load_errors() -> tuple[type[Exception], ...]:
    """What the libraries raise on files that are damaged or do not fit; there is no common base class."""
    from safetensors import SafetensorError

    return (
        *(SafetensorError, OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError),
        *(AssertionError, ArithmeticError, ImportError),
    )


def load_pretrained(cls: Any, where: str | Path, subfolder: str | None = None, **options: Any) -> Any:
    """`cls.from_pretrained` of diffusers or transformers, from safetensors alone and without code of the model's own.

    Raises:
        ValueError: there is something else than safetensors in the way.
        Exception: one of `load_errors`.
    """
    folder = Path(where, subfolder) if subfolder else Path(where)
    if folder.is_dir():
        check_folder(folder)
    if subfolder:
        options["subfolder"] = subfolder
    with without_pickles():
        return cls.from_pretrained(where, use_safetensors=True, **options)


def load_tokenizer(cls: Any, folder: str | Path) -> Any:
    """A tokenizer or processor; one that brings its own code is refused, and nobody is asked.

    Raises:
        Exception: one of `load_errors`.
    """
    try:
        with without_pickles():
            return cls.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # what is written in Rust raises no other kind on a damaged file
        raise ValueError(str(error)) from error


def check_folder(folder: Path) -> None:
    """Look at what a folder of weights would make its library load.

    Raises:
        ValueError: a shard that is not a safetensors file or lies elsewhere, an adapter, or kernels from the hub.
    """
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        shard_names(index)
    if (folder / _ADAPTER).is_file():
        raise ValueError(f"{_ADAPTER} beside the weights would load an adapter with them; move it away")
    config = folder / "config.json"
    settings = read_object(config) if config.is_file() else {}
    for key in _KERNEL_KEYS:
        if "/" in str(settings.get(key) or ""):
            raise ValueError(f'"{key}" in config.json names a program on the hub; remove it')


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names, each once.

    Raises:
        ValueError: one is no safetensors file, or does not lie beside the index.
    """
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index.name} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not name.endswith(".safetensors"):
            raise ValueError(f'{index.name} names "{name}": {CONVERT}')
        if Path(name).name != name or "\\" in name:
            raise ValueError(f'{index.name} names "{name}", which does not lie beside it')
    return names


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model.

    Raises:
        DataError: it cannot be read, is very large, or holds something else.
    """
    try:
        value = read_json_text(decode(read_file(path, MAX_JSON_BYTES)), finite=False)
        if not isinstance(value, dict):
            raise ValueError("holds no JSON object")
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror or error}") from error
    except NotText as error:
        raise _unreadable(path, str(error)) from error
    except ValueError as error:
        raise _unreadable(path, f"is damaged: {error}") from error
    return value


def _unreadable(path: Path, what: str) -> DataError:
    fix = "fetch this file of the model again"
    return DataError(Problem(what, key="pretrained_model_name_or_path", file=str(path), fix=fix))


@contextmanager
def without_pickles() -> Iterator[None]:
    """Nothing that runs inside opens a pickle through torch, whatever a library falls back on.

    Raises:
        ValueError: something tried to.
    """
    import torch

    refused: list[str] = []

    def refuse(file: Any, *_: Any, **__: Any) -> Any:
        refused.append(str(file))
        raise ValueError(f"{file} is not a safetensors file")

    with _closing:
        opened = torch.load
        setattr(torch, "load", refuse)  # noqa: B010 - torch's own has another signature
        try:
            yield
        except Exception as error:
            if refused:
                raise ValueError(f"{refused[0]}: {CONVERT}") from error
            raise
        finally:
            torch.load = opened
