"""From entries and folders to samples, buckets and errors that name the key."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simpletuner.batch import Crop
from simpletuner.config.datasets import EvalDataset, ImageDataset, TextEmbedsDataset
from simpletuner.data.buckets import BucketRules
from simpletuner.data.datasets import Dataset, UnusableData
from simpletuner.data.report import FilterReport, Note, SkippedFiles
from simpletuner.data.sampler import Sampler
from simpletuner.data.selection import _fits
from simpletuner.errors import EXIT_CONFIG, EXIT_DATA, ConfigError, DataError, Problem
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import build_datasets, options, tree_digest, write_image
from tests.unit.data.odd_files import png


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, (width, height) in enumerate([(64, 64), (128, 64), (130, 66), (64, 128), (30, 30)]):
        write_image(root / f"a_thing_{number}.png", width, height, seed=number)
    return root


def build(root: Path, tmp_path: Path, **changes) -> Dataset:
    """One dataset; `changes` are keys of its entry."""
    entry = ImageDataset(id="things", instance_data_dir=root, **changes)
    (dataset,) = build_datasets([entry], options(), OMNIGEN, tmp_path / "work", data_file="data.json")
    return dataset


def sizes(dataset: Dataset) -> dict[tuple[int, int], int]:
    return {size: len(members) for size, members in dataset.buckets.items()}


def test_square_crops_make_one_bucket(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path)
    assert sizes(dataset) == {(64, 64): 5}
    assert dataset.kind == "image"
    assert dataset.samples[1].crop == Crop(64, 128, 0, 32, 64, 64)
    assert dataset.samples[-1].captions == ("a thing 4",)


def test_preserved_aspects_share_buckets(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, crop=False)
    # aspect 2: 64 * sqrt(2) = 90.5 -> 96, 64 / sqrt(2) = 45.3 -> 48; 130 x 66 is 1.97: 89.8 -> 96, 45.6 -> 48
    assert sizes(dataset) == {(64, 64): 2, (48, 96): 2, (96, 48): 1}
    assert dataset.buckets[(48, 96)].tolist() == [1, 2]
    for size, members in dataset.buckets.items():
        assert {(sample.crop.height, sample.crop.width) for sample in dataset.samples.take(members)} == {size}


def test_pixels_are_those_of_the_crop(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path)
    pixels = dataset.read_pixels(dataset.samples[1])
    image = np.asarray(Image.open(folder / "a_thing_1.png"), dtype=np.float64)
    assert pixels.shape == (3, 64, 64)
    assert np.allclose(pixels.numpy(), image[:, 32:96].transpose(2, 0, 1) / 255 * 2 - 1, atol=1e-6)


def test_small_images_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, minimum_image_size=64, repeats=2)
    filter_report = dataset.filter_report
    assert (
        filter_report.found,
        filter_report.readable,
        filter_report.large_enough,
        filter_report.bucketed,
        filter_report.per_epoch,
    ) == (5, 5, 4, 4, 12)
    assert [sample.path for sample in dataset.samples] == [f"a_thing_{number}.png" for number in range(4)]
    (reason,) = filter_report.skipped.counts
    assert "minimum_image_size (64" in reason
    assert filter_report.skipped.examples[reason] == ["a_thing_4.png"]
    assert any("a_thing_4.png" in line for line in filter_report.lines())
    assert filter_report.as_json()["set_aside"][0]["count"] == 1


def test_broken_images_are_counted_and_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "a_text\x1b[31m.png").write_text("hello")
    before = tree_digest(folder)
    dataset = build(folder, tmp_path)
    assert len(dataset.samples) == 5
    assert dataset.filter_report.found == 6
    assert not any("\x1b" in line for line in dataset.filter_report.lines())
    assert tree_digest(folder) == before


@pytest.mark.parametrize("key", ["vae_cache_ondemand", "vae_cache_disable", "vae_cache_clear_each_epoch"])
def test_what_the_vae_would_first_see_in_the_middle_of_training_is_decoded_at_the_start(folder, tmp_path, key) -> None:
    (folder / "broken.png").write_bytes(png(64, 64, bytes(1000)))  # its checksums are right, most pixels are missing
    entries = [
        ImageDataset(id="encoded", instance_data_dir=folder),
        ImageDataset(id="during", instance_data_dir=folder, **{key: True}),
    ]
    encoded, during = build_datasets(entries, options(), OMNIGEN, tmp_path / "work")
    [broken] = [sample for sample in encoded.samples if sample.path == "broken.png"]
    with pytest.raises(DataError, match=r"broken\.png damaged: .*\n.*repair the image"):
        encoded.read_pixels(broken)
    assert len(during.samples) == 5
    [reason] = during.filter_report.skipped.counts
    assert reason.startswith("damaged: ")


def test_an_extreme_aspect_does_not_ask_for_a_huge_image(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "a_line.png", 20_000, 1)
    dataset = build(folder, tmp_path, crop=False, resolution=512, resolution_type="pixel")
    assert [path for path in dataset.filter_report.skipped.examples.popitem()[1]] == ["a_line.png"]
    assert len(dataset.samples) == 5


def test_two_entries_on_one_folder_read_it_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simpletuner.data.backends.local import LocalBackend

    opened, read = Counter(), LocalBackend.read
    monkeypatch.setattr(LocalBackend, "read", lambda self, path: (opened.update([path]), read(self, path))[1])
    entries = [
        ImageDataset(id="large", instance_data_dir=folder, resolution=128, crop=False),
        TextEmbedsDataset(id="text", dataset_type="text_embeds"),
        ImageDataset(id="off", instance_data_dir=tmp_path / "nowhere", disabled=True),
        EvalDataset(id="small", dataset_type="eval", instance_data_dir=folder, resolution=64),
    ]
    datasets = build_datasets(entries, options(), OMNIGEN, tmp_path / "work")
    assert [(dataset.id, dataset.kind) for dataset in datasets] == [("large", "image"), ("small", "eval")]
    assert set(opened.values()) == {1}
    assert (128, 128) in datasets[0].buckets
    assert (64, 64) in datasets[1].buckets


def test_text_files_give_variants_and_one_is_drawn_by_key(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        (folder / f"a_thing_{number}.txt").write_text(f"one {number}\ntwo {number}\nthree {number}\n")
    dataset = build(folder, tmp_path, caption_strategy="textfile")
    sample = dataset.samples[2]
    assert sample.captions == ("one 2", "two 2", "three 2")
    generated = Counter(dataset.caption_for(sample, 42, step, 0) for step in range(900))
    assert set(generated) == set(sample.captions)
    assert min(generated.values()) > 240  # 300 each, standard deviation 14
    assert dataset.caption_for(sample, 42, 7, 0) == dataset.caption_for(dataset.samples[2], 42, 7, 0)


def test_missing_captions_are_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "a_thing_0.txt").write_text("one")
    (folder / "a_thing_1.txt").write_text("  \n")
    with pytest.raises(DataError) as caught:
        build(folder, tmp_path, caption_strategy="textfile")
    text = str(caught.value)
    assert caught.value.exit_code == EXIT_DATA
    assert "data.json: things.caption_strategy: 4 of 5 images have no text file" in text
    assert "a_thing_1.png" in text
    assert "holds no text" in text


def test_images_without_a_caption_are_in_the_report_of_what_failed(folder: Path, tmp_path: Path) -> None:
    (folder / "a_thing_0.txt").write_text("one")
    (folder / "broken.png").write_bytes(b"x")
    with pytest.raises(UnusableData) as caught:
        build(folder, tmp_path, caption_strategy="textfile")
    [filter_report] = caught.value.filter_reports
    assert (filter_report.found, filter_report.readable, filter_report.captioned, filter_report.bucketed) == (
        6,
        5,
        1,
        0,
    )
    named = dict(filter_report.skipped.files())
    assert sorted(named) == ["a_thing_1.png", "a_thing_2.png", "a_thing_3.png", "a_thing_4.png", "broken.png"]
    assert named["a_thing_3.png"].startswith("no text file")


def test_caption_files_of_kohya_s_scripts_are_read_and_txt_counts_before_them(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        (folder / f"a_thing_{number}.caption").write_text(f"of kohya {number}")
    (folder / "a_thing_3.txt").write_text("of txt")
    dataset = build(folder, tmp_path, caption_strategy="textfile")
    assert [sample.captions for sample in dataset.samples][2:4] == [("of kohya 2",), ("of txt",)]


def test_names_without_words_are_missing_captions(folder: Path, tmp_path: Path) -> None:
    write_image(folder / "___.png")
    with pytest.raises(DataError, match="1 of 6 images have no words"):
        build(folder, tmp_path)
    assert build(folder, tmp_path, only_instance_prompt=True, instance_prompt="x").samples[0].captions == ("x",)


def test_an_instance_prompt_serves_all(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, caption_strategy="instanceprompt", instance_prompt=["a dog", "my dog"])
    assert {sample.captions for sample in dataset.samples} == {("a dog", "my dog")}


def test_a_missing_folder_names_key_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(tmp_path / "nowhere", tmp_path)
    assert caught.value.exit_code == EXIT_CONFIG
    assert str(caught.value).startswith("data.json: things.instance_data_dir: ")
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_an_empty_folder_names_key_and_file(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        build(tmp_path / "empty", tmp_path)
    assert caught.value.problems == [
        Problem(
            f"there are no images in {tmp_path / 'empty'}",
            "things.instance_data_dir",
            "data.json",
            allowed="a place with images (png, jpg, webp, bmp, gif, tiff, avif, heic)",
            fix="put images there, or correct the path",
        )
    ]


def test_nothing_usable_lists_the_reasons(tmp_path: Path) -> None:
    root = tmp_path / "bad"
    root.mkdir()
    for number in range(3):
        (root / f"text_{number}.png").write_text("hello")
    (root / "zero.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        build(root, tmp_path)
    [problem] = caught.value.problems
    assert problem.message.startswith(f"none of the 4 images in {root} can be used: 3 x not an image")
    assert problem.message.endswith(", 1 x the file is empty")
    assert problem.fix == "replace the files, or change the setting that the reason names"


def test_all_faulty_entries_are_reported_at_once(tmp_path: Path) -> None:
    entries = [
        ImageDataset(id="one", instance_data_dir=tmp_path / "a"),
        ImageDataset(id="two", instance_data_dir=tmp_path / "b", crop_aspect="closest"),
    ]
    with pytest.raises(ConfigError) as caught:
        build_datasets(entries, options(aspect_bucket_alignment=24), OMNIGEN, tmp_path / "work")
    keys = {problem.key for problem in caught.value.problems}
    assert keys >= {"one.instance_data_dir", "two.instance_data_dir", "two.crop_aspect_buckets"}
    assert "aspect_bucket_alignment" in keys


def test_the_fingerprint_follows_content_crops_and_captions(folder: Path, tmp_path: Path) -> None:
    for number in range(5):
        (folder / f"a_thing_{number}.txt").write_text("one")

    def fingerprint(**changes) -> str:
        return build(folder, tmp_path, caption_strategy="textfile", **changes).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    seen = {first, fingerprint(crop=False), fingerprint(crop_style="corner"), fingerprint(disable_multiline_split=True)}
    (folder / "a_thing_3.txt").write_text("two")
    seen.add(fingerprint())
    write_image(folder / "a_thing_0.png", seed=99)
    seen.add(fingerprint())
    (folder / "a_thing_4.png").rename(folder / "a_thing_9.png")
    (folder / "a_thing_4.txt").rename(folder / "a_thing_9.txt")
    seen.add(fingerprint())
    assert len(seen) == 7


def test_a_dataset_that_moves_keeps_its_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = build(folder, tmp_path).fingerprint
    folder.rename(tmp_path / "moved")
    assert build(tmp_path / "moved", tmp_path).fingerprint == before


def test_an_image_that_changed_since_the_scan_is_not_read_as_the_old_one(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path)
    sample = dataset.samples[0]
    write_image(folder / sample.path, seed=99)
    with pytest.raises(DataError, match="changed since"):
        dataset.read_pixels(sample)
    (folder / sample.path).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        dataset.read_pixels(sample)


def test_random_crops_are_keyed_by_content_not_by_name(folder: Path, tmp_path: Path) -> None:
    before = {sample.digest: sample.crop for sample in build(folder, tmp_path, crop_style="random").samples}
    (folder / "a_thing_1.png").rename(folder / "z.png")
    after = {sample.digest: sample.crop for sample in build(folder, tmp_path, crop_style="random").samples}
    assert after == before


def test_random_aspects_fill_the_buckets_that_their_samples_are_cut_to(folder: Path, tmp_path: Path) -> None:
    for number in range(20):
        write_image(folder / f"more_{number}.png", seed=100 + number)
    dataset = build(folder, tmp_path, crop_aspect="random", crop_aspect_buckets=[0.5, 1.0, 2.0])
    assert len(dataset.buckets) == 3
    for size, members in dataset.buckets.items():
        assert {(sample.crop.height, sample.crop.width) for sample in dataset.samples.take(members)} == {size}


def test_the_sampler_sees_every_sample_of_a_dataset(folder: Path, tmp_path: Path) -> None:
    dataset = build(folder, tmp_path, crop=False, repeats=3)
    sampler = Sampler([dataset], 2, seed=1)
    seen = Counter(
        index for position in range(sampler.batches_in(0)) for index in sampler.batch(0, position).sample_indices
    )
    assert seen == dict.fromkeys(range(5), 4)


def test_slices_and_iteration_give_the_same_samples(folder: Path, tmp_path: Path) -> None:
    samples = build(folder, tmp_path).samples
    assert list(samples) == samples[:] == [samples[index] for index in range(5)]
    assert samples[-2:] == [samples[3], samples[4]]
    with pytest.raises(IndexError):
        samples[5]


def test_a_trusted_folder_is_scanned_once_and_then_taken_as_it_was(folder: Path, tmp_path: Path) -> None:
    def paths(words: str) -> list[str]:
        return [sample.path for sample in build(folder, tmp_path, skip_file_discovery=words).samples]

    before = paths("metadata")
    assert before
    write_image(folder / "a_new_thing.png")
    assert paths("metadata") == paths("vae,aspect") == before
    assert len(paths("vae text")) == len(before) + 1
    assert len(paths("metadata")) == len(before) + 1


def test_what_an_epoch_shows_of_datasets_that_are_mixed_evenly(folder: Path, tmp_path: Path) -> None:
    entries = [
        ImageDataset(id="a", instance_data_dir=folder, repeats=9),
        ImageDataset(id="b", instance_data_dir=folder, max_num_samples=1, probability=2),
    ]
    config = options(data_backend_sampling="uniform")
    datasets = build_datasets(entries, config, OMNIGEN, tmp_path / "work")
    count = len(datasets[0].samples)
    # 10 passes of the first and two of one image, divided as 1 to 2.
    shares = [round((10 * count + 2) / 3), round(2 * (10 * count + 2) / 3)]
    assert [dataset.filter_report.per_epoch for dataset in datasets] == shares


def test_tags_are_shuffled_everywhere_but_where_an_entry_says_no(folder: Path, tmp_path: Path) -> None:
    for name in ("one, two, three, four, five.png",):
        write_image(folder / name)
    config = options(caption_shuffle=True)

    def variants(**keys) -> set[int]:
        cls = EvalDataset if keys.get("dataset_type") == "eval" else ImageDataset
        (dataset,) = build_datasets([cls(id="a", instance_data_dir=folder, **keys)], config, OMNIGEN, tmp_path / "w")
        return {len(sample.captions) for sample in dataset.samples if "two" in sample.path}

    assert variants() == {2}
    assert variants(caption_shuffle={"enable": True, "count": 5}) == {6}
    assert variants(caption_shuffle=False) == variants(dataset_type="eval") == {1}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_entry_that_trusts_a_folder_hides_nothing_from_another_over_it(folder, tmp_path, order) -> None:
    build(folder, tmp_path)
    write_image(folder / "a_new_thing.png", 64, 64, seed=9)
    entries = [
        ImageDataset(id="trusting", instance_data_dir=folder, skip_file_discovery=("metadata",)),
        ImageDataset(id="looking", instance_data_dir=folder),
    ]
    built = build_datasets([entries[index] for index in order], options(), OMNIGEN, tmp_path / "work")
    assert {each.id: len(each.samples) for each in built}["looking"] == 6


def test_a_bucket_as_long_as_the_family_allows_is_used_and_a_longer_one_is_not(folder: Path, tmp_path: Path) -> None:
    rules = BucketRules(64, "pixel", crop=False, alignment=16)
    for longest, fits in ((127, False), (128, True)):
        assert _fits(64, 128, rules, replace(OMNIGEN, max_size=longest)) is fits


def test_a_subset_is_chosen_by_the_seed_and_the_dataset(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / f"things/a_thing_{number}.png", seed=number)

    def chosen(seed: int, name: str) -> set[str]:
        entry = ImageDataset(id=name, instance_data_dir=tmp_path / "things", max_num_samples=6)
        (dataset,) = build_datasets([entry], options(seed=seed), OMNIGEN, tmp_path / "work")
        return {sample.path for sample in dataset.samples}

    first = chosen(1, "a")
    assert len(first) == 6
    assert chosen(1, "a") == first
    assert chosen(2, "a") != first
    assert chosen(1, "b") != first


def test_ten_examples_of_a_reason_are_kept_however_often_it_comes() -> None:
    skipped = SkippedFiles()
    for start in (0, 6, 12):
        skipped.add_many("too small", 6, [f"{number}.png" for number in range(start, start + 6)])
    assert skipped.counts == {"too small": 18}
    assert skipped.examples == {"too small": [f"{number}.png" for number in range(10)]}


def test_the_report_of_a_dataset_by_hand() -> None:
    skipped = SkippedFiles()
    skipped.add_many("too small", 4, [f"{number}.png" for number in range(4)])
    skipped.add_many("damaged", 3, ["x.png", "y.png", "z.png"])
    report = FilterReport(
        *("things", 20, 17, 13, 12, 11, 22, 2),
        buckets={(48, 96): 4, (64, 64): 7},
        skipped=skipped,
        notes={
            "frames": Note(4, ("a.gif", "b.gif", "c.gif", "d.gif")),
            "one": Note(3, tuple("abc")),
            "m": Note(1234, ("d",)),
        },
    )
    assert report.lines() == [
        "things: 20 found, 17 readable, 13 large enough, 12 captioned, 11 used, 22 per epoch",
        "  sizes (width x height): 96x48: 4, 64x64: 7",
        "  2 of the same content as another image; all are used",
        "  4 with frames (a.gif, b.gif, c.gif, ...)",
        "  3 with one (a, b, c)",
        "  1,234 with m (d, ...)",
        "  4 not used: too small (0.png, 1.png, 2.png, ...)",
        "  3 not used: damaged (x.png, y.png, z.png)",
    ]
    found = report.as_json()
    assert found["sizes"] == {"96x48": 4, "64x64": 7}
    stages = ("found", "readable", "large_enough", "captioned", "held_out", "bucketed", "per_epoch", "duplicates")
    assert [found[name] for name in stages] == [20, 17, 13, 12, 0, 11, 22, 2]
    assert found["notes"][0] == {
        "note": "frames",
        "count": 4,
        "examples": ["a.gif", "b.gif", "c.gif", "d.gif"],
    }
    assert skipped.summary() == "4 x too small, 3 x damaged"


def test_of_many_reasons_the_most_frequent_are_shown_and_the_rest_is_counted() -> None:
    skipped = SkippedFiles()
    for number in range(23):
        skipped.add_many(f"reason {number:02d}", 30 - number, ["a.png"])
    lines = FilterReport(*("things", 1, 1, 1, 1, 1, 1, 0), buckets={}, skipped=skipped).lines()
    assert lines[1].startswith("  30 not used: reason 00")
    assert lines[-2].startswith("  11 not used: reason 19")
    # 10, 9 and 8 of the last three reasons.
    assert lines[-1] == "  27 more not used, for other reasons: dataset_set_aside.jsonl lists all"


def test_of_eleven_images_without_a_caption_ten_are_named(tmp_path: Path) -> None:
    for number in range(12):
        write_image(tmp_path / "images" / f"{number:02d}.png", seed=number)
    (tmp_path / "images" / "11.txt").write_text("a thing")
    with pytest.raises(DataError, match=r"11 of 12 images have no text file .*: 00\.png, .*09\.png, \.\.\."):
        build(tmp_path / "images", tmp_path, caption_strategy="textfile")
