"""Records as datasets: ratios, numbers of references, limits, and that an image may be in many rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.dataset import Dataset
from simpletuner.data.mixes import read_sources
from simpletuner.data.record_parts import _share
from simpletuner.data.sampler import Sampler
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.models.omnigen2.spec import OMNIGEN2
from tests.unit.data.images import build_datasets, options, write_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate("abcd"):
        write_image(tmp_path / "images" / f"{name}.png", 64, 48, seed=number)
    return tmp_path


def row(target: str, *references: str, instruction: str = "add a hat") -> dict[str, Any]:
    return {
        "target": f"images/{target}.png",
        "references": [f"images/{n}.png" for n in references],
        "instruction": instruction,
    }


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def mix(path: Path, *entries: tuple[str, Any]) -> Path:
    path.write_text("data:\n" + "".join(f"- {{path: {name}, type: x, ratio: {ratio}}}\n" for name, ratio in entries))
    return path


def build(folder: Path, path: Path, spec=OMNIGEN2, config: dict[str, Any] | None = None, **keys: Any) -> list[Dataset]:
    entry = ImageDataset(id="edits", type="records", records_file=path, instance_data_dir=folder, **keys)
    settings = options(cache_dir=folder / "cache", conditioning_multidataset_sampling="combined", **(config or {}))
    return build_datasets([entry], settings, spec, folder / "work", data_file="data.json")


def test_rows_with_different_numbers_of_references_are_datasets_of_their_own(folder: Path) -> None:
    rows = [row("a"), row("b", "a"), row("b", "c", "d", instruction="join"), row("b", "d", instruction="again")]
    none, one, two = build(folder, write_rows(folder / "rows.jsonl", *rows))
    assert [each.id for each in (none, one, two)] == ["edits-0", "edits-1", "edits-2"]
    # The image b is the target of two rows of one dataset, with another reference and instruction in each.
    assert [(s.path, s.references[0].path, s.captions) for s in one.samples] == [
        ("2-b.png", "2-b.png", ("add a hat",)),
        ("4-b.png", "4-b.png", ("again",)),
    ]
    a, d = (one.samples[i].references[0].digest for i in range(2))
    assert [a, d] == [none.samples[0].digest, two.samples[0].references[1].digest]
    assert [each.id for each in two.references] == ["edits-2-reference-1", "edits-2-reference-2"]
    assert {each.entry.probability for each in (none, one, two)} == {1}


def test_pixels_are_those_of_the_files_that_a_row_names(folder: Path) -> None:
    [dataset] = build(folder, write_rows(folder / "rows.jsonl", row("a", "c")))
    [sample] = dataset.samples
    assert dataset.read_pixels(sample).shape == (3, 48, 64)
    [twin] = build(folder, write_rows(folder / "twin.jsonl", row("c")))
    reference = dataset.references[0].read_pixels(sample.references[0])
    assert reference.equal(twin.read_pixels(twin.samples[0]))
    assert not reference.equal(dataset.read_pixels(sample))


def test_a_row_that_comes_later_is_read_and_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(folder / "rows.jsonl", row("a", "c"))
    [before] = build(folder, path)
    looked_at = []
    from simpletuner.data import scan

    look_at = scan.look_at
    monkeypatch.setattr(
        scan, "look_at", lambda backend, file, decodes: looked_at.append(file.path) or look_at(backend, file)
    )
    write_rows(path, row("a", "c"), row("b", "d"))
    [after] = build(folder, path)
    assert sorted(looked_at) == [b"2-b.png", b"2-b.png", b"2-b.png.txt"]
    assert (len(before.samples), len(after.samples)) == (1, 2)
    assert before.fingerprint != after.fingerprint


def shares(folder: Path, datasets: list[Dataset], epochs: int, size: int = 4) -> dict[str, int]:
    """Rows of each dataset that so many epochs train."""
    sampler = Sampler(datasets, size, seed=1)
    counts = dict.fromkeys((each.id for each in datasets), 0)
    for epoch in range(epochs):
        for position in range(sampler.batches_in(epoch)):
            plan = sampler.batch(epoch, position)
            counts[plan.dataset_id] += plan.num_real
    return counts


def test_ratios_are_met_in_each_epoch_which_has_all_rows(folder: Path) -> None:
    """0.5, 0.3 and 0.2 of 8 + 24 + 48 rows are 40, 24 and 16 rows: 5 times, once and a third of each file."""
    for name, count in (("one", 8), ("two", 24), ("three", 48)):
        write_rows(folder / f"{name}.jsonl", *[row("a")] * count)
    path = mix(folder / "mix.yml", ("one.jsonl", 0.5), ("two.jsonl", 0.3), ("three.jsonl", 0.2))
    datasets = build(folder, path)
    assert {each.id: each.entry.probability for each in datasets} == pytest.approx(
        {"edits-one": 5, "edits-two": 1, "edits-three": 1 / 3}
    )
    assert shares(folder, datasets, 1) == {"edits-one": 40, "edits-two": 24, "edits-three": 16}
    assert shares(folder, datasets, 3) == {"edits-one": 120, "edits-two": 72, "edits-three": 48}


def test_ratios_hold_within_a_hundredth_where_sizes_and_numbers_of_references_differ(folder: Path) -> None:
    """Short batches at the end of buckets move no ratio: a round is a round."""
    for number, name in enumerate("efg"):
        write_image(folder / f"images/{name}.png", 64, 64 + 16 * number, seed=10 + number)
    rows = {
        "t2i": [row("abefg"[i % 5]) for i in range(200)],
        "edit": [row("abefg"[i % 5], "c") for i in range(240)],
        "join": [row("abefg"[i % 5], *("c", "d")[: i % 2 + 1]) for i in range(160)],
    }
    for name, each in rows.items():
        write_rows(folder / f"{name}.jsonl", *each)
    datasets = build(folder, mix(folder / "mix.yml", ("t2i.jsonl", 0.5), ("edit.jsonl", 0.3), ("join.jsonl", 0.2)))
    assert [each.id for each in datasets] == ["edits-t2i", "edits-edit", "edits-join-1", "edits-join-2"]
    counts = shares(folder, datasets, 1, size=2)
    total = sum(counts.values())
    found = [counts["edits-t2i"], counts["edits-edit"], counts["edits-join-1"] + counts["edits-join-2"]]
    assert total == pytest.approx(600, rel=0.01)
    assert [each / total for each in found] == pytest.approx([0.5, 0.3, 0.2], abs=0.01)


def test_ratios_hold_where_datasets_are_mixed_evenly(folder: Path) -> None:
    for name, count in (("one", 8), ("two", 40)):
        write_rows(folder / f"{name}.jsonl", *[row("a")] * count)
    path = mix(folder / "mix.yml", ("one.jsonl", 3), ("two.jsonl", 1))
    datasets = build(folder, path, config={"data_backend_sampling": "uniform"}, probability=0.5)
    assert [each.entry.probability for each in datasets] == [0.375, 0.125]


def test_ratios_of_a_mix_in_a_mix_divide_its_own(folder: Path) -> None:
    for name in ("one", "two", "three"):
        write_rows(folder / f"{name}.jsonl", row("a"))
    mix(folder / "inner.yml", ("two.jsonl", 0.33), ("three.jsonl", 0.33))
    sources = read_sources(mix(folder / "mix.yml", ("one.jsonl", 1), ("inner.yml", 3)), folder)
    assert [(source.name, source.weight) for source in sources] == [("one", 0.25), ("two", 0.375), ("three", 0.375)]


def test_what_a_mix_cannot_meet_is_refused_at_the_start(folder: Path) -> None:
    (folder / "empty.jsonl").write_text("")
    write_rows(folder / "rows.jsonl", row("a"))
    with pytest.raises(DataError, match=r'"empty.jsonl" holds no usable row, and its ratio is above 0'):
        build(folder, mix(folder / "mix.yml", ("rows.jsonl", 1), ("empty.jsonl", 0.1)))
    assert len(build(folder, mix(folder / "mix.yml", ("rows.jsonl", 1), ("empty.jsonl", 0)))) == 1
    for entry, words in (
        (("none.jsonl", 1), "there is nothing of this name"),
        (("rows.jsonl", -1), "-1 is not a ratio"),
        (("rows.jsonl", "much"), "much is not a ratio"),
        (("rows.jsonl", 0), "no entry has a ratio above 0"),
        (("mix.yml", 1), "this mix is part of itself"),
        (("images/a.png", 1), "is of another kind"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_sources(mix(folder / "mix.yml", entry), folder)


def test_sources_are_called_by_their_file_or_folder_and_a_number_by_what_it_lies_in(folder: Path) -> None:
    (folder / "edits").mkdir()
    (folder / "edits" / "7").mkdir()
    for name in ("one.jsonl", "edits/12.jsonl", "edits/all.JSONL"):
        write_rows(folder / name, row("a"))
    entries = [(name, 1) for name in ("one.jsonl", "edits/12.jsonl", "edits/all.JSONL", "edits/7", "edits")]
    sources = read_sources(mix(folder / "mix.YAML", *entries), folder)
    assert [source.name for source in sources] == ["one", "edits-12", "all", "edits-7", "edits"]
    assert {source.weight for source in sources} == {0.2}
    assert [(each.place.key, each.place.message) for each in sources[:2]] == [
        ("data[0].path", '"one.jsonl"'),
        ("data[1].path", '"edits/12.jsonl"'),
    ]
    [alone] = read_sources(folder / "one.jsonl", folder)
    assert (alone.name, alone.path, alone.weight, alone.place) == ("one", folder / "one.jsonl", 1.0, None)
    [whole] = read_sources(folder / "edits", folder)
    assert (whole.name, whole.path) == ("edits", folder / "edits")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "data: 3",
            Problem("there is no list of entries", "data", line=1, allowed="- path, type and ratio of each file"),
        ),
        (
            "data:\n- one",
            Problem("there is no list of entries", "data", line=1, allowed="- path, type and ratio of each file"),
        ),
        (
            "data:\n- {path: rows.jsonl, ratio: 1, typ: x, other: 3}",
            Problem("there is no such key", "data[0].other", allowed="path, type, ratio"),
        ),
        (
            "data:\n- {path: rows.jsonl, ratio: true}",
            Problem("true is not a ratio", "data[0].ratio", allowed="a number >= 0"),
        ),
        (
            "data:\n- {path: rows.jsonl, ratio: .inf}",
            Problem("inf is not a ratio", "data[0].ratio", allowed="a number >= 0"),
        ),
        (
            "data:\n- {path: rows.jsonl, ratio: 1}\n- {path: 3, ratio: 1}",
            Problem(
                "names no file",
                "data[1].path",
                allowed="a file .yml, .jsonl, .json, .csv, .tsv, .parquet, or a folder",
                fix="correct the path",
            ),
        ),
    ],
)
def test_an_entry_of_a_mix_that_says_nothing_usable_is_named(folder: Path, text: str, problem: Problem) -> None:
    write_rows(folder / "rows.jsonl", row("a"))
    (folder / "mix.yml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_sources(folder / "mix.yml", folder)
    [found] = error.value.problems
    assert found == replace(
        problem, file=str(folder / "mix.yml"), line=found.line if problem.line is None else problem.line
    )


def test_limits_reduce_targets_and_references_by_their_number(folder: Path) -> None:
    """400 x 300 in 30000 pixels are 200 x 150, aligned down to 192 x 144; a side of at most 128 gives 128 x 96."""
    write_image(folder / "images/big.png", 400, 300)
    path = write_rows(folder / "rows.jsonl", row("big", "big"), row("big", "big", "a"), row("a", "big", "a", "a"))
    limits = {"max_output_pixels": 30_000, "max_input_pixels": [120_000, 30_000]}
    one, two, three = build(folder, path, **limits)
    size = [(each.crop.height, each.crop.width) for each in (one.samples[0], *one.samples[0].references)]
    assert size == [(144, 192), (288, 400)]  # 300 is no multiple of 16
    assert two.samples[0].references[0].crop == three.samples[0].references[0].crop
    assert (two.samples[0].references[0].crop.height, two.samples[0].references[0].crop.width) == (144, 192)
    # What is smaller keeps its size.
    assert (two.samples[0].references[1].crop.height, two.samples[0].references[1].crop.width) == (48, 64)
    [sided, *_] = build(folder, path, max_side_length=128, **limits)
    assert {(each.crop.height, each.crop.width) for each in (sided.samples[0], *sided.samples[0].references)} == {
        (96, 128)
    }


@pytest.mark.parametrize(("spec", "intermediate"), [(OMNIGEN2, (32, 48)), (OMNIGEN, (37, 48))])
def test_a_family_stretches_or_cuts_what_is_over(folder: Path, spec, intermediate) -> None:
    """48 x 37 pixels become 48 x 32: stretched, or 5 rows cut off."""
    write_image(folder / "images/odd.png", 48, 37)
    [dataset] = build(folder, write_rows(folder / "rows.jsonl", row("odd", "odd")), spec)
    for each in (dataset.samples[0], *dataset.samples[0].references):
        assert (each.crop.height, each.crop.width) == (32, 48)
        assert (each.crop.intermediate_height, each.crop.intermediate_width) == intermediate


def test_a_row_with_more_references_than_the_family_takes_is_named(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", row("a", "b"), row("a", *"bcdb"))
    with pytest.raises(DataError) as error:
        build(folder, path, OMNIGEN)
    assert "a row has 4 references; OmniGen takes 3" in error.value.render()
    assert f"{path}:2" in error.value.render()


def test_a_damaged_image_is_an_error_unless_bad_rows_are_skipped(folder: Path) -> None:
    (folder / "images/c.png").write_bytes(b"\x89PNG no image")
    path = write_rows(folder / "rows.jsonl", row("a", "b"), row("a", "c"), row("c"))
    with pytest.raises(DataError) as error:
        build(folder, path)
    text = error.value.render()
    assert f"{path}:2: reference image in edits-1-reference-1: not an image" in text
    assert f"{path}:3: not an image" in text
    [dataset] = build(folder, path, skip_bad_rows=True)
    assert (dataset.id, len(dataset.samples)) == ("edits-1", 1)


def test_openers_are_stripped_from_rows_without_references_only(folder: Path) -> None:
    text = "The image shows a cat"
    path = write_rows(folder / "rows.jsonl", row("a", instruction=text), row("a", "b", instruction=text))
    none, one = build(folder, path, caption_openers=["The image shows "])
    assert none.samples[0].captions == (text, "a cat")
    assert one.samples[0].captions == (text,)


def test_rows_left_out_are_in_the_report(folder: Path) -> None:
    path = write_rows(folder / "rows.jsonl", row("a"), row("none"))
    [dataset] = build(folder, path, skip_bad_rows=True)
    assert any("1 rows of" in line for line in dataset.filter_report.warnings)


def test_weights_of_numbers_of_references_decide_their_shares(folder: Path) -> None:
    """Weights 1 and 3 of rows without and with two references; those with one are not trained."""
    rows = [row("a")] * 8 + [row("b", "a")] * 8 + [row("c", "a", "b")] * 24
    path = write_rows(folder / "rows.jsonl", *rows)
    datasets = build(folder, path, reference_weights={0: 1.0, 2: 3.0}, config={"data_backend_sampling": "uniform"})
    assert {each.id: each.entry.probability for each in datasets} == pytest.approx({"edits-0": 0.25, "edits-2": 0.75})
    datasets = build(folder, path, reference_weights={0: 1.0, 2: 3.0})
    assert shares(folder, datasets, 4) == {"edits-0": 40, "edits-2": 120}


def test_weights_that_leave_no_row_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="have 1 references, which have weight 0"):
        build(folder, write_rows(folder / "rows.jsonl", row("b", "a")), reference_weights={0: 1.0, 1: 0.0})


def test_numbers_of_references_that_no_row_has_take_no_share() -> None:
    parted = {0: [None], 2: [None] * 5}
    weighted = SimpleNamespace(reference_weights={0: 1.0, 1: 4.0, 2: 3.0})
    assert [_share(0.5, weighted, parted, count) for count in (0, 2)] == [0.125, 0.375]
    assert _share(0.6, SimpleNamespace(reference_weights=None), parted, 2) == pytest.approx(0.5)
