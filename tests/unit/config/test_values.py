"""What each way of writing a value means, at the edges of what is allowed, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simpletuner.config.caption_filters import parse_filter, read_filter_file
from simpletuner.config.dataset_values import (
    AspectBucket,
    TagShuffle,
    read_aspect_buckets,
    read_count_weights,
    read_pixel_counts,
    read_skipped,
    read_tag_shuffle,
)
from simpletuner.config.nearby import nearest_path
from simpletuner.config.paths import (
    PACKAGE,
    Folders,
    adapter_file_in,
    adapter_on_hub,
    looks_like_path,
    windows_path_fix,
)
from simpletuner.config.patterns import may_match, sample_paths
from simpletuner.config.values import (
    LARGEST_INT,
    Size,
    parse_sizes,
    read_arguments,
    read_bool,
    read_float,
    read_int,
    read_interval,
    read_memory,
    read_name,
    read_numbers_of_layers,
    read_path,
    read_sigmas,
    read_text,
    read_words,
)

Reader = Callable[[Any], Any]


@pytest.mark.parametrize(
    ("read", "written", "value"),
    [
        *[(read_bool, word, True) for word in (True, 1, "true", " YES ", "on", "1")],
        *[(read_bool, word, False) for word in (False, 0, "false", "No", "off", "0")],
        *[(read_int, number, 1000) for number in (1000, "1000", 1000.0, "1e3", " 1000 ")],
        (read_int, -LARGEST_INT, -LARGEST_INT),
        (read_float, "4e-5", 4e-5),
        (read_float, 1e30, 1e30),
        (read_float, 0, 0.0),
        (read_text, 1024, "1024"),
        (read_name, " a \n\t b\r\nc ", "a b c"),
        (read_words, "a, b,c  d", ("a", "b", "c", "d")),
        *[(read_numbers_of_layers, layers, (7, 8, 9)) for layers in ("9,8, 7", "[7, 8, 9]", [9, 7, 8, 7])],
        (read_numbers_of_layers, 0, (0,)),
        (read_sigmas, "0.5,1", (0.5, 1.0)),
        (read_sigmas, "500, 1000,0", (0.0, 0.5, 1.0)),
        (read_sigmas, 1, (1.0,)),
        (read_sigmas, "1.5", (0.0015,)),
        (read_sigmas, "", None),
        (read_arguments, "eps=1e-8, --fused=true", {"eps": 1e-8, "fused": True}),
        (read_arguments, "kind=none,name=x,n=3", {"kind": None, "name": "x", "n": 3}),
        (read_arguments, '{"betas": [0.9, 0.99]}', {"betas": [0.9, 0.99]}),
        (read_interval, " 1 ", "1"),
        (read_interval, "AUTO", "auto"),
        (read_memory, "0.5", "0.5"),
        (read_memory, "Auto", "auto"),
        (read_path, "~/a", Path.home() / "a"),
        (read_path, "x" * 255, Path("x" * 255)),
        (parse_sizes, "8,16384, 1280x768", [Size(8, 8), Size(16384, 16384), Size(height=768, width=1280)]),
        (read_aspect_buckets, [1], (AspectBucket(1.0, 1.0),)),
        (read_aspect_buckets, [{"aspect_bucket": "0.5", "weight": 3}], (AspectBucket(0.5, 3.0),)),
        (read_aspect_buckets, [{"aspect_bucket": 2, "weight": 0}], (AspectBucket(2.0, 0.0),)),
        (read_skipped, "vae,text", ("vae", "text")),
        (read_pixel_counts, "4096", (4096,)),
        (read_pixel_counts, [1, "2"], (1, 2)),
        (read_count_weights, "0=1,2=0.5", {0: 1.0, 2: 0.5}),
        (read_count_weights, {"1": 0, "3": 2}, {1: 0.0, 3: 2.0}),
        (read_tag_shuffle, {"count": 3}, None),
        (read_tag_shuffle, False, None),
        (read_tag_shuffle, {"enable": "yes"}, TagShuffle(1, None, "comma", 0, True, None, 0.0)),
        (
            read_tag_shuffle,
            {
                **{"enable": True, "count": 1000, "seed": 0, "split_on": "period", "position_start": 2},
                **{"include_original": False, "keep_separator": "|||", "dropout": 0.99},
            },
            TagShuffle(1000, 0, "period", 2, False, "|||", 0.99),
        ),
        (
            read_tag_shuffle,
            {"enable": True, "split_on": "space", "keep_separator": "a b"},
            TagShuffle(split_on="space", keep_separator="a b"),
        ),
    ],
)
def test_what_is_written_means(read: Reader, written: Any, value: Any) -> None:
    found = read(written)
    assert found == value
    assert repr(found) == repr(value)  # 3 is no 3.0


@pytest.mark.parametrize(
    ("read", "written", "words"),
    [
        *[(read_bool, value, "true or false") for value in (2, "maybe", 1.0, None)],
        *[(read_int, value, "whole number") for value in (True, 1.5, "1.5", None, LARGEST_INT + 1)],
        *[(read_float, value, "must be") for value in (False, "x", "nan", 2e30, 1e-31, None)],
        (read_words, 7, "list"),
        *[(read_numbers_of_layers, value, "counted from 0") for value in ("-1", [])],
        *[(read_sigmas, value, "to 1000") for value in ("-0.1", 1001, [])],
        *[(read_arguments, value, "name=value") for value in ("eps", "=1")],
        (read_arguments, "{", "is not JSON"),
        (read_arguments, 0.5, "or an object"),
        *[(read_interval, value, "above 0") for value in (0, "-1", "1.5")],
        *[(read_memory, value, "above 0") for value in ("0", -1)],
        (read_path, "x" * 256, "too long"),
        (read_path, "a\0b", "NUL"),
        (read_path, 7, "must be a path, as text"),
        (read_path, "~nobody-of-this-name/x", "home folder of a user who does not exist"),
        *[(parse_sizes, value, "8 to 16384") for value in ("7", "16385", "1024x7", "7x1024")],
        (parse_sizes, "axb", "is not a size"),
        (parse_sizes, " , ", "names no size"),
        (read_aspect_buckets, [0], "above 0"),
        (read_aspect_buckets, {"aspect_bucket": 1}, "must be a list"),
        (read_aspect_buckets, [{"aspect_bucket": 1, "weight": -0.1}], "below 0"),
        (read_aspect_buckets, [{"weight": 1}], "without aspect_bucket"),
        (read_aspect_buckets, [{"aspect_bucket": 1, "weigt": 1}], 'did you mean "weight"'),
        (read_skipped, "vea", 'did you mean "vae"'),
        *[(read_pixel_counts, value, "number of pixels") for value in (0, [], [5, 0])],
        *[(read_count_weights, value, "from 0 on") for value in ({"-1": 1}, {"0": -1})],
        (read_count_weights, {"0": 0}, "above 0"),
        *[(read_tag_shuffle, {"enable": True, "count": count}, "1 to 1000") for count in (0, 1001)],
        (read_tag_shuffle, {"enable": True, "position_start": -1}, "at least 0"),
        *[(read_tag_shuffle, {"enable": True, "dropout": share}, "below 1") for share in (1, -0.1)],
        (read_tag_shuffle, {"enable": True, "keep_separator": "a,b"}, "split_on"),
        (read_tag_shuffle, {"enable": True, "keep_separator": " "}, "must be a text"),
        *[(parse_filter, value, "not of the form") for value in ("s/a/b", "s/a/b/x")],
        (parse_filter, "s//b/", "has no expression"),
    ],
)
def test_what_means_nothing_is_refused(read: Reader, written: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(written)


def test_an_edit_removes_or_replaces_with_the_separator_that_it_names() -> None:
    def applied(text: str, caption: str) -> str:
        pattern, replacement = parse_filter(text)
        return pattern.sub(replacement, caption)

    assert applied("dogs?", "a dog, dogs") == "a , "
    assert applied(r"s/(a)\/b/\1-/", "a/b") == "a-"
    assert applied("s#a#b#", "aa") == "bb"
    assert applied("sun", "a sun") == "a "  # no separator is a letter


def test_a_file_of_edits_has_one_on_each_line_or_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n  \ns/a/b/\n")
    (tmp_path / "b.JSON").write_text('["one", ""]')
    assert read_filter_file(tmp_path / "a.txt") == ("one", "s/a/b/")
    assert read_filter_file(tmp_path / "b.JSON") == ("one", "")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"one": "two"}', "is not a list of texts"),
        (b'["one", 2]', "is not a list of texts"),
        (b'["one"', "is not JSON"),
        (b'["one \xff"]', "UTF-8"),
    ],
)
def test_a_file_of_edits_that_is_no_list_of_texts_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_filter_file(tmp_path / "a.json")


def test_patterns_of_modules_meet_where_one_path_fits_both() -> None:
    names = ["*attn.to_q", "blocks.*.ff"]
    fitting = [
        "*to_q",
        "mid_block.attn.to_q",
        "mid_block.attn.to_?",
        "up_blocks.1.attn.*",
        "blocks.12.ff",
        "blocks.?.ff",
        "blocks.[0-3].ff",
    ]
    assert all(may_match(pattern, names) for pattern in fitting)
    others = ["attn.to_q", "*to_k", "blocks.12.f", "blocks.ff", "side_block.attn.to_q"]
    assert not any(may_match(pattern, names) for pattern in others)


def test_paths_of_a_long_list_have_all_its_numbers_and_nested_ones_ten_each() -> None:
    assert list(sample_paths("a.b")) == ["a.b"]
    one, three = list(sample_paths("blocks.*.ff")), list(sample_paths("a.*.b.*.c.*.d"))
    assert (len(one), one[0], one[-1]) == (128, "blocks.0.ff", "blocks.127.ff")
    assert (len(three), three[-1]) == (1000, "a.9.b.9.c.9.d")
    assert len(list(sample_paths("a.*.b.*"))) == 1280


def test_a_misspelled_path_is_found_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "datasets" / "cats").mkdir(parents=True)
    assert nearest_path(tmp_path / "datasets" / "cats") == tmp_path / "datasets" / "cats"
    assert nearest_path(tmp_path / "dataset" / "cat") == tmp_path / "datasets" / "cats"
    assert nearest_path(tmp_path / "elsewhere" / "cats") is None


def test_relative_paths_lead_to_the_working_folder_first_and_those_of_the_package_last(tmp_path: Path) -> None:
    work, own = tmp_path / "work", tmp_path / "own"
    assert Folders(work, own).places(Path("../a")) == [tmp_path / "a"]
    assert Folders(work, own).places(Path("a")) == [work / "a", own / "a"]
    assert Folders(work, None).places(Path("a")) == [work / "a"]
    assert Folders(work, PACKAGE / "examples").places(Path("a")) == [PACKAGE / "examples" / "a", work / "a"]
    assert Folders(work, own).output(Path("b/../a")) == work / "a"
    assert [Folders(work, own).shown(path) for path in (work / "a", own / "a")] == ["a", str(own / "a")]
    for folder in (own, work):
        (folder / "model").mkdir(parents=True)
        assert Folders(work, own).find(Path("model")) == folder / "model"
    near = Folders(work, own)
    assert near.nearest(Path("modl"), is_folder=True) == Path("model")
    assert near.nearest(Path("modl"), is_folder=False) is None


@pytest.mark.parametrize(
    ("text", "is_path", "on_hub"),
    [
        ("owner/name", False, ("owner/name", "pytorch_lora_weights.safetensors")),
        ("owner/name/a/b.safetensors", True, ("owner/name", "a/b.safetensors")),
        ("owner/file.safetensors", False, None),
        ("./name", True, None),
        ("~/name", True, None),
        ("name", True, None),
        (r"C:\models\x", True, None),
    ],
)
def test_a_path_is_told_from_a_name_on_the_hub(text: str, is_path: bool, on_hub: tuple[str, str] | None) -> None:
    assert looks_like_path(text) == is_path
    assert adapter_on_hub(text) == on_hub


def test_paths_of_windows_are_translated() -> None:
    assert windows_path_fix(r"D:\sets\cats").endswith("sees it as /mnt/d/sets/cats")
    assert windows_path_fix(r"sets\cats").endswith("here: sets/cats")
    assert windows_path_fix("sets/cats") is None


def test_the_adapter_of_a_folder_is_that_of_peft_before_that_of_diffusers(tmp_path: Path) -> None:
    assert adapter_file_in(tmp_path) == tmp_path
    for name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert adapter_file_in(tmp_path) == tmp_path / name
