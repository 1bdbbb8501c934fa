"""Where images are: the keys of each type of dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.dataset_loading import read_datasets
from simpletuner.config.datasets import ImageDataset, dataset_options
from simpletuner.config.json_reader import parse_json
from simpletuner.config.options import TrainConfig
from simpletuner.config.sources import SOURCE_RULES, ImageSource, source_faults
from simpletuner.config.yaml_reader import read_yaml
from simpletuner.errors import ConfigError, Problem
from tests.runs import load_here, write_run

CONFIG = TrainConfig.from_values({"model_family": "toy"})
COMPLETE: dict[str, dict[str, Any]] = {
    "local": {"instance_data_dir": "images", "follow_outside_links": True},
    "aws": {
        "aws_bucket_name": "b",
        "aws_data_prefix": "p/",
        "aws_endpoint_url": "http://x",
        "aws_region_name": "r",
        "aws_access_key_id": "someone",
        "aws_secret_access_key": "very-secret-words",
    },
    "huggingface": {
        "dataset_name": "me/set",
        "dataset_config": "small",
        "split": "test",
        "revision": "v1",
        "image_column": "photo",
        "caption_column": ["long", "short"],
        "metadata_backend": "huggingface",
    },
    "records": {
        "records_file": "rows.jsonl",
        "instance_data_dir": "images",
        "skip_bad_rows": True,
        "languages": ["en", "zh"],
        "inverse_instructions": True,
        "tasks": "edit",
        "reference_weights": {"1": 2, "2": 1},
        "max_output_pixels": 1048576,
        "max_side_length": 2048,
        "max_input_pixels": [1048576, 589824],
    },
    "csv": {
        "csv_file": "a.csv",
        "csv_caption_column": "c",
        "filename_column": "f",
        "instance_data_dir": "images",
        "follow_outside_links": True,
    },
}


def read(kind: str, **keys: Any) -> tuple[list[ImageDataset], list[str]]:
    loaded = read_datasets(parse_json(json.dumps([{"id": "a", "type": kind, **keys}]), "data.json"), CONFIG)
    return loaded.entries, [problem.render() for problem in loaded.problems]


@pytest.mark.parametrize("kind", COMPLETE)
def test_every_key_of_a_type_is_taken(kind: str) -> None:
    (entry,), problems = read(kind, **COMPLETE[kind])
    assert problems == []
    assert entry.type == kind


@pytest.mark.parametrize("kind", COMPLETE)
def test_a_key_of_another_type_is_refused_by_name(kind: str) -> None:
    own = COMPLETE[kind]
    for other, keys in COMPLETE.items():
        rule = SOURCE_RULES[other]
        for key in (rule.place, *rule.others):
            if key in own or key in SOURCE_RULES[kind].others:
                continue
            _, problems = read(kind, **own, **{key: keys[key]})
            assert len(problems) == 1
            assert f"a.{key}: has no use with type {kind}" in problems[0]


@pytest.mark.parametrize(("kind", "key"), [(kind, rule.place) for kind, rule in SOURCE_RULES.items()])
def test_the_place_must_be_named(kind: str, key: str) -> None:
    keys = {name: value for name, value in COMPLETE[kind].items() if name != key}
    _, problems = read(kind, **keys)
    assert [f"a.{key}: is missing" in problem for problem in problems] == [True]


def test_half_a_login_is_refused() -> None:
    _, (problem,) = read("aws", aws_bucket_name="b", aws_access_key_id="someone")
    assert "a.aws_secret_access_key: is missing" in problem
    _, (problem,) = read("aws", aws_bucket_name="b", aws_secret_access_key="very-secret-words")
    assert "a.aws_access_key_id: is missing" in problem


@pytest.mark.parametrize("key", ["csv_url_column", "csv_cache_dir", "huggingface"])
def test_downloads_and_filters_are_refused_by_name(key: str) -> None:
    _, (problem,) = read("csv", csv_file="a.csv", **{key: "x"})
    assert f"a.{key}" in problem
    assert "cannot be used" in problem


@pytest.mark.parametrize("key", ["aws_secret_access_key", "aws_access_key_id"])
def test_a_secret_is_shown_nowhere(key: str) -> None:
    (entry,), _ = read("aws", **COMPLETE["aws"])
    for shown in (repr(entry), str(entry), entry.model_dump_json(), json.dumps(entry.model_dump(), default=str)):
        assert COMPLETE["aws"][key] not in shown
    _, problems = read("aws", **(COMPLETE["aws"] | {key: ["very-secret-words"]}))
    assert "very-secret-words" not in "".join(problems)
    assert any(f"a.{key}" in problem for problem in problems)
    assert getattr(entry, key).get_secret_value() == COMPLETE["aws"][key]
    assert dataset_options("image")[key].is_secret


def test_every_key_of_a_source_belongs_to_a_type() -> None:
    owned = {key for rule in SOURCE_RULES.values() for key in (rule.place, *rule.others)}
    planned = {name for name, info in dataset_options("image").items() if info.planned}
    assert set(ImageSource.model_fields) - owned - planned == {"type"}
    assert list(source_faults(ImageSource(instance_data_dir=Path("x")))) == []


@pytest.mark.parametrize(
    ("kind", "config", "written", "expected"),
    [
        ("huggingface", "filename", None, "huggingface"),
        ("csv", "textfile", None, "csv"),
        ("csv", "textfile", "filename", "filename"),
        ("huggingface", "instanceprompt", None, "instanceprompt"),
        ("aws", "textfile", None, "textfile"),
    ],
)
def test_rows_give_their_own_captions_unless_set_otherwise(
    kind: str, config: str, written: str | None, expected: str
) -> None:
    options = CONFIG.with_values({"caption_strategy": config})
    keys = {"id": "a", "type": kind, **COMPLETE[kind], "caption_strategy": written}
    (entry,) = read_datasets(parse_json(json.dumps([keys]), "data.json"), options).entries
    assert entry.caption_strategy == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "aws", "aws_bucket_name": "b", "caption_strategy": "csv"}, 'caption_strategy: "csv" has no source'),
        (
            {"type": "huggingface", "dataset_name": "me/x", "caption_strategy": "textfile"},
            "huggingface, instanceprompt",
        ),
        ({"type": "csv", "csv_file": "none.csv"}, "a.csv_file"),
        ({"type": "huggingface", "dataset_name": "./none"}, "a.dataset_name"),
        ({"type": "csv", "csv_file": "config.json", "metadata_file": "x.csv"}, "a.metadata_file: has no use"),
        ({"instance_data_dir": "images", "metadata_backend": "huggingface"}, "a.metadata_backend"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, omnigen_folder: Path, keys: dict[str, Any], words: str
) -> None:
    (tmp_path / "images").mkdir()
    write_run(tmp_path, omnigen_folder, data=[{"id": "a", "resolution": 64, **keys}])
    with pytest.raises(ConfigError) as caught:
        load_here(tmp_path)
    assert words in str(caught.value)


def test_paths_of_tables_are_found_in_the_working_folder(tmp_path: Path, omnigen_folder: Path) -> None:
    (tmp_path / "tables").mkdir()
    (tmp_path / "a.csv").write_text("file_name,caption\n")
    keys = {"resolution": 64}
    data = [
        {"id": "a", "type": "csv", "csv_file": "a.csv", **keys},
        {"id": "b", "type": "huggingface", "dataset_name": "tables", **keys},
        {"id": "c", "type": "huggingface", "dataset_name": "me/set", **keys},
    ]
    first, second, third = load_here(write_run(tmp_path, omnigen_folder, data=data)).datasets
    assert first.csv_file == tmp_path / "a.csv"
    assert second.dataset_name == str(tmp_path / "tables")
    assert third.dataset_name == "me/set"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"a: [1\nb: 2\n", 2, "is not YAML: expected ',' or ']', but got ':'"),
        (b"- a\n", None, "holds no keys with values"),
        (b"", None, "holds no keys with values"),
        (b"a: 1\nb: 2\na: 3\n", 3, 'gives "a" twice'),
        (b"a: 1\nb: \xff\n", None, "is not UTF-8 text: line 2, byte 9 (0xff)"),
        (b"a: !!python/object:x.Y {}\n", None, None),
        (
            b"\n".join(b" " * n + b"k:" for n in range(22)) + b" 1\n",
            None,
            "is not YAML: mappings are nested too deeply",
        ),
    ],
)
def test_a_yaml_file_that_cannot_be_read_is_named_with_its_line(tmp_path, content, line, message) -> None:
    (tmp_path / "a.yml").write_bytes(content)
    if message is None:  # a tag of Python makes nothing
        assert read_yaml(tmp_path / "a.yml").values == {}
        return
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "a.yml")
    assert caught.value.problems == [Problem(message, file=str(tmp_path / "a.yml"), line=line)]


def test_values_of_yaml_are_found_by_their_path_and_line_with_numbers_as_people_write_them(tmp_path) -> None:
    (tmp_path / "a.yml").write_text("train:\n  lr: 1e-4\n  betas: [0.9, 1.5e+3]\n\nname: 1e4x\nwhen: .5e1\n")
    document = read_yaml(tmp_path / "a.yml")
    assert document.values == {"train.lr": 1e-4, "train.betas": [0.9, 1500.0], "name": "1e4x", "when": 5.0}
    assert document.lines == {"train": 1, "train.lr": 2, "train.betas": 3, "name": 5, "when": 6}
    assert document.problem("train.lr", "is 3", "1", "fix it") == Problem(
        "is 3", "train.lr", str(tmp_path / "a.yml"), 2, "1", "fix it"
    )
    with pytest.raises(ConfigError, match=r"gone\.yml: cannot be read: No such file"):
        read_yaml(tmp_path / "gone.yml")
