"""Where a model's parts are, and loading one of them. Shared by all families.

A model is a folder in diffusers layout or a hub id. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simpletuner.config.paths import PREVIEW_FOLDER, SINGLE_FILE, WITHOUT, looks_like_path
from simpletuner.errors import DataError, Problem
from simpletuner.families.keys import KeyTable
from simpletuner.families.registry import all_specs
from simpletuner.families.spec import Component, FamilySpec
from simpletuner.importing import import_class
from simpletuner.models.hub_connectivity import hub_failures, why_missing
from simpletuner.models.safe_loading import load_errors, load_pretrained, read_object
from simpletuner.models.single_file import (
    as_folder,
    dtype_in_file,
    find_denoiser,
    is_in_file,
    load_from_file,
)
from simpletuner.spelling import nearest
from simpletuner.text import without_login

if TYPE_CHECKING:
    import torch
    from diffusers.models.modeling_utils import ModelMixin
    from torch import nn


MODEL_KEY, VAE_KEY = "pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"
FILE_KEY, ENCODERS_KEY = "pretrained_transformer_model_name_or_path", "text_encoder_paths"
_TEXT = ("text_encoder", "tokenizer")
# Files that the configuration of their part lies beside.
_NAMES_IN_FOLDER = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """A model folder or hub id, and the options that choose within it.

    Args:
        model: folder or hub id (`pretrained_model_name_or_path`).
        vae: file, folder or hub id of another VAE (`pretrained_vae_model_name_or_path`), or None.
        revision: hub revision.
        variant: weight file variant (`fp16`).
        file: a single `.safetensors` file; what it holds is taken from it, all else from `model`.
        denoiser: folder of another denoiser, with its `config.json`, or None.
        encoders: text encoder -> its own file or folder (`text_encoder_paths`), or `WITHOUT`.
        file_key: the option that names `file`.
    """

    model: str
    vae: str | None = None
    revision: str | None = None
    variant: str | None = None
    file: str | None = None
    denoiser: str | None = None
    encoders: Mapping[str, str] = field(default_factory=dict)
    file_key: str = FILE_KEY

    @property
    def is_local(self) -> bool:
        return Path(self.model).is_dir()

    def lacks(self, name: str) -> bool:
        """Whether the run does without this part."""
        return self.encoders.get(name) == WITHOUT

    def parts(self, spec: FamilySpec) -> list[Component]:
        """The components that the run uses: all but an encoder that it does without, and its tokenizer."""
        missing = {name.replace("text_encoder", kind) for name in self.encoders if self.lacks(name) for kind in _TEXT}
        return [component for component in spec.components if component.name not in missing]

    def own_place(self, component: Component) -> str | None:
        """The file, folder or hub id that a part comes from in place of the model."""
        if component.role == "text_encoder":
            return self.encoders.get(component.name)
        return {"vae": self.vae, "denoiser": self.denoiser}.get(component.role)

    def file_of(self, component: Component) -> str | None:
        """The single file that holds a part; None where it has a folder.

        Raises:
            DataError: the file is not there, or no safetensors file.
        """
        if own := self.own_place(component):
            return own if own.endswith(SINGLE_FILE) else None
        return self.file if self.file and is_in_file(self.file, component) else None

    def key_of(self, component: Component) -> str:
        """The option that says where a part comes from."""
        if self.own_place(component) and component.role in ("vae", "text_encoder"):
            return VAE_KEY if component.role == "vae" else ENCODERS_KEY
        return self.file_key if self.file_of(component) else MODEL_KEY


@contextmanager
def naming(key: str) -> Iterator[None]:
    """What is wrong with a file inside is said of this option."""
    try:
        yield
    except DataError as error:
        raise DataError([replace(problem, key=key) for problem in error.problems]) from error.__cause__


class ComponentConfig(dict[str, Any]):
    """A JSON configuration in which a key that the family needs and that is not there is a fault of the model."""

    def __init__(self, path: Path) -> None:
        super().__init__(read_object(path))
        self._path = path

    def __missing__(self, key: str) -> Any:
        message = f"{self._path} has no {key}, so it does not belong to a model of this family"
        fix = "name a model of the family, or correct model_family"
        raise DataError(Problem(message, key=MODEL_KEY, fix=fix))


def component_config(source: ModelSource, component: Component) -> dict[str, Any]:
    """The JSON configuration of a component, without loading weights."""
    return ComponentConfig(component_file(source, component, component.config_file))


def model_index(source: ModelSource) -> dict[str, Any]:
    """`model_index.json`: what a whole model says of itself; empty for a local folder without one.

    Raises:
        DataError: it cannot be fetched.
    """
    path = Path(source.model) / "model_index.json"
    if not source.is_local:
        path = fetch(source.model, path.name, source.revision, MODEL_KEY)
    return read_object(path) if path.is_file() else {}


def component_file(source: ModelSource, component: Component, name: str) -> Path:
    """Path of one file of a component; fetched from the hub where the model is a hub id.

    Raises:
        DataError: the file is not there or cannot be fetched.
    """
    own = source.own_place(component)
    if own and own.endswith(SINGLE_FILE):
        beside = Path(own).with_name(name)
        if Path(own).name in _NAMES_IN_FOLDER and beside.is_file():
            return beside
    elif own:
        if component.role == "vae":
            return other_vae_file(own, component, name)
        is_on_hub = component.role == "text_encoder" and not Path(own).is_dir() and not looks_like_path(own)
        return fetch(own, name, None, ENCODERS_KEY) if is_on_hub else Path(own) / name
    if source.is_local:
        return Path(source.model) / component.name / name
    return fetch(source.model, f"{component.name}/{name}", source.revision, MODEL_KEY)


def component_folder(source: ModelSource, component: Component) -> Path:
    """The folder of a component with all its files; for small parts (tokenizers), since a hub's are all fetched.

    Raises:
        DataError: the files cannot be fetched.
    """
    if source.is_local:
        return Path(source.model) / component.name
    from huggingface_hub import snapshot_download

    try:
        patterns = [f"{component.name}/*"]
        return Path(snapshot_download(source.model, revision=source.revision, allow_patterns=patterns)) / component.name
    except hub_failures() as error:
        raise _not_fetched(component.name, source.model, MODEL_KEY, error) from error


def save_model_folder(
    source: ModelSource, spec: FamilySpec, denoiser: nn.Module, scheduler_config: Mapping[str, Any], folder: Path
) -> None:
    """Write a whole model in diffusers layout: this denoiser, and every other part as it is in `source`.

    Args:
        scheduler_config: of the family; a single file may say another one than the folder beside it.

    Raises:
        DataError: a part cannot be fetched, or read from a single file.
    """
    for component in source.parts(spec):
        if component.role == "denoiser":
            cast("ModelMixin", denoiser).save_pretrained(folder / component.name)
        elif (file := source.file_of(component)) is not None:
            dtype = dtype_in_file(file, component)
            load_component(source, component, dtype).save_pretrained(folder / component.name)  # type: ignore[operator]
        elif source.own_place(component):
            shutil.copytree(component_file(source, component, component.config_file).parent, folder / component.name)
        else:
            shutil.copytree(component_folder(source, component), folder / component.name)
        if component.role == "scheduler":
            (folder / component.name / component.config_file).write_text(json.dumps(scheduler_config, indent=2))
    if (own := Path(source.model) / PREVIEW_FOLDER).is_dir():
        shutil.copytree(own, folder / PREVIEW_FOLDER)
    classes: dict[str, Any] = {component.name: component.index_entry for component in source.parts(spec)}
    # The classes by the names that the model itself has for them: other programs look for these.
    index_of_model = model_index(source).items()
    kept = {key: value for key, value in index_of_model if not isinstance(value, list) or key in classes}
    absent = {component.name: [None, None] for component in spec.components if component.name not in classes}
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": spec.pipeline_class, **classes, **absent, **kept}, indent=2)
    )


def other_vae_file(vae: str, component: Component, name: str) -> Path:
    """A file of `pretrained_vae_model_name_or_path`: a VAE's own folder or repository, or a whole model's."""
    if Path(vae).is_dir():
        root = Path(vae)
        return root / name if (root / component.config_file).is_file() else root / component.name / name
    return fetch(vae, name, None, VAE_KEY)


def fetch(repository: str, name: str, revision: str | None, key: str) -> Path:
    """Download one file from the hub, or find it in the local hub cache.

    Raises:
        DataError: it is not there or cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    if (reason := why_missing(repository, name, revision)) is not None:
        raise _not_fetched(name, repository, key, ConnectionError(reason))
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except hub_failures() as error:
        raise _not_fetched(name, repository, key, error) from error


def _not_fetched(name: str, repository: str, key: str, error: Exception) -> DataError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    reason = " ".join(without_login(str(error)).split())
    fix = "check the connection and HF_ENDPOINT, or give a model folder; what was fetched before is used without it"
    if isinstance(error, GatedRepoError):
        reason = "its owner must grant you access"
        fix = f"accept the license on https://huggingface.co/{repository}, then log in: hf auth login"
    elif isinstance(error, RepositoryNotFoundError):
        reason, fix = (
            "there is no such model on the hub, or it is private",
            "correct the name, or log in: hf auth login",
        )
    elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        reason, fix = "the model is there and has no such file", "name a model in diffusers layout, with safetensors"
    near = None if isinstance(error, GatedRepoError) else nearest_hub_id(repository)
    if near is not None:
        fix = f'did you mean "{near}"? Otherwise {fix}'
    return DataError(Problem(f"cannot fetch {name} of {repository}: {reason}", key=key, fix=fix))


def nearest_hub_id(model: str) -> str | None:
    """The published checkpoint whose hub id is almost `model`; None where it is one, or none is near."""
    known = [flavour.hub_id for spec in all_specs()[0] for flavour in spec.flavours.values()]
    return None if model in known else nearest(model, known)


def make_empty_component(source: ModelSource, component: Component, dtype: torch.dtype) -> nn.Module:
    """One part from its configuration alone, on the `meta` device: shapes without values.

    Raises:
        DataError: the configuration is missing or cannot be fetched.
    """
    import torch

    cls = import_class(component.class_name)
    config = component_config(source, component)
    with torch.device("meta"):
        model = cls.from_config(config)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model.eval().requires_grad_(False)


def load_component(
    source: ModelSource, component: Component, dtype: torch.dtype, keys: KeyTable | None = None
) -> nn.Module:
    """Load one part with its public class, in `dtype`.

    Args:
        keys: of the denoiser, which a single file has under other names.

    Raises:
        DataError: the weights are missing, damaged, or do not fit the configuration.
    """
    cls = import_class(component.class_name)
    file = source.file_of(component)
    if file is not None and not (component.role == "text_encoder" and source.own_place(component)):
        config_file = component_file(source, component, component.config_file)
        with naming(source.key_of(component)):
            return load_from_file(file, component, cls, dtype, keys, config_file)
    where: str | Path = source.model
    options: dict[str, Any] = {"subfolder": component.name, "revision": source.revision, "variant": source.variant}
    if own := source.own_place(component):
        where, options = own, {}
        if Path(own).is_dir():
            where = component_file(source, component, component.config_file).parent
    # transformers draws weights that a file lacks at random; what is loaded here must be what was published.
    is_encoder = component.role == "text_encoder"
    try:
        if not is_encoder:
            return load_pretrained(cls, where, torch_dtype=dtype, **options)
        options |= {"output_loading_info": True, **component.load_options}
        if component.attention:
            options["attn_implementation"] = component.attention
        own_config = component_file(source, component, component.config_file) if file else None
        with as_folder(where, own_config) as folder:
            model, report = load_pretrained(cls, folder, dtype=dtype, **options)
        if report["missing_keys"]:
            raise ValueError(f"the weights lack {', '.join(sorted(report['missing_keys'])[:3])}")
        return model
    except load_errors() as error:
        raise DataError(
            Problem(
                f"cannot load {component.name} of {where}: {error}",
                key=source.key_of(component),
                allowed="a diffusers folder or hub id with safetensors weights",
            )
        ) from error


def check_denoiser_file(source: ModelSource, spec: FamilySpec) -> None:
    """Whether a single file holds this denoiser, by the names and shapes in its header.

    Raises:
        DataError: a tensor is missing or has another shape, or the file holds some that belong nowhere.
    """
    import torch

    if source.file is None:
        return
    component = spec.component("denoiser")
    denoiser = make_empty_component(source, component, torch.float32)
    shapes = {name: tensor.shape for name, tensor in denoiser.state_dict().items()}
    with naming(source.file_key):
        find_denoiser(source.file, shapes, spec.keys)


def load_preview_decoder(source: ModelSource, spec: FamilySpec) -> nn.Module:
    """The tiny autoencoder that shows latents at a glance: the model folder's own, else the family's, in float32.

    Raises:
        DataError: there is none, or it cannot be loaded.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    own = Path(source.model) / PREVIEW_FOLDER
    where = str(own) if (own / "config.json").is_file() else spec.preview_decoder
    if where is None:
        raise DataError(Problem(f"there is no tiny autoencoder for {spec.title}", key="validation_preview"))
    if not Path(where).is_dir():
        fetch(where, "config.json", None, "validation_preview")
    try:
        return load_pretrained(AutoencoderTiny, where, torch_dtype=torch.float32)
    except load_errors() as error:
        raise DataError(
            Problem(
                f"cannot load the tiny autoencoder {where}: {error}",
                key="validation_preview",
                fix="check the connection, or set validation_preview to false",
            )
        ) from error
