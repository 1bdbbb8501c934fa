"""`simpletuner check`: numbers against a hand count, images against Pillow's own crop, text escaped."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from simpletuner.commands.captions import check_captions
from simpletuner.commands.check import Steps, check, check_dataset, count_steps, gather, sorted_sizes
from simpletuner.commands.contact_sheet import MARGIN, TITLE_SIZE, render_sheet, wrapped
from simpletuner.commands.remedies import _small_buckets
from simpletuner.data.holdout import place_of
from simpletuner.data.tiles import choose_images, spread
from simpletuner.errors import DataError
from simpletuner.models.omnigen.tokens import PREFIX, SUFFIX
from tests.runs import dataset, load_here, write_images, write_run


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    return write_run(tmp_path / "run", omnigen_folder)


def image(path: Path, width: int, height: int, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def checked(folder: Path, *arguments: str) -> tuple[str, dict]:
    said: list[str] = []
    check(load_here(folder, *arguments), said.append, None, 5)
    report = json.loads((folder / "output/check/check.json").read_text())
    return "\n".join(said), report


def test_steps_and_filter_report_are_those_of_a_hand_count(folder):
    text, report = checked(folder)
    # 7 images twice in batches of 2, and 3 images once: 7 + 2.
    assert report["batches_per_epoch"] == 9
    assert report["steps"] == 8
    assert [entry["found"] for entry in report["datasets"]] == [7, 3, 2]
    assert "9 batches of up to 2 in an epoch; 8 steps are 0.9 epochs" in text


def test_held_out_images_are_not_counted_as_used(folder):
    # Of the digests of the seven images, by hand: how many lie below the share.
    write_images(folder / "many", 40, seed=9)
    (folder / "multidatabackend.json").write_text(json.dumps([dataset("many", repeats=1)]))
    contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "many").glob("*.png")]
    held = sum(place_of(digest) < 0.25 for digest in contents)
    assert 0 < held < 40
    text, report = checked(folder, "--eval_holdout=0.25", "--eval_steps_interval=2")
    (entry,) = report["datasets"]
    assert (entry["captioned"], entry["held_out"], entry["bucketed"]) == (40, held, 40 - held)
    assert entry["per_epoch"] == 2 * (40 - held)
    assert entry["sizes"] == {"64x64": 40 - held}
    assert f"many (training, {40 - held} images, {held} held out)" in text


def test_nothing_is_encoded_and_the_bytes_to_come_are_those_that_come(folder):
    from simpletuner.cache.store import TensorStore
    from simpletuner.commands import cache

    _, before = checked(folder)
    assert [entry["latents_missing"] for entry in before["datasets"]] == [7, 3, 2]
    cache.build(load_here(folder))
    _, after = checked(folder)
    assert [entry["latents_missing"] for entry in after["datasets"]] == [0, 0, 0]
    with TensorStore(folder / "cache/vae/omnigen/images") as store:
        keys = store.keys()
        tensors = [tensor for key in keys for tensor in store.get(key).values()]
    assert before["datasets"][0]["bytes_missing"] == sum(tensor.nbytes for tensor in tensors)


def test_each_loss_has_its_remedy(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    write_images(folder / "images", 5, seed=1)
    image(folder / "images/small.png", 16, 16, "small")
    (folder / "images/broken.png").write_bytes(b"not an image")
    image(folder / "images/tiny.png", 40, 40, "enlarged")
    data = [dataset("images", minimum_image_size=32, crop=True, crop_aspect="preserve")]
    write_run(folder, omnigen_folder, data, train_batch_size=4)
    text, report = checked(folder)
    [entry] = report["datasets"]
    assert (entry["found"], entry["readable"], entry["large_enough"]) == (8, 7, 6)
    remedies = "\n".join(entry["remedies"])
    assert "broken.png" in remedies
    assert "lower minimum_image_size" in remedies
    assert "1 image enlarged, up to 1.6 times" in remedies
    assert all(f"! {line}" in text for line in entry["remedies"])


def test_a_size_with_too_few_images_names_the_repeats_that_fill_a_batch(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    write_images(folder / "images", 4, seed=1)
    image(folder / "images/wide.png", 128, 64, "wide")
    write_run(folder, omnigen_folder, [dataset("images", crop_aspect="preserve")], train_batch_size=4)
    text, _ = checked(folder)
    assert "1 size with fewer images than a batch of 4" in text
    assert "repeats 3 fills it" in text


def test_tokens_are_counted_as_the_tokenizer_counts_them_and_cuts_are_reported(tmp_path, omnigen_folder):
    from tokenizers import Tokenizer

    folder = tmp_path / "run"
    long = "word " * 1200
    image(folder / "images/a.png", 64, 64, "short")
    image(folder / "images/b.png", 64, 64, long)
    write_run(folder, omnigen_folder, [dataset("images")])
    tokenizer = Tokenizer.from_file(str(omnigen_folder / "tokenizer/tokenizer.json"))
    expected = [len(tokenizer.encode(PREFIX + caption + SUFFIX).ids) for caption in ("short", long.strip())]
    text, report = checked(folder)
    captions = report["datasets"][0]["captions"]
    assert [captions["tokens"][0], captions["tokens"][2]] == expected
    assert captions["num_cut"] == 1
    assert "1 caption longer than 1024 tokens" in text


def test_the_counted_limit_is_where_encoding_cuts(tmp_path, omnigen_folder):
    """A caption that just fits is not cut, one token more is."""
    folder = tmp_path / "run"
    image(folder / "images/a.png", 64, 64, "x")
    write_run(folder, omnigen_folder, [dataset("images")])
    from simpletuner.models.build import build_family

    family = build_family(load_here(folder).config)
    for length in range(1, 1200):
        [count] = family.count_prompt_tokens(["z" * length])
        if count > family.spec.max_prompt_tokens:
            break
    assert len(family.encode_prompts(["z" * length])[0].tensors["input_ids"]) == family.spec.max_prompt_tokens
    assert family.num_cut_prompts == 1
    family.encode_prompts(["z" * (length - 1)])
    assert family.num_cut_prompts == 1


def test_the_sheet_shows_the_crop_that_the_vae_gets(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    image(folder / "images/wide.png", 200, 100, "a ramp")
    write_run(folder, omnigen_folder, [dataset("images", crop=True, crop_style="center")])
    [tile] = choose_images(gather(load_here(folder)).datasets[0].dataset, 5)
    with Image.open(folder / "images/wide.png") as opened:
        expected = opened.resize((128, 64), Image.Resampling.LANCZOS).crop((32, 0, 96, 64))
    assert np.abs(np.asarray(tile.image, np.int16) - np.asarray(expected, np.int16)).max() <= 1
    assert tile.note == "200x100 > 64x64, 50 % cut off"


def test_images_are_spread_over_all_sizes(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    write_images(folder / "images", 20, seed=1)
    for index, width in enumerate((96, 128, 192)):
        image(folder / f"images/wide{index}.png", width, 64, "wide")
    write_run(folder, omnigen_folder, [dataset("images", crop_aspect="preserve")])
    [each] = gather(load_here(folder)).datasets
    shown = [each.dataset.samples[position] for position in spread(each.dataset, 6)]
    assert len(shown) == len({sample.path for sample in shown}) == 6
    assert len({(sample.crop.height, sample.crop.width) for sample in shown}) == len(each.dataset.buckets)


def test_the_page_stands_alone_and_what_captions_say_stays_text(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    image(folder / "images/a<script>.png", 64, 64, "<script>alert(1)</script> ünï 漢字 & \x1b[31m")
    write_run(folder, omnigen_folder, [dataset("images")])
    text, _ = checked(folder)
    assert "\x1b" not in text
    page = (folder / "output/check/check.html").read_text(encoding="utf-8")
    tags: set[str] = set()
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.add(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert "script" not in tags
    assert "link" not in tags
    assert "漢字" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    [data] = re.findall(r'src="data:image/webp;base64,([^"]+)"', page)
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (64, 64)


def test_captions_wrap_within_the_width_and_end_in_an_ellipsis():
    from PIL import ImageFont

    font = ImageFont.load_default(14)
    lines = wrapped("one two three four five six seven eight " * 5, 14, 192, 3)
    assert len(lines) == 3
    assert all(font.getlength(line) <= 192 for line in lines)
    assert lines[-1].endswith("…")
    assert wrapped("short", 14, 192, 3) == ["short"]
    assert font.getlength(wrapped("w" * 300, 14, 192, 3)[0]) <= 192


def test_many_captions_are_counted_in_part_and_that_is_said(folder, monkeypatch):
    monkeypatch.setattr("simpletuner.commands.captions.MAX_COUNTED", 3)
    loaded = load_here(folder)
    from simpletuner.models.build import build_family

    samples = gather(loaded).datasets[0].dataset.samples
    captions = check_captions(
        [caption for sample in samples for caption in sample.captions], build_family(loaded.config)
    )
    assert captions.counted == 3
    assert "of 3 that were counted" in "\n".join(captions.lines())


def test_masks_stand_under_their_images_cut_as_they_are(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    image(folder / "images/wide.png", 200, 100, "a ramp")
    (folder / "masks").mkdir()
    mask = np.zeros((100, 200), np.uint8)
    mask[:, 100:] = 255
    Image.fromarray(mask).save(folder / "masks/wide.png")
    masks = {"id": "masks", "type": "local", "dataset_type": "conditioning", "conditioning_type": "mask"}
    data = [dataset("images", crop=True, conditioning_data="masks"), masks | {"instance_data_dir": "masks"}]
    write_run(folder, omnigen_folder, data)
    [each] = gather(load_here(folder)).datasets
    [tile] = choose_images(each.dataset, 3)
    shown = np.asarray(tile.mask.convert("L"), np.int16)
    assert shown.shape == (64, 64)
    assert (shown[:, :28] < 20).all()
    assert (shown[:, 36:] > 235).all()
    checked(folder)
    assert (folder / "output/check/check.html").read_text().count('src="data:image') == 2


def test_references_stand_above_their_images(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    image(folder / "images/wide.png", 200, 100, "a ramp")
    (folder / "sources").mkdir()
    Image.new("RGB", (64, 48), (255, 0, 0)).save(folder / "sources/wide.png")
    sources = {"id": "sources", "dataset_type": "conditioning", "conditioning_type": "reference_loose"}
    data = [dataset("images", crop=True, conditioning_data="sources"), sources | {"instance_data_dir": "sources"}]
    write_run(folder, omnigen_folder, data)
    [each] = gather(load_here(folder)).datasets
    [tile] = choose_images(each.dataset, 3)
    assert [each.size for each in tile.images] == [(64, 48), (64, 64)]
    assert tile.images[0].getpixel((5, 5)) == (255, 0, 0)
    assert each.cache.num_missing == 2
    checked(folder)
    assert (folder / "output/check/check.html").read_text().count('src="data:image') == 2


@pytest.mark.parametrize(
    ("width_of_b", "begins", "ends"),
    [
        (None, "1 not used, no reference image in sources", "put one there, or move the image away (b.png)"),
        (96, "1 ", "make them alike, or set conditioning_type to reference_loose (b.png)"),
    ],
    ids=["missing", "of another shape"],
)
def test_a_reference_that_cannot_be_used_has_a_remedy_of_its_own(tmp_path, omnigen_folder, width_of_b, begins, ends):
    folder = tmp_path / "run"
    widths = {"images/a.png": 64, "images/b.png": 64, "sources/a.png": 64, "sources/b.png": width_of_b}
    for name, width in widths.items():
        if width is not None:
            image(folder / name, width, 64, "a ramp")
    sources = {"id": "sources", "dataset_type": "conditioning", "conditioning_type": "reference_strict"}
    data = [dataset("images", conditioning_data="sources"), sources | {"instance_data_dir": "sources"}]
    write_run(folder, omnigen_folder, data)
    [each] = gather(load_here(folder)).datasets
    (line,) = [line for line in each.remedies if "reference" in line]
    assert line.startswith(begins)
    assert line.endswith(ends)


def test_a_check_that_fails_still_reports_what_became_of_every_file(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    write_images(folder / "images", 2, seed=1)
    image(folder / "images/without.png", 64, 64, "x")
    (folder / "images/without.txt").unlink()
    (folder / "images/broken.png").write_bytes(b"not an image")
    write_run(folder, omnigen_folder, [dataset("images")])
    said: list[str] = []
    with pytest.raises(DataError, match="1 of 3 images have no text file"):
        check(load_here(folder), said.append, None, 7)
    assert said[0] == "images: 4 found, 3 readable, 3 large enough, 2 captioned, 0 used, 0 per epoch"
    listed = (folder / "output/check/dataset_set_aside.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in listed] == ["broken.png", "without.png"]


def test_captions_that_a_filter_has_emptied_are_reported(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    image(folder / "images/a.png", 64, 64, "1girl, solo")
    image(folder / "images/b.png", 64, 64, "1girl")
    filters = {"id": "texts", "dataset_type": "text_embeds", "caption_filter_list": ["1girl"]}
    write_run(folder, omnigen_folder, [dataset("images"), filters])
    text, report = checked(folder)
    assert report["datasets"][0]["captions"]["num_empty"] == 1
    assert "1 caption left empty by caption_filter_list" in text


def test_a_caption_that_just_fits_is_not_cut() -> None:
    family = SimpleNamespace(
        count_prompt_tokens=lambda texts: [len(text.split()) for text in texts], max_prompt_tokens=3
    )
    found = check_captions(["a b c", "a b c d", " ", "a b c"], family)
    assert (found.num_captions, found.num_different, found.num_empty, found.counted) == (4, 3, 1, 4)
    assert (found.tokens, found.num_cut, found.longest) == ((0, 3, 4), 1, "a b c d")


def test_an_epoch_has_a_step_for_each_so_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 steps of 4 batches are 5 epochs of 8."""
    monkeypatch.setattr("simpletuner.commands.check.total_train_steps", lambda options, sampler: 10)
    sampler = SimpleNamespace(batches_in=lambda epoch: 8)
    assert count_steps(SimpleNamespace(gradient_accumulation_steps=4), sampler) == Steps(8, 2.0, 10, 5.0)


def test_images_that_rounding_enlarged_by_a_little_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, result in (("check_captions", None), ("cache_need", None), ("remedies_of", ())):
        monkeypatch.setattr(f"simpletuner.commands.check.{name}", lambda *given, result=result: result)
    monkeypatch.setattr("simpletuner.commands.check.enlargement", lambda sample: sample.factor)
    samples = [SimpleNamespace(captions=("a",), factor=factor) for factor in (0.5, 1.0, 1.05, 1.06, 2.0)]
    found = check_dataset(SimpleNamespace(data=None), None, SimpleNamespace(samples=samples), "")
    assert (found.num_enlarged, found.largest_factor) == (2, 2.0)


def test_sizes_with_most_images_come_first_and_equal_ones_by_size() -> None:
    report = SimpleNamespace(buckets={(64, 64): 1, (64, 128): 3, (32, 32): 3})
    found = sorted_sizes(SimpleNamespace(dataset=SimpleNamespace(filter_report=report)))
    assert found == [((32, 32), 3), ((64, 128), 3), ((64, 64), 1)]


def test_a_size_that_its_repeats_fill_needs_no_remedy() -> None:
    report = SimpleNamespace(buckets={(64, 64): 2, (64, 128): 1})
    [line] = _small_buckets(SimpleNamespace(repeats=1, filter_report=report), 4)
    assert line.startswith("1 size with fewer images than a batch of 4 (128x64: 1): repeats 3 fills it")
    assert list(_small_buckets(SimpleNamespace(repeats=3, filter_report=report), 4)) == []


def test_the_sheet_has_its_title_within_its_margins():
    titled, plain = (np.asarray(render_sheet(title, []).convert("L")) for title in ("my images", ""))
    rows, columns = (np.flatnonzero((titled != plain).any(axis=axis)) for axis in (1, 0))
    assert MARGIN <= rows[0] < rows[-1] < MARGIN + 1.5 * TITLE_SIZE
    assert MARGIN <= columns[0] < columns[-1] < titled.shape[1] - MARGIN


def test_each_filter_that_leaves_images_out_has_a_remedy_of_its_own(tmp_path, omnigen_folder):
    folder = tmp_path / "run"
    for name, width, height in (("fits", 64, 64), ("long", 256, 64), ("small", 32, 32), ("grows", 48, 48)):
        image(folder / f"images/{name}.png", width, height, "a ramp")
    (folder / "images/torn.png").write_bytes((folder / "images/fits.png").read_bytes()[:60])
    (folder / "images/torn.txt").write_text("a ramp")
    limits = {"minimum_image_size": 40, "maximum_aspect_ratio": 2.0, "max_upscale_threshold": 0.2}
    write_run(folder, omnigen_folder, [dataset("images", crop=True, crop_aspect="square", **limits)])
    [each] = gather(load_here(folder)).datasets
    found = {line.rpartition("(")[2].rstrip(")"): line for line in each.remedies if " not used, " in line}
    assert found.keys() == {"long.png", "small.png", "grows.png", "torn.png"}
    remedies = {name.partition(".")[0]: line.rpartition(": ")[2].rpartition(" (")[0] for name, line in found.items()}
    assert remedies == {
        "long": "crop it, or widen minimum_aspect_ratio and maximum_aspect_ratio",
        "small": "lower minimum_image_size, or take larger images",
        "grows": "raise max_upscale_threshold, lower resolution, or take larger images",
        "torn": "replace the file, or move it away",
    }
