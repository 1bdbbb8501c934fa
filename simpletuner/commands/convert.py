"""`simpletuner convert`: the tensors of a pickle (`.bin`, `.pt`, `.pth`, `.ckpt`) as a safetensors file.

The one place where a pickle is opened, and only the file that was named: torch reads tensors and plain containers out
of it, and refuses everything that would run.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import storage
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.models.safe_loading import PICKLES
from simpletuner.text import printable

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = PICKLES
# Where checkpoints of other programs keep their weights, beside what they need to train on.
_INNER = ("state_dict", "model", "module", "params")


def convert(source: Path, output: Path | None, alpha: float | None = None) -> Path:
    """Write the tensors of `source` to `output`, by default beside it; an existing file is never replaced.

    Args:
        alpha: of a LoRA that does not say its own; the file then has it beside each layer's weights.

    Raises:
        ConfigError: it does not exist, the output already exists, or `alpha` belongs to nothing in it.
        DataError: it is damaged, holds more than tensors, or cannot be written.
    """
    from safetensors.torch import save_file

    if source.suffix.lower() not in SUFFIXES or not source.is_file():
        message = f"{source} does not exist"
        raise ConfigError(Problem(message, allowed=f"a file that ends with {', '.join(SUFFIXES)}"))
    output = output or source.with_suffix(".safetensors")
    if output.suffix != ".safetensors" or output.exists():
        message = "already exists" if output.exists() else "does not end with .safetensors"
        raise ConfigError(Problem(f"{output} {message}", key="--output", fix="name another file"))
    tensors = read_pickle(source)
    if alpha is not None:
        tensors |= _alphas(tensors, alpha)
    with storage.replacing_file(output) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    return output


def convert_folder(folder: Path) -> int:
    """Write the tensors of every pickle in a folder and those below it, each beside it, as `convert` does.

    What was converted before stays, so that a command that was killed continues.

    Returns:
        files written.

    Raises:
        ConfigError: there does not exist in it.
        DataError: as `convert`.
    """
    sources = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not sources:
        raise ConfigError(
            Problem(f"{folder} contains no such file", allowed=f"files that end with {', '.join(SUFFIXES)}")
        )
    left = [path for path in sources if not path.with_suffix(".safetensors").exists()]
    for path in left:
        convert(path, None)
    return len(left)


def _alphas(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    import torch

    layers = [key.partition(".lora_A.")[0] for key in tensors if ".lora_A." in key]
    if not layers or any(key.endswith(".alpha") for key in tensors):
        message = "has alpha already" if layers else "holds no LoRA of PEFT's names (lora_A)"
        raise ConfigError(Problem(f"the file {message}", key="--alpha", fix="leave it out"))
    return {f"{layer}.alpha": torch.tensor(alpha) for layer in layers}


def read_pickle(source: Path) -> dict[str, Tensor]:
    """The tensors of a pickle by name; nothing else in it is made, and nothing runs.

    Raises:
        DataError: it is damaged, or holds more than tensors, or none.
    """
    import torch

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Of torch's text only what was found: the rest is advice to run the file all the same.
        found = " ".join(str(error).split()).partition("WeightsUnpickler error: ")[2].partition(" by default")[0]
        reason = printable(found[:300]) or "an object that is not a tensor"
        raise _refused(source, f"contains more than tensors, and none of it was run: {reason}") from error
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError) as error:
        raise _refused(source, f"cannot be read: {printable(' '.join(str(error).split())[:300])}") from error
    tensors = _tensors(content)
    if not tensors:
        raise _refused(source, "contains no named tensors")
    return tensors


def _tensors(content: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(content, torch.Tensor):  # a file that is one tensor, as embeddings are kept
        content = {"tensor": content}
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in _INNER if isinstance(content.get(key), Mapping)), content)
    named = {str(key): value for key, value in inner.items() if isinstance(value, torch.Tensor)}
    # Tensors that share memory would be refused; each is written whole.
    return {key: value.detach().contiguous().clone() for key, value in named.items()}


def _refused(source: Path, what: str) -> DataError:
    return DataError(Problem(f"{source} {what}", fix="get the weights as safetensors from whoever made them"))
