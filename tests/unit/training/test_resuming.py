"""Epochs are counted from where a run stands, whatever changed since; what changed is said in words."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from simpletuner.data.sampler import Sampler
from simpletuner.data.schedule import Schedule
from simpletuner.errors import ConfigError
from simpletuner.training.identity import (
    compare_identity,
    differences,
    fixed_settings,
    option_changes,
    run_identity,
)
from simpletuner.training.progress import Progress
from simpletuner.training.resuming import length_facts, resumed_length, resumed_progress, total_train_steps
from tests.configs import config_of
from tests.runs import dataset, metrics, train_here, write_images, write_run
from tests.toy import ToyDataset, load_toy


class Images:
    """A dataset of one size, as the sampler sees it."""

    id = "a"
    batch_size = None
    with_replacement = False

    def __init__(self, count: int, repeats: int = 0, probability: float = 1.0):
        self.repeats, self.schedule = repeats, Schedule(probability=probability)
        self._buckets = {(64, 64): np.arange(count)}

    def buckets_in(self, round_number: int):
        return self._buckets


def loaded(epochs: float, accumulation: int = 1, steps: int = 0) -> Any:
    options = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulation, "max_train_steps": steps}
    return config_of(**options).training


def saved_after(steps: int, epoch: int, position: int, sampler: Sampler, total: int) -> dict[str, Any]:
    state = Progress(steps, epoch, position)
    return {"state": state.place(), "length": length_facts(state, sampler, total)}


EIGHT = Sampler([Images(8)], 1, seed=1)  # 8 batches an epoch


@pytest.mark.parametrize(
    ("sampler", "now", "total"),
    [
        (Sampler([Images(8)], 2, seed=1), loaded(10), 60),  # 5 epochs of 4
        (Sampler([Images(16)], 1, seed=1), loaded(10), 120),  # 5 of 16
        (EIGHT, loaded(10, accumulation=2), 60),  # 40 batches, two at a time
        (Sampler([Images(8, repeats=2)], 1, seed=1), loaded(10), 160),  # 5 of 24
        (Sampler([Images(8, probability=0.5)], 1, seed=1), loaded(10), 60),  # 5 of 4
        (Sampler([Images(8)], 4, seed=1, num_ranks=4), loaded(10), 50),  # four processes: 5 of 2
        (EIGHT, loaded(10), 80),
        (EIGHT, loaded(5), 40),
        (EIGHT, loaded(3), 40),  # done
        (EIGHT, loaded(0, steps=55), 55),
    ],
)
def test_the_end_is_what_is_done_and_what_remains(sampler: Sampler, now: Any, total: int) -> None:
    saved = saved_after(40, 5, 0, EIGHT, 40)
    found = resumed_length(now, sampler, saved, resumed_progress(saved, sampler))
    assert found.total_steps == total
    assert (found.notice is None) == (total == 40)


def test_half_an_epoch_stays_half_an_epoch() -> None:
    saved = saved_after(44, 5, 4, EIGHT, 80)
    halves = Sampler([Images(8)], 2, seed=1)
    state = resumed_progress(saved, halves)
    assert (state.epoch, state.position) == (5, 2)
    found = resumed_length(loaded(10), halves, saved, state)
    assert found.total_steps == 44 + 2 + 4 * 4
    assert found.notice == ("the run now ends at step 62, not 80: 44 steps are done, 4.5 of 10 epochs remain, 18 steps")


def test_without_a_change_every_resume_ends_at_the_same_step() -> None:
    for images, batch, accumulation, epochs in itertools.product((5, 8), (1, 3), (1, 2, 3), (1.5, 4.0)):
        sampler, now = Sampler([Images(images)], batch, seed=1), loaded(epochs, accumulation)
        total = total_train_steps(now, sampler)
        epoch = position = 0
        for step in range(1, total + 1):
            for _ in range(accumulation):
                epoch, position = sampler.after(*sampler.seek(epoch, position, step - 1))
            saved = saved_after(step, epoch, position, sampler, total)
            found = resumed_length(now, sampler, saved, resumed_progress(saved, sampler))
            assert (found.total_steps, found.notice) == (total, None)


def test_a_checkpoint_without_the_length_is_resumed_where_it_says() -> None:
    assert resumed_progress({"state": Progress(3, 0, 3).place()}, EIGHT).position == 3
    # Of an epoch that has become shorter since, none is left.
    assert resumed_progress({"state": Progress(9, 0, 9).place()}, EIGHT).position == 8


@pytest.mark.slow
def test_a_run_with_twice_the_batch_ends_at_the_epoch_that_is_asked_for(tmp_path: Path, omnigen_folder: Path) -> None:
    write_images(tmp_path / "images", 4, seed=1)
    length = {"max_train_steps": 0, "num_train_epochs": 2, "train_batch_size": 1, "checkpoint_step_interval": 0}
    write_run(tmp_path, omnigen_folder, [dataset("images")], **length)
    output = train_here(tmp_path)
    assert len(metrics(output, "step_done")) == 8
    train_here(tmp_path, "--train_batch_size=2", "--num_train_epochs=4", "--lr_warmup_steps=3")
    steps = metrics(output, "step_done")
    assert steps[-1]["step"] == 8 + 2 * 2
    assert [record["epoch"] for record in steps[8:]] == [3, 3, 4, 4]
    texts = [record["text"] for record in metrics(output, "notice")]
    assert "the run now ends at step 12, not 8: 8 steps are done, 2 of 4 epochs remain, 4 steps" in texts
    assert "changed since checkpoint-8: lr_warmup_steps 0 → 3" in texts
    assert "changed since checkpoint-8: train_batch_size 1 → 2" in texts
    seen = [text for text in texts if text.startswith("changed since")]
    train_here(tmp_path, "--train_batch_size=2", "--num_train_epochs=4", "--lr_warmup_steps=3")
    assert [r["text"] for r in metrics(output, "notice") if r["text"].startswith("changed since")] == seen


def identity(**reported: Any) -> dict[str, Any]:
    fixed = {"optimizer": "adamw", "lycoris_config": {"algo": "lokr", "factor": 16}, "parameters": {"a.w": [4, 8]}}
    return {"fixed": fixed, "told": {"torch": "2.0", "processes": 1, "datasets": {}, "schedules": {}, **reported}}


def test_all_that_orders_the_images_of_a_dataset_is_in_a_checkpoint(tmp_path: Path) -> None:
    loaded = load_toy(tmp_path)

    def schedule(**changed: Any) -> dict[str, Any]:
        datasets: Any = [ToyDataset({"a": (1.0, 3.0)}, **changed)]
        return run_identity(loaded, datasets, {}, 1)["told"]["schedules"]["toys"]

    assert schedule() == schedule()
    for changed in ({"repeats": 2}, {"batch_size": 4}, {"with_replacement": True}, {"schedule": Schedule(0.5)}):
        assert schedule(**changed) != schedule(), changed


def data(**images: tuple[int, str]) -> dict[str, Any]:
    return {name: {"images": count, "fingerprint": digest} for name, (count, digest) in images.items()}


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (data(a=(10, "f" * 64)), data(a=(12, "0" * 64)), "dataset a: 2 images added (10 → 12)"),
        (data(a=(10, "f" * 64)), data(a=(9, "0" * 64)), "dataset a: 1 image removed (10 → 9)"),
        (data(a=(10, "f" * 64)), data(a=(10, "0" * 64)), "dataset a: its images, captions or crops are not the same"),
        (data(a=(10, "f" * 64)), data(b=(10, "f" * 64)), "dataset renamed a → b"),
        (data(), data(b=(3, "f" * 64)), "dataset b added with 3 images"),
        (data(b=(3, "f" * 64)), data(), "dataset b removed"),
    ],
)
def test_other_data_are_named_in_words(before: dict, now: dict, line: str) -> None:
    lines = compare_identity(identity(datasets=before), identity(datasets=now), Path("checkpoint-4"))
    assert lines == [f"changed since checkpoint-4: {line}"]


def test_another_factor_is_refused_in_words() -> None:
    now = json.loads(json.dumps(identity()))
    now["fixed"]["lycoris_config"]["factor"] = 4
    now["fixed"]["parameters"] = {"a.w": [16, 2]}
    with pytest.raises(ConfigError) as caught:
        compare_identity(identity(), now, Path("checkpoint-4"))
    (problem,) = caught.value.problems
    assert problem.message == "checkpoint-4 was trained with another value: factor 16 → 4"


def test_other_layers_are_refused_in_words() -> None:
    now = json.loads(json.dumps(identity()))
    now["fixed"]["parameters"] = {"a.w": [4, 16], "b.w": [2]}
    with pytest.raises(ConfigError) as caught:
        compare_identity(identity(), now, Path("checkpoint-4"))
    assert "1 weights are not in it, such as b.w, 1 weights have another size, such as a.w: 4 x 8 → 4 x 16" in str(
        caught.value
    )


def test_nested_settings_differ_by_their_path() -> None:
    before = {"map": {"Attention": {"factor": 16, "bias": False}}, "names": ["a"], "gone": 1}
    now = {"map": {"Attention": {"factor": 4, "bias": False}}, "names": ["a", "b"], "new": None}
    assert differences(before, now) == ["map.Attention.factor 16 → 4", "names a → a, b", "gone 1 → unset"]


def test_the_length_of_an_epoch_is_that_of_the_epoch_that_the_run_is_in():
    """Of two datasets one ends with the first epoch: 3 + 2 batches, then 3."""
    data = [
        ToyDataset({name: (0.0, 0.0) for name in "abc"}),
        ToyDataset({name: (0.0, 0.0) for name in "de"}, id="first", schedule=Schedule(end_epoch=1)),
    ]
    sampler = Sampler(data, 1, seed=1)
    facts = [length_facts(Progress(9, epoch), sampler, 20) for epoch in (0, 1)]
    assert facts == [{"epoch_batches": 5, "total_steps": 20}, {"epoch_batches": 3, "total_steps": 20}]


@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        ({"processes": 1}, {"processes": 2}, "number of processes 1 → 2"),
        ({"torch": "2.0"}, {"torch": "2.1"}, "version of torch 2.0 → 2.1"),
        ({"schedules": {"a": {"repeats": 0}}}, {"schedules": {"a": {"repeats": 2}}}, "dataset a: repeats 0 → 2"),
        ({"assistant": {}}, {"assistant": {"sha256": "f"}}, "an assistant LoRA is on while training now"),
        ({"assistant": {"sha256": "f"}}, {"assistant": {}}, "an assistant LoRA was on while training"),
        ({"assistant": {"sha256": "f"}}, {"assistant": {"sha256": "0"}}, "the assistant LoRA is another file"),
        (
            {"datasets": data(a=(1000, "f"))},
            {"datasets": data(a=(2234, "0"))},
            "dataset a: 1,234 images added (1000 → 2234)",
        ),
    ],
)
def test_what_may_change_is_told_in_words(before: dict, now: dict, line: str) -> None:
    lines = compare_identity(identity(**before), identity(**now), Path("checkpoint-4"))
    assert lines == [f"changed since checkpoint-4: {line}"]
    same = compare_identity(identity(**before), identity(**before), Path("checkpoint-4"))
    assert same == []


@pytest.mark.parametrize("key", ["processes", "torch", "datasets", "schedules"])
def test_what_an_older_checkpoint_does_not_tell_has_not_changed(key: str) -> None:
    saved = identity()
    del saved["told"][key]
    assert compare_identity(saved, identity(), Path("checkpoint-4")) == []


def test_of_two_new_datasets_one_is_the_renamed_one() -> None:
    before, now = data(a=(3, "f")), data(b=(3, "f"), c=(3, "f"))
    lines = compare_identity(identity(datasets=before), identity(datasets=now), Path("checkpoint-4"))
    told = [line.removeprefix("changed since checkpoint-4: ") for line in lines]
    assert told == ["dataset renamed a → b", "dataset c added with 3 images"]


def test_options_that_act_on_the_weights_are_told_and_no_others(tmp_path: Path) -> None:
    loaded = load_toy(tmp_path)
    silent = {"checkpoint_step_interval": 7, "validation_step_interval": 7, "cache_dir": "x", "num_train_epochs": 9}
    saved = loaded.resolved() | silent | {"learning_rate": 0.25, "optimizer": "lion", "no_such_option": 1}
    assert option_changes(saved, loaded, Path("checkpoint-4")) == [
        "changed since checkpoint-4: learning_rate 0.25 → 0.5"
    ]
    older = {key: value for key, value in saved.items() if key != "learning_rate"}
    assert option_changes(older, loaded, Path("checkpoint-4")) == []


def test_settings_of_lora_are_fixed_where_it_is_lora(tmp_path: Path) -> None:
    for kind in ("standard", "lycoris"):
        (tmp_path / kind).mkdir()
        fixed = fixed_settings(load_toy(tmp_path / kind, lora_type=kind))
        assert ("lora_alpha" in fixed, "lora_init_type" in fixed) == ((kind == "standard"),) * 2
        assert fixed["lora_type"] == kind


def test_weights_that_have_no_place_are_named() -> None:
    now = json.loads(json.dumps(identity()))
    now["fixed"]["parameters"] = {}
    with pytest.raises(ConfigError, match=r"1 weights have no place, such as a\.w") as caught:
        compare_identity(identity(), now, Path("checkpoint-4"))
    assert caught.value.problems[0].key == "resume_from_checkpoint"


def test_what_a_resume_is_compared_with_has_the_file_of_lycoris_and_the_processes() -> None:
    loaded: Any = SimpleNamespace(config=config_of(), lycoris={"factor": 4})
    facts = run_identity(loaded, [], {"weight": [2]}, 3)
    assert facts["fixed"]["lycoris_config"] == fixed_settings(loaded)["lycoris_config"] == {"factor": 4}
    assert (facts["fixed"]["parameters"], facts["told"]["processes"]) == ({"weight": [2]}, 3)
