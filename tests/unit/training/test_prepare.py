"""What is refused between the scan of the data and the first cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from simpletuner.config.datasets import EvalDataset, ImageDataset
from simpletuner.config.options import TrainConfig
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.prepare import require_full_batches
from tests.configs import config_of
from tests.unit.data.images import build_datasets, options, write_image


def config(full: bool | None) -> TrainConfig:
    return config_of(allow_dataset_oversubscription=full, train_batch_size=4)


@pytest.fixture
def datasets(tmp_path: Path):
    """Three square images and one wide one, twice: to train on and to judge by."""
    for number in range(4):
        write_image(tmp_path / f"things/a_{number}.png", 128 if number == 3 else 64, 64, seed=number)
    entries = [
        kind(id=kind.__name__, instance_data_dir=tmp_path / "things", crop=False)
        for kind in (ImageDataset, EvalDataset)
    ]
    return build_datasets(entries, options(), OMNIGEN, tmp_path / "work")


def test_short_buckets_are_refused_only_where_somebody_wrote_so(datasets) -> None:
    for full in (None, True):
        require_full_batches(config(full), datasets, "data.json")
    with pytest.raises(DataError) as caught:
        require_full_batches(config(False), datasets, "data.json")
    (problem,) = caught.value.problems  # an eval dataset is never trained on
    assert problem.key == "ImageDataset.repeats"
    assert "fewer images than a batch of 4 (repeats 0): 96x48 has 1, 64x64 has 3" in problem.message
    assert "set repeats to 3" in str(problem.fix)


@pytest.mark.parametrize(("processes", "repeats"), [(1, 3), (2, 7)])
def test_the_repeats_that_are_reported_do(datasets, processes: int, repeats: int) -> None:
    """The wide image is alone: 4 x processes of it fill a batch of all processes."""
    image = datasets[0]
    with pytest.raises(DataError, match=f"set repeats to {repeats},"):
        require_full_batches(config(False), [image], None, processes)
    entry = image.entry.model_copy(update={"repeats": repeats})
    from dataclasses import replace

    require_full_batches(config(False), [replace(image, entry=entry)], None, processes)
    entry = image.entry.model_copy(update={"repeats": repeats - 1})
    with pytest.raises(DataError):
        require_full_batches(config(False), [replace(image, entry=entry)], None, processes)
