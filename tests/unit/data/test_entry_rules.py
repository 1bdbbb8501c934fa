"""What the keys of an entry become: rules of sizes and captions, places, fingerprints, and problems that name them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from simpletuner.config.dataset_values import TagShuffle
from simpletuner.config.datasets import ImageDataset
from simpletuner.data.backends.build import open_backend
from simpletuner.data.buckets import BucketRules
from simpletuner.data.caption_edits import CaptionEdits
from simpletuner.data.captions import CaptionRules
from simpletuner.data.dataset import RoundSampling, dataset_fingerprint
from simpletuner.data.datasets import index_path
from simpletuner.data.entry_rules import bucket_rules, caption_rules, check_entry, latents_folder
from simpletuner.errors import DataError, Problem
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import options

EVERY_SIZE = {
    **{"resolution": 128.0, "resolution_type": "pixel", "crop": True, "crop_aspect": "closest", "crop_style": "corner"},
    **{"crop_aspect_buckets": [{"aspect_bucket": 0.5, "weight": 3}, 1.5], "minimum_image_size": 100},
    **{"maximum_image_size": 400, "target_downsample_size": 300, "minimum_aspect_ratio": 0.4},
    **{"maximum_aspect_ratio": 2.5, "max_upscale_threshold": 0.3, "maximum_side": 500},
}


def test_every_key_of_sizes_reaches_its_rule() -> None:
    entry = ImageDataset(id="things", **EVERY_SIZE)
    data = options(aspect_bucket_rounding=3).data
    assert bucket_rules(entry, data, OMNIGEN) == BucketRules(
        resolution=128.0,
        resolution_type="pixel",
        crop=True,
        crop_aspect="closest",
        crop_style="corner",
        aspect_buckets=((0.5, 3.0), (1.5, 1.0)),
        minimum_size=100,
        maximum_size=400,
        target_size=300,
        minimum_aspect=0.4,
        maximum_aspect=2.5,
        max_upscale=0.3,
        alignment=16,
        aspect_decimals=3,
        enlarges=True,
        max_side=500,
        stretches=False,
    )
    small = entry.model_copy(update={"enlarge": False, "minimum_image_size": None, "crop": False})
    for stretches in (True, False):
        found = bucket_rules(small, options(aspect_bucket_alignment=64).data, replace(OMNIGEN, stretches=stretches))
        assert (found.enlarges, found.minimum_size, found.crop, found.alignment) == (False, 0, False, 64)
        assert found.stretches is stretches
    assert not bucket_rules(entry, data, replace(OMNIGEN, stretches=True)).stretches


def test_every_key_of_captions_reaches_its_rule() -> None:
    keys = {"instance_prompt": ["a", "b"], "prepend_instance_prompt": True, "caption_fallback": "filename"}
    entry = ImageDataset(id="things", caption_strategy="textfile", disable_multiline_split=True, **keys)
    assert caption_rules(entry) == CaptionRules("textfile", ("a", "b"), False, True, False, "filename")
    plain = ImageDataset(id="things", caption_strategy="instanceprompt", only_instance_prompt=True)
    assert caption_rules(plain) == CaptionRules("instanceprompt", (), True, False, True, None)
    assert caption_rules(ImageDataset(id="things", caption_strategy="csv")).strategy == "table"
    assert caption_rules(ImageDataset(id="things", type="records", caption_strategy="records")).strategy == "table"


def test_latents_and_indexes_have_a_place_of_their_own(tmp_path: Path) -> None:
    entry = ImageDataset(id="things")
    assert latents_folder(entry, Path("cache"), OMNIGEN) == Path("cache/vae/omnigen/things")
    named = entry.model_copy(update={"cache_dir_vae": Path("own")})
    assert latents_folder(named, Path("cache"), OMNIGEN) == Path("own")
    identity = "/data/my images & " + "x" * 60
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    assert index_path(Path("work"), identity) == Path(f"work/index/my-images-{'x' * 30}-{digest}.sqlite")


def test_the_fingerprint_of_a_dataset_is_the_digest_of_these_very_rules() -> None:
    """Word for word: another one would end the runs of today with a message that their data has changed."""
    sizes = {
        **{"resolution": 64, "resolution_type": "pixel", "crop": True, "crop_aspect": "square"},
        **{"crop_style": "center", "aspect_buckets": [], "minimum_size": 0, "maximum_size": None, "target_size": None},
        **{"minimum_aspect": None, "maximum_aspect": None, "max_upscale": None, "alignment": 64, "aspect_decimals": 2},
    }
    captions = {
        **{"strategy": "textfile", "instance_prompts": [], "only_instance_prompt": False},
        **{"prepend_instance_prompt": False, "splits_lines": True, "fallback": None},
    }
    whole = {
        **{"content": ["a", "b"], "buckets": sizes, "captions": captions, "seed": None},
        **{"draws": {"crops": False, "flips": False}, "edits": None},
    }

    def digest(**changes: object) -> str:
        return hashlib.sha256(json.dumps({**whole, **changes}, sort_keys=True).encode()).hexdigest()

    rules, texts = BucketRules(64, "pixel"), CaptionRules("textfile")
    assert dataset_fingerprint(["a", "b"], rules, texts, 7) == digest()
    flips = RoundSampling(flips=True)
    assert dataset_fingerprint(["a", "b"], rules, texts, 7, flips) == digest(
        seed=7, draws={"crops": False, "flips": True}
    )
    drawn = replace(rules, crop_style="random")
    assert dataset_fingerprint(["a", "b"], drawn, texts, 7) == digest(seed=7, buckets={**sizes, "crop_style": "random"})
    own = replace(rules, enlarges=False, max_side=9, stretches=True)
    buckets = {**sizes, "enlarges": False, "max_side": 9, "stretches": True}
    assert dataset_fingerprint(["a", "b"], own, texts, 7) == digest(buckets=buckets)
    edits = {"filters": ["x"], "shuffle": None, "seed": 5}
    assert dataset_fingerprint(["a", "b"], rules, texts, 7, edits=CaptionEdits(("x",), seed=5)) == digest(edits=edits)
    shuffled = CaptionEdits(shuffle=TagShuffle(count=3), seed=5)
    shuffle = {"count": 3, "seed": None, "split_on": "comma", "position_start": 0, "include_original": True}
    edited = {"filters": [], "shuffle": {**shuffle, "keep_separator": None, "dropout": 0.0}, "seed": 5}
    assert dataset_fingerprint(["a", "b"], rules, texts, 7, edits=shuffled) == digest(edits=edited)
    opened = CaptionEdits(("x",), seed=5, openers=("o",))
    assert dataset_fingerprint(["a", "b"], rules, texts, 7, edits=opened) == digest(edits={**edits, "openers": ["o"]})


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            {"crop_aspect": "random"},
            Problem(
                "crop_aspect random needs aspects to choose from",
                "things.crop_aspect_buckets",
                "data.json",
                allowed="[1.0, 0.75]",
            ),
        ),
        (
            {"prepend_instance_prompt": True},
            Problem(
                "the captions need a prompt",
                "things.instance_prompt",
                "data.json",
                allowed="a text, or a list of texts",
            ),
        ),
        (
            {"resolution": None},
            Problem(
                "there is no resolution in this unit", "things.resolution", "data.json", fix="set it in this entry"
            ),
        ),
    ],
)
def test_an_entry_without_what_it_needs_is_named_before_a_file_is_read(keys, problem) -> None:
    entry = ImageDataset(id="things", **{"resolution": 64, **keys})
    assert check_entry(entry, options().data, OMNIGEN, "data.json") == [problem]


def test_what_is_no_folder_and_an_alignment_that_does_not_fit_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    entry = ImageDataset(id="things", resolution=64, instance_data_dir=tmp_path / "file")
    assert check_entry(entry, options(aspect_bucket_alignment=24).data, OMNIGEN, "data.json") == [
        Problem(
            f"{tmp_path / 'file'} is a file",
            "things.instance_data_dir",
            "data.json",
            allowed="a folder with images",
            fix="correct the path",
        ),
        Problem(
            "sides of images would be multiples of 24 pixels",
            "aspect_bucket_alignment",
            allowed="multiples of 16, as OmniGen needs",
        ),
    ]


def test_a_backend_is_opened_with_all_that_its_entry_says(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    table = tmp_path / "rows.csv"
    table.write_text("file,words,others\na.png,A,B\n")
    keys = {"type": "csv", "csv_file": table, "instance_data_dir": tmp_path / "images", "filename_column": "file"}
    entry = ImageDataset(id="things", caption_strategy="csv", csv_caption_column="others", **keys)
    for strategy, captions in (("csv", {b"a.png.txt": b"B"}), ("filename", {})):
        made = open_backend(entry.model_copy(update={"caption_strategy": strategy}), "data.json")
        assert made._captions == captions
    assert made.location == str(tmp_path / "images")
    prompt = open_backend(entry.model_copy(update={"only_instance_prompt": True}), "data.json")
    assert prompt._captions == {}
    beside = open_backend(entry.model_copy(update={"instance_data_dir": None, "follow_outside_links": True}), None)
    assert beside.location == str(tmp_path)
    assert " with links that lead out " in beside.identity
    with pytest.raises(DataError, match=r"^data\.json: things\.filename_column: "):
        open_backend(entry.model_copy(update={"filename_column": "gone"}), "data.json")
    local = open_backend(ImageDataset(id="a", instance_data_dir=tmp_path, follow_outside_links=True), None)
    assert (local.location, local.identity) == (str(tmp_path), f"{tmp_path} with links that lead out")
