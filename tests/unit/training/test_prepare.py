"""What is refused between the scan of the data and the first cache."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.config.datasets import EvalDataset, ImageDataset
from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError, DataError, Interrupted
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import PhaseProgress, PhaseStarted
from simpletuner.training import prepare
from simpletuner.training.phases import phase
from simpletuner.training.prepare import (
    check_sizes,
    require_full_batches,
    require_trainable,
    require_training,
    with_holdout,
)
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.configs import config_of
from tests.toy import Recorder, ToyDataset
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


def family_up_to(limit: int | None) -> Any:
    return SimpleNamespace(largest_side=lambda: limit, source=SimpleNamespace(model="the/base"))


def test_sizes_that_the_weights_cannot_take_are_refused_by_dataset_and_by_folder_of_references(datasets) -> None:
    """The longest side is 96 px."""
    references = SimpleNamespace(id="guides", largest_side=lambda: 160)
    given: Any = [SimpleNamespace(id="images", buckets=datasets[0].buckets, references=[references])]
    for limit in (None, 160):
        check_sizes(family_up_to(limit), given, "data.json")
    with pytest.raises(ConfigError) as caught:
        check_sizes(family_up_to(95), given, "data.json")
    first, second = caught.value.problems
    assert (first.key, second.key) == ("images.resolution", "guides.resolution")
    assert first.message == "images would have sides of 96 px, too large for the/base"
    assert (first.allowed, first.file) == ("sides up to 95 px", "data.json")
    with pytest.raises(ConfigError) as caught:
        check_sizes(family_up_to(96), given, None)
    assert [problem.key for problem in caught.value.problems] == ["guides.resolution"]


def test_eval_datasets_alone_are_nothing_to_train_on(datasets) -> None:
    require_training(datasets, None)
    with pytest.raises(DataError, match="there is nothing to train on") as caught:
        require_training(datasets[1:], "data.json")
    assert (caught.value.problems[0].key, caught.value.problems[0].file) == ("dataset_type", "data.json")


@pytest.mark.parametrize(
    ("kept", "options", "side", "message"),
    [
        (slice(0, 2), {}, 10_000, None),
        (slice(1, 2), {}, 10_000, "there is nothing to train on"),
        (slice(0, 2), {}, 32, "too large for"),
        (slice(0, 2), {"allow_dataset_oversubscription": False, "train_batch_size": 4}, 10_000, "fewer images"),
    ],
)
def test_a_run_begins_only_on_data_that_passes_each_check(
    datasets, kept: slice, options: dict[str, Any], side: int, message: str | None
) -> None:
    loaded: Any = SimpleNamespace(config=config_of(**options), data_file=None)
    with pytest.raises((ConfigError, DataError), match=message) if message else nullcontext():
        require_trainable(loaded, family_up_to(side), datasets[kept])


def test_what_is_held_out_is_told_and_has_the_latents_of_its_dataset(datasets) -> None:
    told: list[str] = []
    process: Any = SimpleNamespace(inform=told.append)
    divided, sources = with_holdout(datasets[:1], {"ImageDataset": "the source"}, 0.5, process)  # type: ignore[dict-item]
    assert [dataset.num_images for dataset in divided] == [2, 2]
    assert told == ["ImageDataset: 2 of 4 images are held out for the eval loss"]
    assert set(sources) == {dataset.id for dataset in divided}
    assert set(sources.values()) == {"the source"}
    assert with_holdout(datasets[:1], {}, 0.0, process)[0] == datasets[:1]
    assert len(told) == 1


def test_a_phase_counts_and_says_what_came_of_it() -> None:
    recorder = Recorder()
    with phase(EventBus([recorder]), "encoding", 5) as running:
        running.advance()
        running.advance(3)
        running.summary = "4 images"
    started, *progress, done = recorder.events
    assert started == PhaseStarted("encoding", 5)
    assert progress == [PhaseProgress("encoding", 1), PhaseProgress("encoding", 4)]
    assert (done.name, done.summary) == ("encoding", "4 images")
    assert 0 <= done.seconds < 60


def test_a_dataset_that_draws_with_replacement_fills_every_batch() -> None:
    config = config_of(allow_dataset_oversubscription=False, train_batch_size=2)
    dataset: Any = ToyDataset({"a": (1.0, 3.0)})
    dataset.kind = "image"
    with pytest.raises(DataError, match="buckets with fewer images than a batch of 2"):
        require_full_batches(config, [dataset], None)
    dataset.with_replacement = True
    require_full_batches(config, [dataset], None)


def test_a_signal_ends_a_scan_at_the_next_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, counted = StopRequest(), []
    process = Process(guard=FolderGuard(tmp_path), bus=EventBus([]), stop=stop)

    def read_datasets(loaded: Any, family: Any, report: Any) -> None:
        for count in range(5):
            counted.append(count)
            report("images", count, 5)
            stop.adopt()

    monkeypatch.setattr(prepare, "read_datasets", read_datasets)
    with pytest.raises(Interrupted, match="nothing was trained yet"):
        prepare.prepare_datasets(SimpleNamespace(), SimpleNamespace(), process)  # type: ignore[arg-type]
    assert counted == [0, 1]
