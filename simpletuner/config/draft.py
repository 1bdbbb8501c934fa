"""A run whose values are typed and whose paths are resolved, before the rules across keys have judged it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from simpletuner.config.dataset_loading import LoadedDatasets
from simpletuner.config.datasets import ConditioningDataset, Dataset, ImageDataset
from simpletuner.config.layers import Origin
from simpletuner.config.lycoris import Adaptable
from simpletuner.config.options import TrainConfig
from simpletuner.config.paths import Folders
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.errors import Problem


class FamilyFacts(Protocol):
    """What the configuration asks of a family; `models.spec.FamilySpec` has it."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def flavours(self) -> Mapping[str, Any]: ...
    @property
    def max_size(self) -> int | None: ...
    @property
    def size_multiple(self) -> int: ...
    @property
    def adaptable(self) -> tuple[Adaptable, ...]: ...
    @property
    def class_aliases(self) -> Mapping[str, str]: ...
    @property
    def block_classes(self) -> tuple[str, ...]: ...
    @property
    def target_groups(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def default_lora_targets(self) -> tuple[str, ...]: ...
    @property
    def defaults(self) -> Mapping[str, Any]: ...
    def defaults_for(self, flavour: str | None) -> Mapping[str, Any]: ...
    def default_form(self, kind: str) -> str: ...
    def read_by(self, form: str, kind: str, paths: Sequence[str] = ()) -> str: ...
    @property
    def ignored_options(self) -> Mapping[str, str]: ...
    @property
    def unusable_options(self) -> Mapping[str, tuple[tuple[Any, ...], str]]: ...
    @property
    def keys(self) -> Any: ...
    @property
    def components(self) -> tuple[Any, ...]: ...
    @property
    def caches_prompt_embeds(self) -> bool: ...
    @property
    def max_references(self) -> int: ...
    @property
    def prediction_type(self) -> str: ...
    @property
    def preview_decoder(self) -> str | None: ...
    @property
    def pipeline_options(self) -> tuple[str, ...]: ...


@dataclass
class Draft:
    """What the rules look at.

    Args:
        spec: None where the family is unknown.
        origins: where each value that is not a default comes from.
        config_file: as shown; None where everything came from the command line.
        faulty: options whose value was refused; rules leave them alone.
    """

    config: TrainConfig
    spec: FamilyFacts | None
    datasets: LoadedDatasets
    origins: Mapping[str, Origin]
    folders: Folders
    config_file: str | None = None
    lycoris: Mapping[str, Any] | None = None
    prompt_library: Mapping[str, LibraryPrompt] | None = None
    faulty: frozenset[str] = field(default_factory=frozenset)

    def origin(self, key: str) -> Origin:
        """Where an option's value comes from."""
        return self.origins.get(key, Origin("default"))

    def problem(self, message: str, key: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        """A problem with an option's value; of one that nobody set, in the file where it would stand."""
        problem = self.origin(key).problem(message, key=key, allowed=allowed, fix=fix)
        return problem if problem.file else replace(problem, file=self.config_file)

    def dataset_problem(
        self, entry: Dataset, key: str, message: str, allowed: str | None = None, fix: str | None = None
    ) -> Problem:
        """A problem with a key of a dataset entry."""
        return self.datasets.place(entry.id, key).problem(message, key=f"{entry.id}.{key}", allowed=allowed, fix=fix)

    @property
    def images(self) -> list[ImageDataset]:
        """Entries with images: to train on, and for the eval loss."""
        return [entry for entry in self.datasets.entries if isinstance(entry, ImageDataset)]

    @property
    def conditioning(self) -> list[ConditioningDataset]:
        """Entries with masks or references of the images of others."""
        return [entry for entry in self.datasets.entries if isinstance(entry, ConditioningDataset)]

    def output_path(self, path: Path) -> Path:
        """Where a folder that is made on demand lies."""
        return self.folders.output(path)
