"""Weights in one file, as ComfyUI, A1111 and the original releases keep them.

The denoiser is read by the family's key table, which is the one that adapter files are written by; autoencoder and CLIP
encoders by diffusers' own conversion. Everything that such a file lacks (configurations, tokenizers, other parts) comes
from a model folder or the hub.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.errors import DataError, Problem, shape_text
from simpletuner.families.keys import KeyTable
from simpletuner.families.spec import Component
from simpletuner.models.safe_loading import load_errors, read_object, without_pickles

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# In front of the denoiser's names; a file of the denoiser alone may have none.
DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_BLOCK = re.compile(r"(.*?)\.(\d+)\.")  # a list of blocks, and a number in it


def is_in_file(path: str, component: Component) -> bool:
    """Whether a single file holds this part; the denoiser always is.

    Raises:
        DataError: the file is not there, or no safetensors file.
    """
    if component.role == "denoiser":
        return True
    if not component.in_file:
        return False
    return any(key.startswith(component.in_file) for key in names_in_file(path))


def names_in_file(path: str) -> set[str]:
    """The names of all tensors, without reading them.

    Raises:
        DataError: the file is not there, or no safetensors file.
    """
    with _opened(path) as file:
        return set(file.keys())


def dtype_in_file(path: str, component: Component) -> torch.dtype:
    """The number format in which a single file holds a part that is in it."""
    with _opened(path) as file:
        names = sorted(file.keys(), key=lambda name: not name.startswith(component.in_file))
        return file.get_tensor(names[0]).dtype


# Empty tensors of files whose weights know the noise levels of EDM (arXiv 2206.00364): CosXL and Playground 2.5.
_EDM_MARKS = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")


def refused_marks(path: str) -> list[str]:
    """Empty tensors by which a file says that its weights were trained with noise that no family here makes.

    Raises:
        DataError: the file is not there, or no safetensors file.
    """
    names = names_in_file(path)
    return [mark for mark in _EDM_MARKS if mark in names]


def objective_marks(path: str) -> dict[str, Any]:
    """What a file says by empty tensors of its weights, in the words of `scheduler_config.json`.

    Source: the releases of NoobAI XL and others that predict v, without a signal at the last level.
    """
    names = names_in_file(path)
    v = {"prediction_type": "v_prediction"} if "v_pred" in names else {}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {}
    return {**v, **zero}


def load_from_file(
    path: str,
    component: Component,
    cls: Any,
    dtype: torch.dtype,
    keys: KeyTable | None,
    config_file: Path,
) -> nn.Module:
    """One part out of a single file, in `dtype`.

    Args:
        keys: of the denoiser.
        config_file: of the part.

    Raises:
        DataError: tensors are missing, left over, or do not fit the configuration.
    """
    try:
        if component.role == "denoiser":
            assert keys is not None, "the denoiser's names are the family's"
            return _load_denoiser(path, cls, keys, dtype, read_object(config_file))
        if component.role == "vae":
            with without_pickles():
                return cls.from_single_file(path, config=str(config_file.parent), torch_dtype=dtype)
        return _load_encoder(path, component, cls, dtype, config_file)
    except load_errors() as error:
        raise _unfit(path, f"{component.name} cannot be read from it: {error}") from error


def _load_denoiser(path: str, cls: Any, keys: KeyTable, dtype: torch.dtype, config: Mapping[str, Any]) -> nn.Module:
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = cls.from_config(dict(config))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    places = find_denoiser(path, shapes, keys)
    with _opened(path) as file:
        model.load_state_dict({name: place.read(file).to(dtype) for name, place in places.items()}, assign=True)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Place:
    """Where a tensor of the denoiser is in a single file.

    Args:
        key: its name there.
        shape: of the tensor.
        rows: those of a joined matrix; None where it stands by itself.
        swaps_halves: its halves stand there in the other order.
    """

    key: str
    shape: torch.Size
    rows: slice | None
    swaps_halves: bool

    def read(self, file: Any) -> Tensor:
        """The tensor as the denoiser has it."""
        import torch

        tensor = file.get_tensor(self.key) if self.rows is None else file.get_slice(self.key)[self.rows]
        if self.swaps_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(self.shape)


def find_denoiser(path: str, shapes: Mapping[str, torch.Size], keys: KeyTable) -> dict[str, Place]:
    """Where each tensor of a denoiser is in a single file, by its header alone.

    Args:
        shapes: of the denoiser's tensors by their names.

    Raises:
        DataError: a tensor is missing or has another shape, or the file holds some that belong nowhere.
    """
    with _opened(path) as file:
        sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    keys = keys.of_files.in_model(shapes)
    prefix = next((each for each in DENOISER_PREFIXES if any(name.startswith(each) for name in sizes)), "")
    unused = tuple(f"{prefix}{name}." for name in keys.unused)
    left = {name for name in sizes if name.startswith(prefix) and not f"{name}.".startswith(unused)}
    places = {}
    for name, shape in shapes.items():
        module, _, kind = name.rpartition(".")
        found = keys.original(module)
        # Norms of some releases call their weight a scale; a file in diffusers' own names is read too.
        wanted = [f"{prefix}{found.name}.{kind}", f"{prefix}{found.name}.scale", f"{prefix}{name}"]
        wanted += [prefix + keys.original(name).name]  # a tensor that a table names, not its module
        key = next((each for each in wanted if each in sizes), None)
        if key is None:
            also = "" if wanted[0].lstrip(".") == name else f", which is {name} in diffusers' names"
            raise _unfit(path, f"it has no {wanted[0].lstrip('.')}{also}")
        left.discard(key)
        size, rows = sizes[key], None
        if key != wanted[2] and found.parts != (module,):
            heights = [shapes[f"{part}.{kind}"][0] for part in found.parts]
            start = sum(heights[: found.parts.index(module)])
            rows = slice(start, start + shape[0])
            size = (max(0, min(size[0], rows.stop) - start), *size[1:])
        # Rows of a matrix that a table names as a tensor may stand one after the other.
        is_flat = key == wanted[3] and prod(size) == shape.numel()
        if size != tuple(shape) and not is_flat:
            expected = f"the configuration of the denoiser expects {shape_text(shape)}"
            raise _unfit(path, f"{key} has the shape {shape_text(size)}, and {expected}")
        places[name] = Place(key, shape, rows, found.swaps_halves and key != wanted[2])
    # Without a prefix, parts that are not the denoiser's may stand beside it: only its own blocks are counted.
    if not prefix:
        left = _of_further_blocks(left, set(sizes))
    if left:
        raise _unfit(path, f"{len(left)} tensors belong nowhere, the first is {min(left)}")
    return places


def _of_further_blocks(left: set[str], there: set[str]) -> set[str]:
    """Tensors of blocks of which none was taken, in lists of which others were: the file is of a deeper network."""
    taken = {found.group(1, 2) for key in there - left if (found := _BLOCK.match(key))}
    lists = {name for name, _ in taken}
    blocks = {key: found.group(1, 2) for key in left if (found := _BLOCK.match(key))}
    return {key for key, block in blocks.items() if block[0] in lists and block not in taken}


def _load_encoder(path: str, component: Component, cls: Any, dtype: torch.dtype, config_file: Path) -> nn.Module:
    """A text encoder out of a file of a whole model, by diffusers' own conversion: CLIP's, or that of T5."""
    from diffusers.loaders import single_file_utils
    from safetensors.torch import load_file

    tensors = {key: tensor for key, tensor in load_file(path).items() if key.startswith(component.in_file)}
    is_clip = component.class_name.rpartition(".")[2].startswith("CLIP")
    kind = "clip_model_from_ldm" if is_clip else "t5_model_from_checkpoint"
    create = getattr(single_file_utils, f"create_diffusers_{kind}")
    with without_pickles():
        model = create(cls, tensors, "", str(config_file.parent), dtype, local_files_only=True)
    model.tie_weights()
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise _unfit(path, f"{component.name} lacks {', '.join(missing[:3])}")
    return model


@contextmanager
def as_folder(where: str | Path, config_file: Path | None) -> Iterator[str | Path]:
    """The folder, or a file as one beside its configuration: so a library reads a file of any name.

    Args:
        where: a file where `config_file` is given.
    """
    if config_file is None:
        yield where
        return
    with tempfile.TemporaryDirectory(prefix="simpletuner-part-") as folder:
        Path(folder, "model.safetensors").symlink_to(Path(where).absolute())
        Path(folder, config_file.name).symlink_to(config_file.absolute())
        yield folder


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise _unfit(path, f"it cannot be read: {error}") from error


def _unfit(path: str, what: str) -> DataError:
    return DataError(
        Problem(
            f"the single file cannot be used: {what}",
            key="pretrained_model_name_or_path",
            file=path,
            allowed="a .safetensors file of this family, in the layout of its release or of diffusers",
        )
    )
