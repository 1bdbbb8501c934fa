"""Windows of batches: slots, parts of processes, what is drawn by which key, and where the data stand afterwards."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from simpletuner.batch import Crop, PromptImage, Sample
from simpletuner.data.sampler import Sampler
from simpletuner.data.schedule import Schedule
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.randomness import keyed_seed
from simpletuner.training import batches
from simpletuner.training.batches import BatchSource, reference_latents
from tests.configs import config_of
from tests.toy import ToyDataset, ToyFamily, ToySource

FIVE = {name: (float(place), 0.0) for place, name in enumerate("abcde")}


def source_of(
    data: ToyDataset,
    size: int = 2,
    *,
    family: ToyFamily | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **options,
) -> BatchSource:
    sampler = Sampler([data], size * process_group.size, seed=1, num_ranks=process_group.size)
    config = config_of(seed=7, **options)
    return BatchSource(family or ToyFamily(), [data], {data.id: ToySource(data.images)}, sampler, config, process_group)


def test_slots_count_through_the_whole_window_and_the_place_moves_on():
    """Five images are three batches; a window takes two of them, across the edge of the epoch too."""
    source = source_of(ToyDataset(FIVE), gradient_accumulation_steps=2)
    windows, place = [], (0, 0)
    for step in range(3):
        windows.append(source.build_window(step, *place))
        place = windows[-1].next_epoch, windows[-1].next_position
    for window in windows:
        slots = [slot for batch in window.batches for slot in batch.slots]
        assert slots == list(range(window.num_samples))
    assert sum(window.num_samples for window in windows) == 10
    assert [(window.next_epoch, window.next_position) for window in windows] == [(0, 2), (1, 1), (2, 0)]
    assert [window.epochs_before for window in windows] == pytest.approx([0, 2 / 3, 4 / 3])
    assert [window.epochs_after for window in windows] == pytest.approx([2 / 3, 4 / 3, 2])
    digests = [digest for window in windows for batch in window.batches for digest in batch.digests]
    assert sorted(digests) == sorted([*FIVE, *FIVE])


def test_a_batch_holds_the_latents_of_its_images():
    window = source_of(ToyDataset(FIVE)).build_window(0, 0, 0)
    [batch] = window.batches
    assert batch.latents[:, :, 0, 0].tolist() == [list(FIVE[name]) for name in batch.digests]
    assert batch.captions == [f"caption of {name}" for name in batch.digests]
    assert [sample.path for sample in batch.samples] == list(batch.digests)
    assert batch.prompt_embeds[0].tensors["length"] == len("caption of a")
    assert window.weight == 2


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("number", [1, 2, 3, 5])
def test_processes_share_a_batch_and_fill_it_up_with_what_does_not_count(size, number):
    """Every process has one sample at least; together each image counts once, at the slot that one process gives it."""
    data = ToyDataset(dict(list(FIVE.items())[:number]))
    windows = [
        source_of(data, size=3, process_group=ProcessGroup(rank, size)).build_window(0, 0, 0) for rank in range(size)
    ]
    parts = [window.batches[0] for window in windows]
    counted = [
        (slot, digest)
        for part in parts
        for slot, digest, weight in zip(part.slots, part.digests, part.loss_weights.tolist(), strict=True)
        if weight == 1
    ]
    alone = Sampler([data], 3 * size, seed=1).batch(0, 0)
    assert counted == [(slot, "abcde"[index]) for slot, index in enumerate(alone.sample_indices)]
    assert all(len(part) >= 1 for part in parts)
    assert sum(len(part) for part in parts) == max(number, size)
    assert sum(window.weight for window in windows) == pytest.approx(number, abs=1e-9)


def test_a_process_without_an_image_of_its_own_weighs_nothing():
    source = source_of(ToyDataset({"a": (1.0, 2.0)}), process_group=ProcessGroup(1, 2))
    window = source.build_window(0, 0, 0)
    assert window.batches[0].loss_weights.tolist() == [0]
    assert window.batches[0].digests == ["a"]
    assert window.weight < 1e-9
    assert window.num_samples == 0


def test_the_slots_of_a_later_batch_follow_those_of_all_processes():
    source = source_of(ToyDataset(FIVE), size=1, process_group=ProcessGroup(1, 2), gradient_accumulation_steps=2)
    window = source.build_window(0, 0, 0)
    assert [list(batch.slots) for batch in window.batches] == [[1], [3]]


def test_a_window_knows_how_many_samples_all_processes_have_in_it():
    """Five images in global batches of 4: the second one of an epoch has a single image."""
    source = source_of(ToyDataset(FIVE), size=2, process_group=ProcessGroup(1, 2), gradient_accumulation_steps=2)
    assert source.build_window(0, 0, 0).num_slots == 5
    assert source_of(ToyDataset(FIVE), gradient_accumulation_steps=2).build_window(0, 0, 0).num_slots == 4


def test_an_image_counts_as_much_as_it_has_latents_where_that_is_asked():
    class Sizes(ToySource):
        def latents(self, samples):
            return [torch.zeros(2, 3, 4) for _ in samples]

    for balance, weight in (("pixels", 12), ("images", 1)):
        source = source_of(ToyDataset(FIVE), loss_balance=balance)
        source.sources = {"toy": Sizes(FIVE)} | {key: Sizes(FIVE) for key in source.sources}
        window = source.build_window(0, 0, 0)
        assert window.batches[0].loss_weights.tolist() == [weight, weight]
        assert (window.weight, window.num_samples) == (2 * weight, 2)


def test_captions_are_dropped_by_step_and_by_slot_as_often_as_asked():
    source = source_of(ToyDataset(FIVE), caption_dropout_probability=0.3)
    by_step = [source.drops_caption(step, 0) for step in range(1000)]
    by_slot = [source.drops_caption(0, slot) for slot in range(1000)]
    for dropped in (by_step, by_slot):
        assert sum(dropped) == pytest.approx(300, abs=60)  # four deviations
    assert by_step != by_slot
    assert by_step[5] == (keyed_seed(7, "caption dropout", 5, 0) / 2**63 < 0.3)
    assert not any(source_of(ToyDataset(FIVE)).drops_caption(step, 0) for step in range(100))
    assert all(
        source_of(ToyDataset(FIVE), caption_dropout_probability=1.0).drops_caption(step, 0) for step in range(100)
    )


def test_a_dropped_caption_is_the_family_s_own():
    family = ToyFamily()
    family.spec = replace(family.spec, dropped_caption="nothing")
    [batch] = source_of(ToyDataset(FIVE), family=family, caption_dropout_probability=1.0).build_window(0, 0, 0).batches
    assert batch.captions == ["nothing", "nothing"]
    assert batch.prompt_embeds[0].tensors["length"] == len("nothing")


def test_a_caption_is_chosen_by_seed_step_and_slot():
    keys = []
    data = ToyDataset(FIVE)
    data.caption_for = lambda sample, *key: keys.append(key) or "x"
    source_of(data, gradient_accumulation_steps=2).build_window(9, 0, 0)
    assert keys == [(7, 9, 0), (7, 9, 1), (7, 9, 2), (7, 9, 3)]


@pytest.mark.parametrize("masking", [0.0, 0.4, 1.0])
def test_masks_count_as_often_as_asked_by_step_and_slot(masking):
    """The mask of every image is a quarter; where it does not count, all of the image does."""
    source = source_of(ToyDataset(FIVE, mask_of=dict.fromkeys(FIVE, 0.25)), masked_loss_probability=masking)
    rows = [source.build_window(step, 0, 0).batches[0].masks[:, 0, 0, 0].tolist() for step in range(500)]
    for slot in (0, 1):
        counts = [row[slot] == 0.25 for row in rows]
        assert sum(counts) == pytest.approx(500 * masking, abs=44 if 0 < masking < 1 else 0)
        assert counts[3] == (keyed_seed(7, "masked loss", 3, slot) / 2**63 < masking)


def reference(name: str) -> Sample:
    return Sample("refs", name, name, 8, 16, (), Crop(16, 8, 0, 0, 16, 8))


def with_references(**options) -> BatchSource:
    data = ToyDataset(FIVE)
    data.samples.rows = [
        dataclasses.replace(row, references=(reference(f"{row.path}1"), reference(f"{row.path}2")))
        for row in data.samples.rows
    ]
    source = source_of(data, **options)
    tall = {f"{name}{number}": torch.full((2, 2, 1), float(number)) for name in FIVE for number in (1, 2)}
    source.sources = source.sources | {"refs": SimpleNamespace(latents=lambda rows: [tall[row.path] for row in rows])}
    return source


def test_references_come_with_their_image_all_or_one_that_is_drawn(monkeypatch):
    asked = []
    source = with_references()
    monkeypatch.setattr(source.family, "encode_prompts", lambda prompts, seen=None: asked.append(seen) or [None] * 2)
    [batch] = source.build_window(0, 0, 0).batches
    assert [[int(each[0, 0, 0]) for each in row] for row in batch.references] == [[1, 2], [1, 2]]
    first, second = batch.digests
    assert asked == [[tuple(PromptImage(16, 8, f"{name}{number}") for number in (1, 2)) for name in (first, second)]]
    one = with_references(conditioning_multidataset_sampling="random")
    generated = [
        [int(row[0][0, 0, 0]) for row in one.build_window(step, 0, 0).batches[0].references] for step in range(40)
    ]
    assert {value for row in generated for value in row} == {1, 2}
    assert any(row[0] != row[1] for row in generated)
    assert all({row[slot] for row in generated} == {1, 2} for slot in (0, 1))  # drawn anew at each step
    assert generated[4][1] == 1 + keyed_seed(7, "reference", 4, 1) % 2


@pytest.mark.parametrize("sampling", ["combined", "random"])
def test_an_image_without_references_has_none_beside_one_that_has(sampling: str) -> None:
    source = with_references(conditioning_multidataset_sampling=sampling)
    [sample] = ToyDataset({"a": (1.0, 3.0)}).samples.rows
    assert source.references(sample, 0, 0) == ()
    [paired] = [dataclasses.replace(sample, references=(reference("a1"),))]
    assert source.references(paired, 0, 0) == paired.references


def test_a_share_of_dropped_captions_takes_its_references_along_and_no_other():
    """The two draws are keyed apart: among dropped captions half keep their references, among kept ones all."""
    counts = {True: [], False: []}
    source = with_references(caption_dropout_probability=0.5, reference_dropout_probability=0.5)
    for step in range(100):
        [batch] = source.build_window(step, 0, 0).batches
        for caption, row in zip(batch.captions, batch.references or [(), ()], strict=True):
            counts[caption == source.family.spec.dropped_caption].append(len(row))
    assert set(counts[False]) == {2}
    assert set(counts[True]) == {0, 2}
    assert 0.35 < counts[True].count(0) / len(counts[True]) < 0.65
    [batch] = (
        with_references(caption_dropout_probability=1.0, reference_dropout_probability=0.0)
        .build_window(0, 0, 0)
        .batches
    )
    assert [len(row) for row in batch.references] == [2, 2]


@pytest.mark.parametrize(("drops", "count"), [(True, 0), (False, 2)])
def test_references_go_with_a_dropped_caption_where_the_family_says_so(drops, count):
    family = ToyFamily()
    family.spec = replace(family.spec, drops_references=drops)
    [batch] = with_references(family=family, caption_dropout_probability=1.0).build_window(0, 0, 0).batches
    assert [len(row) for row in batch.references or [(), ()]] == [count, count]


def test_a_window_that_was_begun_ahead_is_the_one_that_is_used(monkeypatch):
    """And only where it is the one asked for: a step that starts elsewhere is built again."""
    monkeypatch.setattr(batches, "WORTH_A_THREAD_SECONDS", 0.0)
    source = source_of(ToyDataset(FIVE), gradient_accumulation_steps=2)
    built = []
    build = source.build_window
    monkeypatch.setattr(source, "build_window", lambda *key: built.append(key) or build(*key))
    first = source.window(0, 0, 0)
    source.begin_next(first)
    source.begin_next(first)  # of the second micro-batch
    second = source.window(1, 0, 2)
    assert built == [(0, 0, 0), (1, 0, 2)]
    assert (second.step, second.next_epoch, second.next_position) == (1, 1, 1)
    source.begin_next(second)
    assert source.window(2, 0, 2).step == 2
    source.close()
    assert (2, 0, 2) in built[2:]


def test_what_is_built_quickly_needs_no_thread(monkeypatch):
    monkeypatch.setattr(batches, "WORTH_A_THREAD_SECONDS", 1e9)
    source = source_of(ToyDataset(FIVE))
    built = []
    build = source.build_window
    monkeypatch.setattr(source, "build_window", lambda *key: built.append(key) or build(*key))
    source.begin_next(source.window(0, 0, 0))
    assert built == [(0, 0, 0)]


def test_closing_lets_every_source_write():
    source, closed = source_of(ToyDataset(FIVE)), []
    source.sources = {name: SimpleNamespace(close=lambda name=name: closed.append(name)) for name in ("a", "b")}
    source.close()
    assert closed == ["a", "b"]


def test_each_batch_is_of_one_dataset_with_its_own_mask_and_kind():
    toys, kept = ToyDataset(FIVE), ToyDataset(FIVE, id="kept", is_regularisation=True, mask_of=dict.fromkeys(FIVE, 0.5))
    sources = {each.id: ToySource(FIVE) for each in (toys, kept)}
    source = BatchSource(
        ToyFamily(), [toys, kept], sources, Sampler([toys, kept], 5, seed=1), config_of(gradient_accumulation_steps=2)
    )
    by_name = {batch.dataset_id: batch for batch in source.build_window(0, 0, 0).batches}
    assert by_name.keys() == {"toys", "kept"}
    assert (by_name["toys"].is_regularisation, by_name["toys"].masks) == (False, None)
    assert by_name["kept"].is_regularisation
    assert np.unique(by_name["kept"].masks.numpy()).tolist() == [0.5]


def test_a_dataset_takes_part_in_its_steps_alone():
    early, late = ToyDataset(FIVE), ToyDataset(FIVE, id="late", schedule=Schedule(start_step=3))
    sources = {each.id: ToySource(FIVE) for each in (early, late)}
    source = BatchSource(
        ToyFamily(), [early, late], sources, Sampler([early, late], 5, seed=1), config_of(gradient_accumulation_steps=2)
    )
    windows, place = [], (0, 0)
    for step in range(4):
        windows.append(source.build_window(step, *place))
        place = windows[-1].next_epoch, windows[-1].next_position
    seen = [{batch.dataset_id for batch in window.batches} for window in windows]
    assert seen == [{"toys"}, {"toys"}, {"toys", "late"}, {"toys", "late"}]


def test_samples_are_those_of_their_round():
    data = ToyDataset(FIVE)
    rounds, take = [], data.samples.take
    data.samples.take = lambda positions, round_number=0: rounds.append(round_number) or take(positions)
    source = source_of(data, size=5)
    for epoch in range(3):
        source.build_window(epoch, epoch, 0)
    assert rounds == [0, 1, 2]


def test_a_file_of_embeddings_is_drawn_by_seed_step_and_slot_of_the_whole_window():
    asked = []
    data = ToyDataset(FIVE)
    data.prompt_files = SimpleNamespace(
        take=lambda samples: [SimpleNamespace(dropped=None)] * len(samples),
        embeds=lambda row, sample, *key: asked.append((sample.digest, key)),
    )
    window = source_of(data, gradient_accumulation_steps=2).build_window(3, 0, 0)
    digests = [digest for batch in window.batches for digest in batch.digests]
    assert asked == [(digest, (7, 3, slot)) for slot, digest in enumerate(digests)]
    assert len(asked) > 2


def test_where_a_caption_is_dropped_the_file_says_what_stands_for_it_or_the_family_does():
    """All captions are dropped. Of five images the first has a file for that; the others ask the family, each with its
    own references."""
    data, family = ToyDataset(FIVE), ToyFamily()
    asked = []
    family.encode_prompts = lambda prompts, references=None: (
        asked.extend(zip(prompts, references, strict=True)) or [f"of {references[0][0].content}"]
    )
    data.prompt_files = SimpleNamespace(
        take=lambda samples: [SimpleNamespace(dropped="empty.npz" if each.path == "a" else None) for each in samples],
        read=lambda file: f"read from {file}",
    )
    for row in data.samples.rows:
        guide = Sample("toys", row.path, f"guide of {row.path}", 8, 8, (), Crop(8, 8, 0, 0, 8, 8))
        data.samples.rows[data.samples.rows.index(row)] = dataclasses.replace(row, references=(guide,))
    source = source_of(data, 5, family=family, caption_dropout_probability=1.0, reference_dropout_probability=0.0)
    [batch] = source.build_window(0, 0, 0).batches
    wanted = [f"of guide of {name}" if name != "a" else "read from empty.npz" for name in batch.digests]
    assert batch.prompt_embeds == wanted
    assert {prompt for prompt, _ in asked} == {family.spec.dropped_caption}


def test_each_reference_has_the_latents_of_its_own_dataset():
    crop = Crop(8, 8, 0, 0, 8, 8)
    row = [Sample(dataset_id, "a", "a", 8, 8, (), crop) for dataset_id in ("one", "two")]
    sources = {"one": ToySource({"a": (1.0, 1.0)}), "two": ToySource({"a": (2.0, 2.0)})}
    found = reference_latents(sources, [row, [], row[1:]])
    assert [[float(each[0, 0, 0]) for each in row] for row in found] == [[1, 2], [], [2]]
    assert reference_latents(sources, [[], []]) == []


def test_an_empty_mask_takes_its_image_out_of_the_weight_of_the_window():
    data = ToyDataset(FIVE, mask_of={"a": 1.0, "b": 0.0, "c": 0.25, "d": 0.0, "e": 1.0})
    window = source_of(data, 5).build_window(0, 0, 0)
    assert (window.weight, window.num_samples) == (3, 5)


def test_the_family_is_asked_for_the_dropped_caption_alone_where_files_hold_all_others():
    """At least one of a hundred windows of five drops some captions and not the first."""
    data, family, asked = ToyDataset(FIVE), ToyFamily(), []
    family.encode_prompts = lambda prompts, references=None: asked.append(list(prompts)) or ["dropped"]
    data.prompt_files = SimpleNamespace(
        take=lambda samples: [SimpleNamespace(dropped=None)] * len(samples),
        embeds=lambda row, sample, *key: "of a file",
    )
    source = source_of(data, 5, family=family, caption_dropout_probability=0.5)
    batches = [source.build_window(step, 0, 0).batches[0] for step in range(100)]
    assert any(each.prompt_embeds[0] == "of a file" and "dropped" in each.prompt_embeds for each in batches)
    assert asked == [[family.spec.dropped_caption]] * len(asked)
    assert len(asked) == sum(each.prompt_embeds.count("dropped") for each in batches)
