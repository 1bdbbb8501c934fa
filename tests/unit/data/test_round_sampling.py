"""What is resampled in each round, which images are chosen, and what their captions become."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simpletuner.batch import Crop, Sample
from simpletuner.config.dataset_values import TagShuffle
from simpletuner.config.datasets import EvalDataset, ImageDataset, TextEmbedsDataset
from simpletuner.data.buckets import BucketRules, choose_aspect
from simpletuner.data.caption_edits import CaptionEdits
from simpletuner.data.datasets import Dataset
from simpletuner.data.holdout import place_of
from simpletuner.data.index import ImageRow
from simpletuner.data.kept import KeptSamples
from simpletuner.data.report import SkippedFiles
from simpletuner.data.sampler import Sampler
from simpletuner.data.schedule import Schedule
from simpletuner.data.selection import select_sizes, select_subset
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.randomness import keyed_seed, keyed_uniform
from tests.unit.data.images import build_datasets, options, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(12):
        write_image(root / f"thing_{number:02d}.png", 96 if number % 2 else 64, 64, seed=number)
    return root


def build(root: Path, tmp_path: Path, filters: list[str] | None = None, **changes) -> Dataset:
    entries = [
        ImageDataset(id="things", instance_data_dir=root, **changes),
        TextEmbedsDataset(id="text", default=True, caption_filter_list=filters),
    ]
    (dataset,) = build_datasets(entries, options(), OMNIGEN, tmp_path / "work", data_file="data.json")
    return dataset


def names(dataset: Dataset) -> list[str]:
    return [sample.path for sample in dataset.samples]


def test_half_of_the_images_are_mirrored_and_others_in_each_round(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, random_flip=True)
    flips = np.array([[s.is_flipped for s in dataset.samples.take(range(12), number)] for number in range(50)])
    assert 0.4 < flips.mean() < 0.6  # 600 draws, standard deviation 0.02
    assert all(0 < column.sum() < 50 for column in flips.T)
    again = build(folder, tmp_path, random_flip=True)
    assert [s.is_flipped for s in again.samples.take(range(12), 7)] == flips[7].tolist()


def test_a_mirrored_image_is_the_mirror_of_the_cut(folder: Path, tmp_path: Path) -> None:
    plain, flipping = build(folder, tmp_path), build(folder, tmp_path, random_flip=True)
    samples = [s for number in range(9) for s in flipping.samples.take([1], number)]
    assert {sample.is_flipped for sample in samples} == {True, False}
    straight = plain.read_pixels(plain.samples[1])
    for sample in samples:
        expected = torch.from_numpy(straight.numpy()[:, :, ::-1].copy()) if sample.is_flipped else straight
        assert torch.equal(flipping.read_pixels(sample), expected)


def test_a_cache_holds_both_versions_of_what_may_be_mirrored(folder: Path, tmp_path: Path) -> None:
    versions = Counter((s.path, s.is_flipped) for s in build(folder, tmp_path, random_flip=True).samples_to_keep())
    assert versions == {(name, flip): 1 for name in names(build(folder, tmp_path)) for flip in (False, True)}
    assert len(list(build(folder, tmp_path).samples_to_keep())) == 12
    assert list(build(folder, tmp_path, vae_cache_disable=True).samples_to_keep()) == []


def test_crops_are_resampled_in_each_round_only_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    fixed = build(folder, tmp_path, crop_style="random")
    fresh = build(folder, tmp_path, crop_style="random", vae_cache_clear_each_epoch=True)
    assert [s.crop for s in fixed.samples.take(range(12), 0)] == [s.crop for s in fixed.samples.take(range(12), 5)]
    lefts = [
        {s.crop.left for s in fresh.samples.take([index], number)}.pop() for index in (1, 3) for number in range(9)
    ]
    assert len(set(lefts)) > 9
    assert fresh.encodes_on_demand
    assert not fresh.keeps_latents
    assert not fixed.encodes_on_demand


def test_aspects_resampled_move_images_between_buckets_that_fit_their_crops(folder: Path, tmp_path: Path) -> None:
    keys = {"crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0], "vae_cache_clear_each_epoch": True}
    dataset = build(folder, tmp_path, **keys)
    rounds = [dataset.buckets_in(number) for number in range(4)]
    assert len({tuple(members.tolist()) for buckets in rounds for members in buckets.values()}) > 6
    sampler = Sampler([dataset], 2, seed=1)
    for epoch in range(4):
        plans = [sampler.batch(epoch, position) for position in range(sampler.batches_in(epoch))]
        assert Counter(index for plan in plans for index in plan.sample_indices) == dict.fromkeys(range(12), 1)
        for plan in plans:
            samples = dataset.samples.take(plan.sample_indices, plan.round_number)
            assert {(s.crop.height, s.crop.width) for s in samples} == {plan.size}


def test_a_subset_is_chosen_by_content_and_hardly_moves_when_an_image_comes(folder: Path, tmp_path: Path) -> None:
    chosen = names(build(folder, tmp_path, max_num_samples=5))
    assert len(chosen) == 5
    assert chosen == names(build(folder, tmp_path, max_num_samples=5))
    write_image(folder / "a_new_one.png", seed=99)
    after = names(build(folder, tmp_path, max_num_samples=5))
    assert len(set(after) - set(chosen)) <= 1
    assert len(names(build(folder, tmp_path, max_num_samples=50))) == 13
    dataset = build(folder, tmp_path, max_num_samples=5)
    assert (dataset.filter_report.found, dataset.filter_report.bucketed, dataset.filter_report.per_epoch) == (13, 5, 5)


def test_the_filter_report_counts_what_an_epoch_takes(folder: Path, tmp_path: Path) -> None:
    assert build(folder, tmp_path, repeats=2, probability=0.5).filter_report.per_epoch == 18  # 12 * 3 / 2


def test_aspects_outside_of_the_limits_are_left_out_with_their_reason(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "wide.png", 200, 64)
    write_image(folder / "tall.png", 64, 200)
    dataset = build(folder, tmp_path, minimum_aspect_ratio=0.5, maximum_aspect_ratio=1.5)
    assert len(dataset.samples) == 12
    (reason,) = dataset.filter_report.skipped.counts
    limited = "its width / height is outside of minimum_aspect_ratio, maximum_aspect_ratio"
    assert reason == f"{limited} (0.5 to 1.5)"
    assert dataset.filter_report.skipped.examples[reason] == ["tall.png", "wide.png"]
    narrow = build(folder, tmp_path, maximum_aspect_ratio=1.4)
    assert len(narrow.samples) == 7  # six squares and the tall one
    assert narrow.filter_report.skipped.counts == {f"{limited} (0 to 1.4)": 7}
    assert build(folder, tmp_path, minimum_aspect_ratio=1).filter_report.skipped.counts == {f"{limited} (1 to inf)": 1}


def test_images_that_would_grow_too_much_are_left_out(folder: Path, tmp_path: Path) -> None:
    for side in (50, 53, 54):  # 64 / 53 = 1.2075, 64 / 54 = 1.185
        write_image(folder / f"small_{side}.png", side, side, seed=side)
    dataset = build(folder, tmp_path, max_upscale_threshold=0.2)
    assert "small_54.png" in names(dataset)
    assert len(dataset.samples) == 13
    (reason,) = dataset.filter_report.skipped.counts
    assert reason == "would grow by more than max_upscale_threshold (0.2)"


def test_of_several_aspects_those_that_need_no_growth_are_chosen_from(folder: Path, tmp_path: Path) -> None:
    keys = {"crop_aspect": "random", "crop_aspect_buckets": [1.0, 2.0]}
    # aspect 2 is 48 x 96 here: an image of 64 x 64 would grow by half, one of 96 x 64 not at all
    assert (48, 96) in build(folder, tmp_path, **keys).buckets
    dataset = build(folder, tmp_path, max_upscale_threshold=0.1, **keys)
    wide = [dataset.samples[int(index)].width for index in dataset.buckets[(48, 96)]]
    assert wide
    assert set(wide) == {96}
    assert len(dataset.samples) == 12


def test_weights_of_aspects_are_honored(folder: Path, tmp_path: Path) -> None:
    buckets = [{"aspect_bucket": 0.5, "weight": 0}, {"aspect_bucket": 1.0, "weight": 1}]
    assert set(build(folder, tmp_path, crop_aspect="random", crop_aspect_buckets=buckets).buckets) == {(64, 64)}


def write_table(folder: Path, suffix: str, rows: list[dict]) -> Path:
    path = folder / f"metadata{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == ".csv":
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


ROWS = [{"file_name": f"thing_{number:02d}.png", "text": f'caption {number}, with "quotes"'} for number in range(12)]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_captions_come_from_a_table_beside_the_images(folder: Path, tmp_path: Path, suffix: str) -> None:
    write_table(folder, suffix, ROWS)
    strategy = "parquet" if suffix == ".parquet" else "csv"
    dataset = build(folder, tmp_path, caption_strategy=strategy)
    assert [s.captions for s in dataset.samples] == [(row["text"],) for row in ROWS]


def test_names_without_extension_columns_and_fallbacks(folder: Path, tmp_path: Path) -> None:
    rows = [{"id": f"thing_{n:02d}", "long": "" if n == 3 else f"long {n}", "tags": f"tags {n}"} for n in range(12)]
    table = write_table(tmp_path, ".jsonl", rows)
    keys = {"metadata_file": table, "filename_column": "id", "caption_column": ["long", "tags"]}
    dataset = build(folder, tmp_path, caption_strategy="csv", **keys)
    assert [s.captions[0] for s in dataset.samples] == ["tags 3" if n == 3 else f"long {n}" for n in range(12)]


def test_lists_and_several_rows_are_variants(folder: Path, tmp_path: Path) -> None:
    rows = [{"file_name": row["file_name"], "text": ["one", "two\nlines"]} for row in ROWS]
    write_table(folder, ".jsonl", [*rows, {"file_name": "./thing_00.png", "text": "three"}])
    dataset = build(folder, tmp_path, caption_strategy="csv")
    assert dataset.samples[0].captions == ("one", "two\nlines", "three")
    assert dataset.samples[1].captions == ("one", "two\nlines")


def test_images_without_a_row_are_listed(folder: Path, tmp_path: Path) -> None:
    write_table(folder, ".csv", ROWS[:10])
    with pytest.raises(DataError, match=r"2 of 12 images have no caption in .*metadata.csv: thing_10.png, thing_11"):
        build(folder, tmp_path, caption_strategy="csv")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"filename_column": "name"}, r"things.filename_column: .* has no column \"name\"(.|\n)*file_name, text"),
        ({"caption_column": "words"}, r"things.caption_column: .* has no column words(.|\n)*file_name, text"),
    ],
)
def test_a_column_that_is_not_there_names_those_that_are(folder: Path, tmp_path: Path, keys, words) -> None:
    write_table(folder, ".csv", ROWS)
    with pytest.raises(DataError, match=words):
        build(folder, tmp_path, caption_strategy="csv", **keys)


def test_a_table_that_is_broken_is_named_with_its_line(folder: Path, tmp_path: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "thing_00.png", "text": "a"}\n{"file_name": \n')
    with pytest.raises(DataError, match=r"metadata.jsonl cannot be read: line 2 is not JSON"):
        build(folder, tmp_path, caption_strategy="csv")


def test_a_changed_table_is_read_again(folder: Path, tmp_path: Path) -> None:
    write_table(folder, ".csv", ROWS)
    before = build(folder, tmp_path, caption_strategy="csv")
    write_table(folder, ".csv", [{**row, "text": "new"} for row in ROWS])
    after = build(folder, tmp_path, caption_strategy="csv")
    assert after.samples[0].captions == ("new",)
    assert after.fingerprint != before.fingerprint


def test_filters_edit_every_caption(folder: Path, tmp_path: Path) -> None:
    filters = ["^thing ", r"s/0(\d)/number \1/", "s#1#/#"]
    assert [s.captions[0] for s in build(folder, tmp_path, filters).samples][:3] == ["number 0", "number /", "number 2"]
    assert build(folder, tmp_path, filters).fingerprint != build(folder, tmp_path).fingerprint


def test_tags_are_shuffled_after_those_that_stay() -> None:
    shuffle = TagShuffle(count=4, split_on="comma", position_start=1)
    variants = CaptionEdits(shuffle=shuffle, seed=1).apply(["dog, running, park, sunny day"])
    assert variants[0] == "dog, running, park, sunny day"
    assert 2 < len(variants) <= 5
    for variant in variants:
        first, *others = variant.split(", ")
        assert first == "dog"
        assert sorted(others) == ["park", "running", "sunny day"]
    assert CaptionEdits(shuffle=shuffle, seed=1).apply(["dog, running, park, sunny day"]) == variants
    assert CaptionEdits(shuffle=shuffle, seed=2).apply(["dog, running, park, sunny day"]) != variants


def test_a_shuffle_without_the_original_leaves_captions_that_have_nothing_to_shuffle() -> None:
    edits = CaptionEdits(shuffle=TagShuffle(count=1, split_on="space", position_start=1, include_original=False))
    assert edits.apply(["dog park"]) == ("dog park",)
    assert len(edits.apply(["a b c d e"])) == 1


def test_tags_before_and_behind_the_marks_stay_and_the_marks_are_never_trained() -> None:
    shuffle = TagShuffle(count=5, position_start=2, keep_separator="|||")
    marked = "1girl, solo ||| red hair, smile, park ||| watercolor"
    variants = CaptionEdits(shuffle=shuffle, seed=1).apply([marked])
    assert variants[0] == "1girl, solo, red hair, smile, park, watercolor"
    assert len(variants) > 2
    for variant in variants:
        assert variant.startswith("1girl, solo, ")
        assert variant.endswith(", watercolor")
        assert sorted(variant.split(", ")[2:-1]) == ["park", "red hair", "smile"]
    # One mark: nothing stays at the end. None: `position_start` counts. Nothing to shuffle: the marks go all the same.
    assert all(each.startswith("a, ") for each in CaptionEdits(shuffle=shuffle).apply(["a ||| b, c, d"]))
    assert all(each.startswith("a, b, ") for each in CaptionEdits(shuffle=shuffle).apply(["a, b, c, d, e"]))
    assert CaptionEdits(shuffle=shuffle).apply(["a ||| b"]) == ("a, b",)


def test_each_loose_tag_is_dropped_as_often_as_asked_and_those_that_stay_never() -> None:
    tags = [f"tag{number}" for number in range(10)]
    shuffle = TagShuffle(count=1000, include_original=False, keep_separator="|||", dropout=0.3)
    variants = CaptionEdits(shuffle=shuffle, seed=1).apply([f"first ||| {', '.join(tags)} ||| last"])
    assert all(variant.startswith("first") and variant.endswith("last") for variant in variants)
    for tag in tags:
        share = sum(tag in variant.split(", ") for variant in variants) / len(variants)
        assert share == pytest.approx(0.7, abs=0.06)  # four deviations of a thousand draws
    kept = [variant.split(", ")[1:-1] for variant in variants]
    assert any(row != sorted(row) for row in kept)
    assert CaptionEdits(shuffle=shuffle, seed=1).apply([f"first ||| {', '.join(tags)} ||| last"]) == variants


def test_a_dataset_offers_the_shuffled_variants(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("a, b, c, d")
    shuffle = {"enable": True, "count": 3, "include_original": False}
    dataset = build(folder, tmp_path, caption_strategy="textfile", caption_shuffle=shuffle)
    assert all(sorted(caption.split(", ")) == list("abcd") for caption in dataset.samples[0].captions)
    generated = {dataset.caption_for(dataset.samples[0], 1, step, 0) for step in range(60)}
    assert generated == set(dataset.samples[0].captions)


def test_an_eval_dataset_keeps_its_crops_whatever_the_configuration_says(folder: Path, tmp_path: Path) -> None:
    entry = EvalDataset(id="held", dataset_type="eval", instance_data_dir=folder, crop_style="random")
    config = options(vae_cache_clear_each_epoch=True)
    (dataset,) = build_datasets([entry], config, OMNIGEN, tmp_path / "work")
    assert not dataset.encodes_on_demand
    assert [s.crop for s in dataset.samples.take(range(12), 3)] == [s.crop for s in dataset.samples]


def test_images_of_one_slot_draw_their_caption_each_for_itself() -> None:
    """Key and number of variants are the same: the content of the image decides too."""
    crop = Crop(8, 8, 0, 0, 8, 8)
    samples = [Sample("d", f"{n}.png", f"{n:064x}", 8, 8, ("one", "two"), crop) for n in range(40)]
    generated = [Dataset.caption_for(None, sample, 1, 5, 0) for sample in samples]
    assert 10 < generated.count("one") < 30
    assert generated == [Dataset.caption_for(None, sample, 1, 5, 0) for sample in samples]


def test_processes_share_the_samples_to_keep_and_each_knows_how_many_are_its_own(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, random_flip=True)
    assert dataset.num_kept == 24
    parts = [KeptSamples(dataset, "things", rank, 5) for rank in range(5)]
    assert [len(part) for part in parts] == [5, 5, 5, 5, 4]
    assert [len(list(part)) for part in parts] == [5, 5, 5, 5, 4]
    assert len({(sample.path, sample.is_flipped) for part in parts for sample in part}) == 24
    assert build(folder, tmp_path).num_kept == 12
    assert build(folder, tmp_path, random_flip=True, vae_cache_disable=True).num_kept == 0


def test_a_dataset_takes_part_as_its_entry_says(folder: Path, tmp_path: Path) -> None:
    keys = {"probability": 0.5, "start_epoch": 2, "end_epoch": 3, "start_step": 40, "end_step": 50}
    assert build(folder, tmp_path, **keys).schedule == Schedule(0.5, 2, 3, 40, 50)
    assert build(folder, tmp_path, end_epoch=0, end_step=0).schedule == Schedule(1.0)


def test_the_fingerprint_knows_draws_edits_subset_and_the_seed_where_it_draws(folder: Path, tmp_path: Path) -> None:
    def fingerprint(seed: int = 1, filters: list[str] | None = None, **keys: object) -> str:
        entries = [
            ImageDataset(id="things", instance_data_dir=folder, **keys),
            TextEmbedsDataset(id="text", default=True, caption_filter_list=filters),
        ]
        return build_datasets(entries, options(seed=seed), OMNIGEN, tmp_path / "work")[0].fingerprint

    resampled = {"crop_style": "random", "vae_cache_clear_each_epoch": True}
    drawn = [{"random_flip": True}, {"crop_style": "random"}, resampled, {"max_num_samples": 5}]
    found = [fingerprint(seed, **keys) for keys in drawn for seed in (1, 2)]
    found += [fingerprint(), fingerprint(filters=["thing"])]
    assert len(set(found)) == 10
    assert fingerprint(seed=2) == fingerprint()


def test_each_round_of_random_aspects_has_its_own_buckets_whichever_was_asked_for_before(folder, tmp_path) -> None:
    keys = {"crop_aspect": "random", "crop_aspect_buckets": [0.5, 1.0, 2.0], "vae_cache_clear_each_epoch": True}
    dataset = build(folder, tmp_path, **keys)
    found = [
        {size: members.tolist() for size, members in dataset.samples.buckets_in(number).items()}
        for number in (0, 1, 0, 1)
    ]
    assert found[0] == found[2] != found[1] == found[3]


def test_latents_are_encoded_on_demand_where_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    assert build(folder, tmp_path, vae_cache_ondemand=True).encodes_on_demand
    assert build(folder, tmp_path, vae_cache_disable=True).encodes_on_demand


def test_tags_are_shuffled_by_a_seed_of_their_own_or_by_that_of_the_run() -> None:
    def variants(run: int, own: int | None) -> tuple[str, ...]:
        shuffle = TagShuffle(count=3, include_original=False, seed=own)
        return CaptionEdits(shuffle=shuffle, seed=run).apply(["a, b, c, d, e, f"])

    assert variants(1, None) != variants(2, None)
    assert variants(1, 7) == variants(2, 7) == variants(7, None) != variants(1, 8)


def test_one_loose_tag_may_be_dropped_and_without_dropout_has_no_variants() -> None:
    shuffle = TagShuffle(count=40, include_original=False, position_start=1, dropout=0.5)
    assert set(CaptionEdits(shuffle=shuffle).apply(["a, b"])) == {"a", "a, b"}
    assert CaptionEdits(shuffle=TagShuffle(count=40, position_start=1)).apply(["a, b"]) == ("a, b",)


def test_openers_double_captions_that_have_one_and_filters_leave_no_blanks() -> None:
    edits = CaptionEdits(openers=("a photo of",))
    assert edits.apply(["a cat", "a dog"]) == ("a cat", "a dog")
    assert edits.apply(["a photo of a cat", "a dog"]) == ("a photo of a cat", "a cat", "a dog", "a dog")
    assert CaptionEdits(filters=("photo of",)).apply(["photo of a cat"]) == ("a cat",)


def test_what_is_drawn_of_an_image_is_keyed_by_seed_dataset_content_and_round(folder: Path, tmp_path: Path) -> None:
    """By `keyed_uniform`, whose numbers are held elsewhere: another key would train a resumed run on other crops."""
    keys = {"crop_style": "random", "random_flip": True}
    fixed = build(folder, tmp_path, **keys)
    fresh = build(folder, tmp_path, **keys, vae_cache_clear_each_epoch=True)
    for number in (0, 3):
        for sample in fixed.samples.take(range(12), number):
            key = (42, "things", sample.digest)
            assert sample.is_flipped == (keyed_uniform(*key, "flip", number) < 0.5)
            spare = sample.width - 64
            assert sample.crop.left == int(keyed_uniform(*key, "left") * (spare + 1))
        for sample in fresh.samples.take(range(12), number):
            drawn = keyed_uniform(42, "things", sample.digest, "round", number, "left")
            assert sample.crop.left == int(drawn * (sample.width - 63))
    rules = BucketRules(64, "pixel", crop_aspect="random", aspect_buckets=((0.5, 1.0), (2.0, 1.0)))
    for digest in "abcdef":
        chosen = 0.5 if keyed_uniform(42, "things", digest, "aspect") < 0.5 else 2.0
        assert choose_aspect(64, 64, rules, 42, "things", digest) == chosen
        sample = Sample("d", "a.png", digest, 8, 8, ("one", "two", "three"), Crop(8, 8, 0, 0, 8, 8))
        chosen = sample.captions[keyed_seed(42, 5, 1, "caption", digest) % 3]
        assert Dataset.caption_for(None, sample, 42, 5, 1) == chosen
    assert [place_of(digest) for digest in "ab"] == [keyed_uniform("eval holdout", digest) for digest in "ab"]


def test_a_shuffle_is_that_of_numpy_for_the_seed_the_caption_and_the_number_of_the_variant() -> None:
    shuffle = TagShuffle(count=3, include_original=False, split_on="period", dropout=0.4)
    tags = [f"t{number}" for number in range(9)]
    caption = ". ".join(tags)
    found = CaptionEdits(shuffle=shuffle, seed=4).apply([caption])
    expected = []
    for number in range(3):
        order = np.random.Generator(np.random.PCG64(keyed_seed(4, "tags", caption, number))).permutation(9)
        chances = np.random.Generator(np.random.PCG64(keyed_seed(4, "dropped tags", caption, number))).random(9)
        expected.append(". ".join(tags[index] for index in order if chances[index] >= 0.4))
    assert list(found) == expected


def test_of_a_thousand_images_those_of_the_lowest_numbers_are_the_subset_and_each_has_its_own_aspect() -> None:
    """Asked for in parts of 512, with rows that stand for an index."""
    count = 1100
    rows = {10 * place: ImageRow(f"{place}.png", f"digest {place}", 64, 64) for place in range(count)}
    index = SimpleNamespace(images=lambda ids: [rows[key] for key in ids])
    catalog = SimpleNamespace(ids=np.arange(count) * 10, heights=np.full(count, 64), widths=np.full(count, 64))
    positions = np.arange(0, count, 2)
    ranks = {place: keyed_seed(7, "things", "subset", f"digest {place}") for place in positions.tolist()}
    expected = sorted(sorted(ranks, key=ranks.__getitem__)[:30])
    assert select_subset("things", 7, 30, catalog, positions, index).tolist() == expected
    assert select_subset("things", 7, None, catalog, positions, index) is positions
    assert select_subset("things", 7, len(positions), catalog, positions, index) is positions
    rules = BucketRules(64, "pixel", crop_aspect="random", aspect_buckets=((0.5, 1.0), (2.0, 1.0)))
    found = select_sizes("things", 7, catalog, positions, rules, OMNIGEN, index, SkippedFiles())
    wide = [keyed_uniform(7, "things", f"digest {place}", "aspect") >= 0.5 for place in positions.tolist()]
    assert found.positions.tolist() == positions.tolist()
    assert found.widths.tolist() == [128 if each else 64 for each in wide]
    assert found.heights.tolist() == [64 if each else 128 for each in wide]
