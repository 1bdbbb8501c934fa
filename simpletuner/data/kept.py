"""The samples of a dataset whose latents are kept, made one after the other: never a million of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from simpletuner.batch import Sample
from simpletuner.data.dataset import Dataset


@dataclass(frozen=True)
class KeptSamples:
    """The images of a dataset, or their references from one folder, in every version that is trained on.

    Args:
        part_id: of the dataset, or of the folder of references.
        rank: of `num_ranks` processes, each of which has every `num_ranks`-th sample.
    """

    dataset: Dataset
    part_id: str
    rank: int = 0
    num_ranks: int = 1

    def __len__(self) -> int:
        return len(range(self.rank, self.dataset.num_kept, self.num_ranks))

    def __iter__(self) -> Iterator[Sample]:
        for sample in islice(self.dataset.samples_to_keep(), self.rank, None, self.num_ranks):
            if self.part_id == self.dataset.id:
                yield sample
            else:
                yield next(each for each in sample.references if each.dataset_id == self.part_id)
