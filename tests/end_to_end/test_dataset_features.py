"""Weighted, scheduled, masked, mirrored and freshly cut datasets: interrupted runs end with the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from simpletuner.cache.store import TensorStore
from simpletuner.errors import DataError
from tests.runs import (
    dataset,
    metrics,
    require_same_bits_after_a_stop,
    slow_but,
    train_here,
    weights_of,
    write_images,
    write_run,
)


def write_masks(folder: Path, count: int, side: int = 64) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        image = Image.new("L", (side, side), 0)
        ImageDraw.Draw(image).rectangle((0, 8 * index, side, side), fill=255)
        image.save(folder / f"{index:03d}.png")


FEATURES: dict[str, list[dict[str, Any]]] = {
    "weights, schedules, a batch size of its own": [
        dataset("images", probability=0.6, train_batch_size=1),
        dataset("more", start_step=3, end_step=6, probability=1.5),
        dataset("regularisation", is_regularisation_data=True, start_epoch=2),
    ],
    "masks and mirrored images": [
        dataset("images", conditioning_data="masks", random_flip=True),
        {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"},
    ],
    "crops and aspects resampled, nothing written": [
        dataset(
            "images",
            crop_style="random",
            crop_aspect="random",
            crop_aspect_buckets=[{"aspect_bucket": 1.0, "weight": 2}, 0.5],
            vae_cache_clear_each_epoch=True,
            random_flip=True,
            maximum_image_size=40,
            target_downsample_size=40,
            resolution=32,
        ),
        dataset("more", vae_cache_disable=True, max_num_samples=2),
    ],
}


def prepare(folder: Path, model: Path, data: list[dict[str, Any]], **options: Any) -> Path:
    write_images(folder / "images", 5, seed=1)
    write_images(folder / "more", 4, seed=2)
    write_images(folder / "regularisation", 3, seed=3)
    write_masks(folder / "masks", 5)
    return write_run(folder, model, data, **({"masked_loss_probability": 0.8} | options))


@pytest.mark.slow
@pytest.mark.parametrize("features", slow_but(FEATURES, ("weights, schedules, a batch size of its own",)))
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, omnigen_folder, monkeypatch, features: str) -> None:
    data, options = FEATURES[features], {"gradient_accumulation_steps": 2}
    straight, _ = require_same_bits_after_a_stop(
        lambda folder: prepare(folder, omnigen_folder, data, **options), tmp_path, monkeypatch
    )
    assert len({record["loss"] for record in metrics(straight, "step_done")}) == 8


def entries_in(folder: Path) -> int:
    with TensorStore(folder) as store:
        return store.stats().num_entries


def test_what_may_be_mirrored_is_cached_in_both_versions_and_what_is_not_kept_is_not_written(
    tmp_path, omnigen_folder
) -> None:
    data = [dataset("images", random_flip=True), dataset("more", vae_cache_disable=True), dataset("regularisation")]
    folder = prepare(tmp_path / "run", omnigen_folder, data, max_train_steps=4)
    train_here(folder)
    counts = {name: entries_in(folder / "cache/vae/omnigen" / name) for name in ("images", "more", "regularisation")}
    assert counts == {"images": 10, "more": 0, "regularisation": 3}


@pytest.mark.slow
def test_a_mask_changes_what_is_learned_and_a_probability_of_zero_does_not(tmp_path, omnigen_folder) -> None:
    masked, plain = FEATURES["masks and mirrored images"], [dataset("images", random_flip=True)]
    results = [
        weights_of(
            train_here(prepare(tmp_path / name, omnigen_folder, data, masked_loss_probability=share, max_train_steps=2))
            / "checkpoint-2"
        )
        for name, data, share in (("masked", masked, 1.0), ("never", masked, 0.0), ("plain", plain, 1.0))
    ]
    assert results[0] != results[2]
    assert results[1] == results[2]


def test_epochs_of_different_length_end_runs_and_intervals_where_they_end(tmp_path, omnigen_folder) -> None:
    # Batches of 2: 5 images are 3 batches; from the second epoch on 4 more are 2 further ones: 3 + 5 + 5.
    data = [dataset("images"), dataset("more", start_epoch=2)]
    length = {"max_train_steps": 0, "num_train_epochs": 3, "checkpoint_step_interval": 0}
    folder = prepare(tmp_path / "run", omnigen_folder, data, checkpoint_epoch_interval=1, **length)
    output = train_here(folder)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-13",
        "checkpoint-3",
        "checkpoint-8",
    ]


def test_a_missing_mask_stops_the_run_before_anything_is_loaded(tmp_path, omnigen_folder) -> None:
    folder = prepare(tmp_path / "run", omnigen_folder, FEATURES["masks and mirrored images"])
    (folder / "masks/003.png").unlink()
    with pytest.raises(DataError, match=r"images\.conditioning_data: 1 of 5 images have no mask .*003\.png"):
        train_here(folder)


def test_another_weight_at_a_resume_is_reported(tmp_path, omnigen_folder, capsys) -> None:
    folder = prepare(tmp_path / "run", omnigen_folder, [dataset("images")], max_train_steps=2)
    train_here(folder)
    (folder / "multidatabackend.json").write_text(json.dumps([dataset("images", probability=0.5)]))
    train_here(folder, "--max_train_steps=4")
    assert "changed since checkpoint-2: dataset images: probability 1 → 0.5" in capsys.readouterr().out
