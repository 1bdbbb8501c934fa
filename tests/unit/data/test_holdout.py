"""Held-out images: chosen by content, never trained on, the same when images are added."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.dataset import Dataset
from simpletuner.data.holdout import hold_out, place_of
from simpletuner.data.sampler import Sampler
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import build_datasets, options, write_image

ASPECTS = [{"aspect_bucket": 1.0}, {"aspect_bucket": 0.5}]
RESAMPLED = {"crop_aspect": "random", "crop_aspect_buckets": ASPECTS, "vae_cache_clear_each_epoch": True}


def build(tmp_path: Path, *entries: ImageDataset) -> list[Dataset]:
    return build_datasets(list(entries), options(), OMNIGEN, tmp_path / "work", data_file="data.json")


def entry(root: Path, name: str = "things", **changes) -> ImageDataset:
    return ImageDataset(id=name, instance_data_dir=root, **changes)


def write_images(root: Path, numbers: range) -> Path:
    for number in numbers:
        write_image(root / f"a_thing_{number:03d}.png", 64, 64 + 64 * (number % 2), seed=number)
    return root


def digests(dataset: Dataset) -> set[str]:
    return {digest for _, digest in dataset.used_digests()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", range(40))


def test_an_image_is_trained_on_or_held_out_and_its_content_decides(root: Path, tmp_path: Path) -> None:
    (whole,) = build(tmp_path, entry(root, crop=False))
    trained, held = hold_out([whole], 0.25)
    assert (trained.kind, held.kind, held.id) == ("image", "eval", "things.holdout")
    assert digests(trained) | digests(held) == {hashlib.sha256(p.read_bytes()).hexdigest() for p in root.iterdir()}
    assert not digests(trained) & digests(held)
    assert 2 <= len(digests(held)) <= 20
    others = [each.fingerprint for each in hold_out([whole], 0.5)]
    assert len({whole.fingerprint, trained.fingerprint, held.fingerprint, *others}) == 5
    (renamed,) = build(tmp_path, entry(root.rename(tmp_path / "elsewhere"), "other", crop=False, resolution=128))
    assert digests(hold_out([renamed], 0.25)[1]) == digests(held)


def test_added_images_change_nothing_for_the_others(root: Path, tmp_path: Path) -> None:
    _, held = hold_out(build(tmp_path, entry(root)), 0.25)
    old = digests(build(tmp_path, entry(root))[0])
    write_images(root, range(40, 80))
    _, later = hold_out(build(tmp_path, entry(root)), 0.25)
    assert digests(later) & old == digests(held)
    assert digests(later) > digests(held)


def test_what_is_held_out_is_in_no_batch_of_any_epoch(root: Path, tmp_path: Path) -> None:
    datasets = build(
        tmp_path, entry(root), entry(root, "anew", **RESAMPLED), entry(root, "prior", is_regularisation_data=True)
    )
    *trained, held, held_anew = hold_out(datasets, 0.25)
    assert [dataset.id for dataset in trained] == ["things", "anew", "prior"]
    assert digests(held) == digests(held_anew)
    by_id = {dataset.id: dataset for dataset in trained}
    sampler = Sampler(trained, 4, seed=1)
    seen: dict[str, set[str]] = {name: set() for name in by_id}
    for epoch in range(3):
        for position in range(sampler.batches_in(epoch)):
            plan = sampler.batch(epoch, position)
            samples = by_id[plan.dataset_id].samples.take(plan.sample_indices, plan.round_number)
            seen[plan.dataset_id] |= {sample.digest for sample in samples}
    assert set(map(frozenset, seen.values())) == {frozenset(digests(trained[0]))}


def test_a_share_that_holds_out_nothing_or_everything_is_refused_with_one_that_does(tmp_path: Path) -> None:
    datasets = build(tmp_path, entry(write_images(tmp_path / "few", range(2))))
    with pytest.raises(DataError) as caught:
        hold_out(datasets, 1e-9)
    (problem,) = caught.value.problems
    assert problem.key == "eval_holdout"
    allowed = float((problem.allowed or "").split()[2])
    assert len(hold_out(datasets, allowed + 1e-4)) == 2
    with pytest.raises(DataError, match="all images of dataset things"):
        hold_out(datasets, 0.999999)


def test_nothing_is_held_out_where_nothing_is_asked(root: Path, tmp_path: Path) -> None:
    datasets = build(tmp_path, entry(root))
    assert hold_out(datasets, 0.0) == datasets


def test_digests_that_differ_in_one_place_only_are_held_out_independently() -> None:
    digest = hashlib.sha256(b"an image").hexdigest()
    others = [f"{digest[:at]}{'0' if digest[at] != '0' else '1'}{digest[at + 1 :]}" for at in range(len(digest))]
    assert len({place_of(each) for each in (digest, *others)}) == 1 + len(others)


def test_a_round_that_was_looked_at_before_loses_its_held_out_images_too(root: Path, tmp_path: Path) -> None:
    (dataset,) = build(tmp_path, entry(root, **RESAMPLED))
    assert sum(map(len, dataset.buckets_in(0).values())) == 40
    trained, _ = hold_out([dataset], 0.25)
    assert sum(map(len, trained.buckets_in(0).values())) == trained.num_images < 40


def test_the_report_counts_what_an_epoch_still_shows(root: Path, tmp_path: Path) -> None:
    """Each image twice, half of a round an epoch."""
    trained, held = hold_out(build(tmp_path, entry(root, repeats=1, probability=0.5)), 0.25)
    report = trained.filter_report
    assert (report.bucketed, report.held_out) == (trained.num_images, 40 - trained.num_images)
    assert report.per_epoch == trained.num_images
    assert (held.filter_report.bucketed, held.filter_report.per_epoch) == (40 - trained.num_images, 0)
    assert (report.dataset_id, held.filter_report.dataset_id) == ("things", "things.holdout")
    assert (report.buckets, held.filter_report.buckets) == (
        {(64, 64): trained.num_images},
        {(64, 64): 40 - trained.num_images},
    )
    assert held.filter_report.held_out == 0
