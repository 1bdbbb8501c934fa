"""A run whose values are typed and whose paths are resolved, before the rules across keys have judged it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simpletuner.config.dataset_loading import LoadedDatasets
from simpletuner.config.datasets import ConditioningDataset, Dataset, ImageDataset
from simpletuner.config.layers import Origin
from simpletuner.config.options import TrainConfig
from simpletuner.config.paths import Folders
from simpletuner.config.prompt_library import LibraryPrompt
from simpletuner.errors import Problem
from simpletuner.families.spec import FamilySpec


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
    spec: FamilySpec | None
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
