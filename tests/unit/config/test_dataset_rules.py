"""Rules within and between the entries of the data file; the other ways in which entries are written."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from simpletuner.config.caption_filters import parse_filter
from simpletuner.config.dataset_values import AspectBucket, TagShuffle
from simpletuner.config.datasets import ConditioningDataset, ImageDataset, TextEmbedsDataset

from .conftest import Workspace

MASKS: dict[str, Any] = {
    "id": "masks",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "datasets/masks",
}


REFERENCES: dict[str, Any] = {
    "id": "sources",
    "dataset_type": "conditioning",
    "conditioning_type": "reference_strict",
    "instance_data_dir": "datasets/sources",
}


@pytest.fixture
def masked(workspace: Workspace) -> Workspace:
    (workspace.root / "datasets/masks").mkdir()
    workspace.datasets[0]["conditioning_data"] = "masks"
    workspace.datasets.append(dict(MASKS))
    return workspace


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"crop_aspect_buckets": [{"aspect_bucket": 1, "weight": 2}]}, "crop_aspect_buckets", "does not sample by"),
        (
            {"crop_aspect": "random", "crop_aspect_buckets": [{"aspect_bucket": 1, "weight": 0}]},
            "crop_aspect_buckets",
            "every aspect ratio the weight 0",
        ),
        (
            {"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1},
            "minimum_aspect_ratio",
            "no image would be left",
        ),
        ({"start_step": 20, "end_step": 10}, "end_step", "is before start_step, which is 20"),
        ({"start_step": 5}, "start_step", "no dataset takes part in step 1"),
        ({"end_step": 50}, "end_step", "no dataset takes part in step 51"),
        ({"start_epoch": 2, "end_epoch": 1}, "end_epoch", "is before start_epoch"),
        ({"probability": 0}, "probability", "nothing to train on"),
        ({"conditioning_data": "gone"}, "conditioning_data", '"gone" is not a dataset of dataset_type conditioning'),
        ({"metadata_file": "x.csv"}, "metadata_file", "has no use: caption_strategy is filename"),
        ({"caption_strategy": "csv"}, "metadata_file", "the folder holds none of metadata.csv"),
        ({"caption_strategy": "csv", "metadata_file": "x.csv"}, "metadata_file", "is not there"),
    ],
)
def test_keys_that_do_not_go_together(workspace: Workspace, changes: dict[str, Any], key: str, words: str) -> None:
    workspace.datasets[0] |= changes
    problems = workspace.fails_written().problems
    found = [problem for problem in problems if problem.key == f"images.{key}" and words in problem.render()]
    assert len(found) == 1, problems
    assert found[0].file == "config/multidatabackend.json"
    if key in changes:
        assert found[0].line == workspace.line("config/multidatabackend.json", key)


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, None)],
        [(0, 30), (30, None)],
        [(1, 100), (101, 0)],
        [(50, None), (0, 60)],
        [(0, 99), (100, 100)],
        [(0, 90), (10, 20), (91, None)],
    ],
)
def test_ranges_of_steps_that_meet_are_taken(workspace: Workspace, ranges: list[tuple[int, int | None]]) -> None:
    workspace.datasets = [
        {"id": f"d{number}", "instance_data_dir": "datasets/images", "start_step": start, "end_step": end}
        for number, (start, end) in enumerate(ranges)
    ]
    assert len(workspace.load_written().datasets) == len(ranges)  # a run of 100 steps


def test_a_gap_between_ranges_is_found(workspace: Workspace) -> None:
    workspace.datasets = [
        {"id": "a", "instance_data_dir": "datasets/images", "end_step": 30},
        {"id": "b", "instance_data_dir": "datasets/images", "start_step": 40},
    ]
    (problem,) = workspace.fails_written().problems
    assert (problem.key, "step 31" in problem.message) == ("b.start_step", True)


def test_a_length_in_epochs_and_a_schedule_in_steps_do_not_go_together(workspace: Workspace) -> None:
    workspace.config |= {"max_train_steps": 0, "num_train_epochs": 3}
    workspace.datasets.append({"id": "b", "instance_data_dir": "datasets/images", "start_step": 40})
    (problem,) = workspace.fails_written().problems
    assert problem.key == "b.start_step"
    assert "num_train_epochs" in problem.render()


@pytest.mark.parametrize("key", ["random_flip", "probability", "start_step", "train_batch_size", "conditioning_data"])
def test_an_eval_dataset_takes_no_key_of_training(masked: Workspace, key: str) -> None:
    values = {"random_flip": True, "probability": 0.5, "start_step": 3, "train_batch_size": 2}
    masked.datasets.append({"id": "e", "dataset_type": "eval", "instance_data_dir": "datasets/images"})
    masked.datasets[-1][key] = values.get(key, "masks")
    (problem,) = masked.fails_written().problems
    assert problem.key == f"e.{key}"
    assert "never trained on" in problem.message


def test_masks_are_named_by_the_images_or_name_them(masked: Workspace) -> None:
    kinds = [type(entry) for entry in masked.load_written().datasets]
    assert kinds == [ImageDataset, ConditioningDataset]
    del masked.datasets[0]["conditioning_data"]
    assert "its masks are not used" in "".join(masked.load_written().warnings)
    masked.datasets[1]["source_dataset_id"] = "images"
    assert "its masks are not used" not in "".join(masked.load_written().warnings)
    masked.datasets[1]["source_dataset_id"] = "gone"
    assert masked.fails_written().problems[0].key == "masks.source_dataset_id"


def test_images_have_one_set_of_masks(masked: Workspace) -> None:
    masked.datasets.append(MASKS | {"id": "more"})
    masked.datasets[0]["conditioning_data"] = ["masks", "more"]
    (problem,) = masked.fails_written().problems
    assert problem.key == "images.conditioning_data"
    assert "masks and more both hold masks" in problem.message


def test_masks_among_the_images_are_refused(masked: Workspace) -> None:
    (masked.root / "datasets/images/masks").mkdir()
    masked.datasets[1]["instance_data_dir"] = "datasets/images/masks"
    (problem,) = masked.fails_written().problems
    assert problem.key == "masks.instance_data_dir"
    masked.datasets[1]["instance_data_dir"] = "datasets/gone"
    assert "there is no folder of this name" in masked.fails_written().render()


def test_control_images_are_refused_by_name(masked: Workspace) -> None:
    masked.datasets[1]["conditioning_type"] = "controlnet"
    (problem,) = masked.fails_written().problems
    assert problem.key == "masks.conditioning_type"
    assert '"controlnet" cannot be used' in problem.message


@pytest.fixture
def edits(workspace: Workspace) -> Workspace:
    """Images with references, for a family that takes up to three."""
    (workspace.root / "datasets/sources").mkdir()
    workspace.config["model_family"] = "omnigen"
    workspace.datasets[0]["conditioning_data"] = "sources"
    workspace.datasets.append(REFERENCES | {})
    return workspace


def test_references_are_taken_with_their_sizes(edits: Workspace) -> None:
    edits.datasets[1] |= {"conditioning_type": "reference_loose", "resolution": 0.5, "resolution_type": "area"}
    entry = edits.load_written().datasets[1]
    assert (entry.resolution, entry.resolution_type) == (0.5, "area")


def test_sizes_of_strict_references_have_no_effect_and_that_is_reported(edits: Workspace) -> None:
    edits.datasets[1] |= {"resolution": 512, "cache_dir_vae": "cache/sources"}
    loaded = edits.load_written()
    (line,) = [line for line in loaded.warnings if "without effect" in line]
    assert "sources: without effect: resolution; references" in line
    assert loaded.datasets[1].cache_dir_vae is not None


@pytest.mark.parametrize("by_source", [False, True])
def test_a_family_without_references_refuses_them_by_name(edits: Workspace, by_source: bool) -> None:
    edits.config["model_family"] = "toy"
    if by_source:
        edits.datasets[1]["source_dataset_id"] = edits.datasets[0]["id"]
        del edits.datasets[0]["conditioning_data"]
    (problem,) = edits.fails_written().problems
    assert problem.key == ("sources.conditioning_type" if by_source else "images.conditioning_data")
    assert "sources holds reference images, and Toy takes none" in problem.message


def test_more_references_than_the_family_takes_are_refused_unless_one_is_drawn(edits: Workspace) -> None:
    edits.datasets += [REFERENCES | {"id": f"s{number}"} for number in range(3)]
    edits.datasets[0]["conditioning_data"] = ["sources", "s0", "s1", "s2"]
    (problem,) = edits.fails_written().problems
    assert "give each image 4 references; OmniGen takes 3" in problem.message
    edits.config["conditioning_multidataset_sampling"] = "random"
    edits.load_written()


def test_an_eval_dataset_has_references_and_no_masks(edits: Workspace) -> None:
    held_out = {"id": "e", "dataset_type": "eval", "instance_data_dir": "datasets/images"}
    edits.datasets.append(held_out | {"conditioning_data": "sources"})
    entry = edits.load_written().datasets[-1]
    assert (entry.id, entry.dataset_type, tuple(entry.conditioning_data)) == ("e", "eval", ("sources",))
    masks = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "datasets/m"}
    edits.datasets[-1]["conditioning_data"] = "m"
    edits.datasets.append(masks)
    (edits.root / "datasets/m").mkdir()
    assert "mask" in edits.fails_written().problems[0].message


def test_references_among_their_own_images_are_refused_and_those_of_others_are_not(edits: Workspace) -> None:
    edits.datasets[1]["instance_data_dir"] = "datasets/images"
    assert edits.fails_written().problems[0].key == "sources.instance_data_dir"
    edits.datasets[1]["instance_data_dir"] = "datasets/sources"
    # A change is learned in both directions: the images of the one are the references of the other.
    edits.datasets += [
        {"id": "back", "instance_data_dir": "datasets/sources", "conditioning_data": "targets"},
        REFERENCES | {"id": "targets", "instance_data_dir": "datasets/images"},
    ]
    edits.load_written()


def test_keys_of_images_in_an_entry_of_masks_are_reported_and_do_nothing(masked: Workspace) -> None:
    """The masked-loss example of the peer's documentation writes them."""
    masked.datasets[1] |= {"resolution": 512, "crop": False, "cache_dir_vae": "x", "caption_strategy": "textfile"}
    (line,) = [line for line in masked.load_written().warnings if "without effect" in line]
    assert "masks: without effect: resolution, crop, cache_dir_vae, caption_strategy" in line
    masked.datasets[1]["cropp"] = True
    assert "there is no option of this name" in masked.fails_written().render()


def test_crops_resampled_that_do_not_differ_are_reported(workspace: Workspace) -> None:
    workspace.datasets[0]["vae_cache_clear_each_epoch"] = True
    assert "resamples nothing" in "".join(workspace.load_written().warnings)
    workspace.datasets[0]["crop_style"] = "random"
    assert "resamples nothing" not in "".join(workspace.load_written().warnings)


def test_the_example_with_a_parquet_object_is_read(workspace: Workspace) -> None:
    (workspace.root / "datasets/images/bucket.parquet").write_bytes(b"")
    workspace.datasets[0] |= {
        "caption_strategy": "parquet",
        "metadata_backend": "parquet",
        "parquet": {
            "path": "bucket.parquet",
            "filename_column": "id",
            "caption_column": "long_caption",
            "fallback_caption_column": "tags",
            "width_column": "width",
            "height_column": "height",
            "identifier_includes_extension": False,
        },
        "crop_aspect": "closest",
        "crop_aspect_buckets": [1.0, 0.75, 1.23],
    }
    run = workspace.load_written()
    (entry,) = run.datasets
    assert isinstance(entry, ImageDataset)
    assert entry.metadata_file == workspace.root / "datasets/images/bucket.parquet"
    assert (entry.filename_column, entry.caption_column) == ("id", ("long_caption", "tags"))
    assert entry.crop_aspect_buckets == (AspectBucket(1.0), AspectBucket(0.75), AspectBucket(1.23))
    assert sum("images are measured" in line for line in run.warnings) == 3
    workspace.datasets[0]["parquet"]["widht_column"] = "w"
    assert "images.parquet.widht_column" in workspace.fails_written().render()


def test_the_columns_in_a_huggingface_object_are_read_and_its_filters_refused(workspace: Workspace) -> None:
    del workspace.datasets[0]["instance_data_dir"]
    workspace.datasets[0] |= {
        "type": "huggingface",
        "dataset_name": "somebody/images",
        "caption_strategy": "huggingface",
        "metadata_backend": "huggingface",
        "huggingface": {"image_column": "png", "caption_column": "short", "fallback_caption_column": "long"},
    }
    (entry,) = workspace.load_written().datasets
    assert isinstance(entry, ImageDataset)
    assert (entry.image_column, entry.caption_column) == ("png", ("short", "long"))
    workspace.datasets[0]["huggingface"]["filter_func"] = {"quality_thresholds": {"clarity": 2}}
    assert "all rows of the split are used" in workspace.fails_written().render()


def test_a_shuffle_is_an_object(workspace: Workspace) -> None:
    workspace.datasets[0]["caption_shuffle"] = {"enable": "true", "count": "3", "split_on": "space"}
    assert workspace.load_written().datasets[0].caption_shuffle == TagShuffle(count=3, split_on="space")
    for off in (False, {"count": 3}, None):
        workspace.datasets[0]["caption_shuffle"] = off
        assert workspace.load_written().datasets[0].caption_shuffle is None


@pytest.mark.parametrize(("name", "text"), [("f.txt", "cat\n\ns/a/b/\n"), ("f.json", '["cat", "s/a/b/"]')])
def test_filters_stand_in_the_entry_or_in_a_file(workspace: Workspace, name: str, text: str) -> None:
    workspace.put(f"config/{name}", text)
    for written in (name, [name], ["cat", "s/a/b/"]):
        workspace.datasets = [
            {"id": "images", "instance_data_dir": "datasets/images"},
            {"id": "t", "dataset_type": "text_embeds", "caption_filter_list": written},
        ]
        entry = workspace.load_written().datasets[1]
        assert isinstance(entry, TextEmbedsDataset)
        assert entry.caption_filter_list == ("cat", "s/a/b/")


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        (["("], "is not a regular expression"),
        (["s/a/b"], "is not of the form s/expression/replacement/"),
        ([r"s/a/\2/"], "is not a regular expression"),
        (["gone.txt"], "cannot be read"),
        (["s//b/"], "has no expression"),
    ],
)
def test_filters_that_cannot_work_are_named(workspace: Workspace, filters: list[str], words: str) -> None:
    workspace.datasets.append({"id": "t", "dataset_type": "text_embeds", "caption_filter_list": filters})
    (problem,) = workspace.fails_written().problems
    assert problem.key == "t.caption_filter_list"
    assert words in problem.render()


def test_filters_of_an_entry_that_is_not_the_default_are_refused(workspace: Workspace) -> None:
    for name, default in (("t", True), ("u", False)):
        workspace.datasets.append({"id": name, "dataset_type": "text_embeds", "default": default})
    workspace.datasets[-1]["caption_filter_list"] = ["cat"]
    (problem,) = workspace.fails_written().problems
    assert problem.key == "u.caption_filter_list"


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("cat", "a cat sat", "a  sat"),
        ("s/cat/dog/", "a cat sat", "a dog sat"),
        (r"s/(\w+) sat/\1 ran/", "a cat sat", "a cat ran"),
        ("s#a/b#c#", "a/b", "c"),
        (r"s/a\/b/c/", "a/b", "c"),
        (r"s/and/\//", "black and white", "black / white"),
        ("spam", "spam and eggs", " and eggs"),
        ("s", "cats", "cat"),
    ],
)
def test_edits_of_captions(text: str, before: str, after: str) -> None:
    pattern, replacement = parse_filter(text)
    assert pattern.sub(replacement, before) == after


def test_what_an_entry_leaves_out_of_its_caches_comes_from_the_configuration(workspace: Workspace) -> None:
    workspace.config["vae_cache_disable"] = True
    workspace.datasets.append(
        {"id": "b", "instance_data_dir": "datasets/images", "vae_cache_disable": json.loads("false")}
    )
    first, second = workspace.load_written().datasets
    assert (first.vae_cache_disable, second.vae_cache_disable) == (True, False)


def test_text_that_no_encoder_can_take_is_refused_wherever_it_is_written(workspace: Workspace) -> None:
    workspace.datasets[0] |= {"caption_strategy": "instanceprompt", "instance_prompt": "a\0b"}
    (problem,) = workspace.fails_written().problems
    assert problem.key == "images.instance_prompt"
    assert "NUL" in problem.message
    workspace.datasets[0]["instance_prompt"] = "a"
    workspace.environment = {"SIMPLETUNER_VALIDATION_PROMPT": os.fsdecode(b"caf\xe9")}
    (problem,) = workspace.fails_written().problems
    assert problem.key == "validation_prompt"
    assert "not UTF-8" in problem.message


def test_only_line_ends_end_a_line_of_a_filter_file(workspace: Workspace) -> None:
    workspace.put("config/f.txt", "cat\x0bdog\ns/a/b\u2028/")
    workspace.datasets.append({"id": "t", "dataset_type": "text_embeds", "caption_filter_list": "f.txt"})
    entry = workspace.load_written().datasets[1]
    assert isinstance(entry, TextEmbedsDataset)
    assert entry.caption_filter_list == ("cat\x0bdog", "s/a/b\u2028/")


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"dropped_prompt_embeds_column": "dropped"}, "dropped_prompt_embeds_column", "without prompt_embeds_column"),
        ({"prompt_embeds_column": "embeds"}, "prompt_embeds_column", "set caption_strategy to csv or parquet"),
        (
            {"prompt_embeds_column": "embeds", "caption_strategy": "csv", "caption_shuffle": {"enable": True}},
            "prompt_embeds_column",
            "remove caption_shuffle",
        ),
    ],
)
def test_files_of_embeddings_are_those_of_captions_as_they_are(
    workspace: Workspace, changes: dict[str, Any], key: str, words: str
) -> None:
    workspace.put("datasets/images/metadata.csv", "file_name,text,embeds\na.png,a cat,a.safetensors\n")
    workspace.config["model_family"] = "sdxl"
    workspace.datasets[0] |= changes
    problems = workspace.fails_written().problems
    assert [problem.key for problem in problems] == [f"images.{key}"]
    assert words in problems[0].render()


def test_a_family_without_files_of_embeddings_refuses_them(workspace: Workspace) -> None:
    workspace.put("datasets/images/metadata.csv", "file_name,text,embeds\na.png,a cat,a.safetensors\n")
    workspace.datasets[0] |= {"prompt_embeds_column": "embeds", "caption_strategy": "csv"}
    assert "files of embeddings are not read for Toy" in workspace.fails_written().render()


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"records_file": "none.jsonl"}, "records_file", "there is no file or folder of this name"),
        ({"crop": True}, "crop", "targets keep their shape"),
        ({"crop_style": "random"}, "crop_style", "targets keep their shape"),
        ({"max_num_samples": 3}, "max_num_samples", "the table says which rows"),
        ({"conditioning_data": "before"}, "conditioning_data", "the rows name their references"),
        ({"max_output_pixels": 65536, "resolution": 512}, "max_output_pixels", "resolution is written too"),
        ({"max_input_pixels": [65536, 0]}, "max_input_pixels", "number of pixels"),
        ({"caption_strategy": "textfile"}, "caption_strategy", "has no source in a dataset of type records"),
    ],
)
def test_records_take_no_key_of_folders(workspace: Workspace, changes: dict[str, Any], key: str, words: str) -> None:
    workspace.put("rows.jsonl", "{}\n")
    workspace.datasets = [{"id": "edits", "type": "records", "records_file": "rows.jsonl", **changes}]
    found = [problem for problem in workspace.fails_written().problems if problem.key == f"edits.{key}"]
    assert any(words in problem.render() for problem in found), workspace.fails_written().render()


def test_records_start_from_the_working_folder_which_may_hold_the_output(workspace: Workspace) -> None:
    workspace.put("rows.jsonl", "{}\n")
    workspace.datasets = [{"id": "edits", "type": "records", "records_file": "rows.jsonl", "max_input_pixels": 65536}]
    [entry] = workspace.load_written().datasets
    assert (entry.instance_data_dir, entry.records_file) == (workspace.root, workspace.root / "rows.jsonl")
    assert (entry.caption_strategy, entry.max_input_pixels) == ("records", (65536,))
