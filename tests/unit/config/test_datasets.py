"""Dataset entries: aliases, defaults from config.json, and keys that are refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from simpletuner.config.dataset_loading import LoadedDatasets, read_datasets
from simpletuner.config.dataset_values import TagShuffle
from simpletuner.config.datasets import EvalDataset, ImageDataset, TextEmbedsDataset, text_cache_entry
from simpletuner.config.json_reader import parse_json
from simpletuner.config.options import TrainConfig

CONFIG = TrainConfig.from_values({"model_family": "toy", "resolution": 512, "minimum_image_size": 64})


def read(*entries: Any) -> LoadedDatasets:
    return read_datasets(parse_json(json.dumps(list(entries), indent=1), "data.json"), CONFIG)


def read_one(**keys: Any) -> Any:
    loaded = read({"id": "a", "instance_data_dir": "x", **keys})
    assert loaded.problems == []
    return loaded.entries[0]


def fault(**keys: Any) -> str:
    (problem,) = read({"id": "a", "instance_data_dir": "x", **keys}).problems
    assert problem.file == "data.json"
    assert problem.line is not None
    return problem.render()


def test_kinds_are_distinguished_by_dataset_type() -> None:
    loaded = read(
        {"id": "a", "instance_data_dir": "x"},
        {"id": "b", "instance_data_dir": "x", "dataset_type": "eval"},
        {"id": "c", "dataset_type": "text_embeds", "default": True, "cache_dir": "y"},
    )
    assert [type(entry) for entry in loaded.entries] == [ImageDataset, EvalDataset, TextEmbedsDataset]


def test_what_an_entry_leaves_out_comes_from_the_configuration() -> None:
    entry = read_one()
    assert (entry.resolution, entry.resolution_type, entry.minimum_image_size) == (512, "pixel_area", 64)
    assert entry.caption_strategy == "filename"
    assert read_one(resolution=256, minimum_image_size=0).minimum_image_size == 0


def test_the_prompt_of_the_configuration_is_one_caption() -> None:
    config = TrainConfig.from_values({**CONFIG.values(), "instance_prompt": "a red cat"})
    entries = '[{"id": "a", "instance_data_dir": "x"}, {"id": "b", "instance_data_dir": "x", "instance_prompt": "c"}]'
    first, second = read_datasets(parse_json(entries, "data.json"), config).entries
    assert isinstance(first, ImageDataset)
    assert isinstance(second, ImageDataset)
    assert (first.instance_prompt, second.instance_prompt) == (("a red cat",), ("c",))


def test_tags_are_shuffled_where_the_configuration_says_so_but_not_of_an_eval_loss() -> None:
    config = TrainConfig.from_values({**CONFIG.values(), "caption_shuffle": True})
    changes: list[dict[str, Any]] = [{}, {"caption_shuffle": False}, {"dataset_type": "eval"}]
    entries = [{"id": str(number), "instance_data_dir": "x", **each} for number, each in enumerate(changes)]
    found = read_datasets(parse_json(json.dumps(entries), "data.json"), config).entries
    assert [entry.caption_shuffle for entry in found] == [TagShuffle(), None, None]


def test_the_text_cache_that_counts_is_the_default_or_the_only_one() -> None:
    a, b, c = (TextEmbedsDataset(id=name, default=name == "c") for name in "abc")
    assert text_cache_entry([a]) is a
    assert text_cache_entry([a, b, c]) is c
    assert text_cache_entry([a, b]) is text_cache_entry([]) is None


def test_sizes_in_another_unit_are_not_taken_over() -> None:
    entry = read_one(resolution_type="area", resolution=1)
    assert (entry.resolution, entry.minimum_image_size) == (1, None)


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ({"crop_style": "centre"}, "crop_style", "center"),
        ({"metadata_backend": "json"}, "metadata_backend", "discovery"),
        ({"is_regularization_data": "true"}, "is_regularisation_data", True),
        ({"caption_strategy": "instance_prompt", "instance_prompt": "a"}, "caption_strategy", "instanceprompt"),
        ({"instance_prompt": "one"}, "instance_prompt", ("one",)),
        ({"instance_prompt": ["one", "two"]}, "instance_prompt", ("one", "two")),
        ({"skip_file_discovery": ""}, "skip_file_discovery", ()),
        ({"skip_file_discovery": "vae,aspect metadata"}, "skip_file_discovery", ("vae", "aspect", "metadata")),
        ({"repeats": "3"}, "repeats", 3),
        ({"crop_aspect": "closest", "crop_aspect_buckets": [1, 1.5]}, "crop_aspect_buckets", ((1.0, 1.0), (1.5, 1.0))),
        ({"cache_dir_vae": None}, "cache_dir_vae", None),
    ],
)
def test_values_and_other_spellings(written: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(read_one(**written), key) == value


@pytest.mark.parametrize("key", ["disabled", "disable"])
def test_a_disabled_entry_takes_no_part_whatever_is_in_it(key: str) -> None:
    loaded = read({"id": "a", key: True, "type": "aws", "anything": 1}, {"id": "b", "instance_data_dir": "x"})
    assert (loaded.problems, loaded.disabled) == ([], ["a"])
    assert [entry.id for entry in loaded.entries] == ["b"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ({"type": "webshart"}, '"webshart" cannot be used: tar files are not read'),
        ({"dataset_type": "caption"}, "captions without images are not built"),
        ({"dataset_type": "evaluation"}, "image, eval, conditioning, text_embeds"),
        ({"dataset_type": "evl"}, 'did you mean "eval"?'),
        ({"caption_strategy": "webshart"}, "captions come from the image's name"),
        ({"crop_style": "face"}, "finding faces"),
        ({"crop_style": "middle"}, "center, corner, random"),
        ({"probability": -0.5}, "number >= 0"),
        ({"crop_aspect_buckets": [{"aspect_bucket": 1, "wieght": 2}]}, 'did you mean "weight"?'),  # codespell:ignore
        ({"crop_aspect_buckets": [1, 0]}, "not above 0"),
        ({"caption_shuffle": {"enable": True, "split_on": "tab"}}, "comma, space, period"),
        ({"caption_shuffle": True}, '{"enable": true'),
        ({"caption_shuffle": {"enable": True, "dropout": 1}}, "dropout must be at least 0 and below 1"),
        ({"caption_shuffle": {"enable": True, "keep_separator": ", "}}, "must not contain what split_on means"),
        ({"caption_shuffle": {"enable": True, "keep_seperator": "|||"}}, "keep_separator"),
        ({"skip_file_discovery": "vea"}, 'did you mean "vae"?'),
        ({"repeets": 3}, 'did you mean "repeats"?'),
        ({"disable_vae_cache": True}, 'write "vae_cache_disable"'),
        ({"repeats": -1}, "whole number >= 0"),
        ({"repeats": True}, "must be a whole number"),
        ({"crop": "perhaps"}, "must be true or false"),
        ({"is_regularisation_data": True, "is_regularization_data": False}, "given twice"),
        ({"instance_prompt": {"a": 1}}, "must be text"),
    ],
)
def test_faults_name_the_entry_and_the_key(written: dict[str, Any], words: str) -> None:
    text = fault(**written)
    assert words in text
    assert f"a.{next(iter(written))}" in text or "given twice" in text


def test_what_is_missing_is_named() -> None:
    loaded = read({"instance_data_dir": "x"}, {"id": "b"}, 7)
    assert [problem.key for problem in loaded.problems] == ["entry 1.id", "b.instance_data_dir", "entry 3"]
    assert [problem.line for problem in loaded.problems] == [2, 5, 8]


def test_an_id_is_used_once() -> None:
    loaded = read({"id": "a", "instance_data_dir": "x"}, {"id": "a", "instance_data_dir": "y"})
    assert "used twice" in loaded.problems[0].render()


def test_an_object_on_top_is_refused() -> None:
    loaded = read_datasets(parse_json("{}", "data.json"), CONFIG)
    assert "is not a list of datasets" in loaded.problems[0].render()
