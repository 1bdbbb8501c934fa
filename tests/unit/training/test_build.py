"""What the parts of a run are made of, and what is told as they are put together (`tests/toy.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner import storage
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.reporting.events import Notice, RunStarted
from simpletuner.training import build
from simpletuner.training.build import announce, build_evaluator, build_validator, describe_adapter, resume, run_length
from simpletuner.training.evaluate import write_eval_history
from simpletuner.training.loop import run_training
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.start import Start
from tests.configs import config_of
from tests.toy import ToyDataset, toy_run

ONE = {"a": (1.0, 3.0)}


def texts(recorder) -> list[str]:
    return [notice.text for notice in recorder.of(Notice)]


def test_a_resumed_run_ends_where_its_epochs_do(tmp_path: Path) -> None:
    """One image is one step an epoch: after two of two epochs, four are two more."""
    options = {"max_train_steps": 0, "checkpoint_step_interval": 1}
    run, _ = toy_run(tmp_path, ONE, num_train_epochs=2, **options)
    run_training(run)
    longer, _ = toy_run(tmp_path / "longer", ONE, num_train_epochs=4, **options)
    training, sampler = longer.config.training, longer.batches.sampler
    fresh = run_length(training, sampler, None)
    assert (fresh.total_steps, fresh.notice) == (4, None)
    resumed = run_length(training, sampler, tmp_path / "output/checkpoint-2")
    assert resumed.total_steps == 4
    assert resumed.notice == ("the run now ends at step 4, not 2: 2 steps are done, 2 of 4 epochs remain, 2 steps")


def test_an_adapter_says_which_layers_it_is_on_and_how_much_trains(tmp_path: Path) -> None:
    run, recorder = toy_run(tmp_path, ONE)
    run.model.adapter.report = [
        SimpleNamespace(entry="Attention", class_name="Attention", modules=3),
        SimpleNamespace(entry="FeedForward", class_name="ToyFeedForward", modules=2),
    ]
    run.model.adapter.notices = ["something to note"]
    describe_adapter(run.model.adapter, run.session)
    assert texts(recorder) == [
        "adapter: 3 modules of Attention",
        "adapter: 2 modules of FeedForward (ToyFeedForward)",
        "2 parameters are trained",
        "something to note",
    ]
    run.model.adapter.can_be_disabled, run.model.adapter.notices = False, []
    run.model.adapter.report = [SimpleNamespace(entry="all parameters", class_name="ToyDenoiser", modules=1)]
    recorder.events.clear()
    describe_adapter(run.model.adapter, run.session)
    assert texts(recorder) == ["full training: all parameters, 1 tensors of ToyDenoiser", "2 parameters are trained"]


def test_a_model_has_the_average_and_the_schedule_that_the_configuration_says(tmp_path: Path, monkeypatch) -> None:
    average = {"use_ema": True, "ema_decay": 0.75, "ema_update_interval": 3}
    schedule = {"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_end": 0.0, "lr_warmup_steps": 0}
    plain = {"gradient_checkpointing": False, "activation_memory": "high"}
    run, _ = toy_run(tmp_path, ONE, **average, **schedule, **plain)
    answers = {
        **{"mesh_of": None, "must_take_turns": False, "attach_adapter": run.model.adapter, "describe_adapter": None},
        **{"place_denoiser": run.model.placement, "choose_kernels": None},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(build, name, lambda *given, answer=answer: answer)
    run.model.family.load_base = lambda: run.model.denoiser  # type: ignore[method-assign]
    model = build.load_model(run.loaded, run.model.family, run.session, None, 10, None, None, has_sizes=False)
    assert model.ema is not None
    assert (model.ema.decay, model.ema.update_interval) == (0.75, 3)
    assert [model.lr_factor(step) for step in (0, 5, 10)] == [1.0, 0.25, 0.0]
    assert model.placement is run.model.placement


def test_the_eval_loss_is_of_the_dataset_that_is_named_or_of_all(tmp_path: Path) -> None:
    run, _ = toy_run(tmp_path, ONE)
    datasets: Any = [
        SimpleNamespace(id=name, kind=kind) for name, kind in (("a", "eval"), ("b", "eval"), ("c", "image"))
    ]

    def judged(given: Any = datasets, **options: Any) -> list[str] | None:
        config = config_of(**{"eval_steps_interval": 5} | options)
        evaluator = build_evaluator(config, run.model.family, given, {}, run.session)
        return [dataset.id for dataset in evaluator.datasets] if evaluator else None

    assert judged() == ["a", "b"]
    assert judged(eval_dataset_id="b") == ["b"]
    assert judged(eval_dataset_id="c") is None
    assert judged(datasets[2:]) is None
    assert judged(eval_steps_interval=None) is None
    assert judged(eval_steps_interval=None, eval_epoch_interval=0.5) == ["a", "b"]
    evaluator = build_evaluator(config_of(eval_steps_interval=5), run.model.family, datasets, {}, run.session)
    assert evaluator is not None
    assert not evaluator.is_stopping()
    run.session.stop.adopt()
    assert evaluator.is_stopping()


def test_images_are_generated_by_the_main_process_or_by_all_that_share_the_denoiser(tmp_path, monkeypatch) -> None:
    run, _ = toy_run(tmp_path, ONE)
    made: list[tuple[Any, ...]] = []

    def make(*given: Any, **named: Any) -> Any:
        made.append((given[3], named["together"]))
        return SimpleNamespace(requests=["one"])

    monkeypatch.setattr(build, "Validator", make)
    monkeypatch.setattr(build, "references_of_run", lambda *given: ())

    def built(rank: int, spread: bool, **options: Any) -> Any:
        run.session.process_group = ProcessGroup(rank, 2, rank)
        monkeypatch.setattr(build, "is_denoiser_spread", lambda options: spread)
        loaded: Any = SimpleNamespace(config=config_of(**options), prompt_library=None)
        return build_validator(loaded, run.model.family, [], run.session)

    assert built(0, False) is not None
    assert made.pop() == (run.session.output_dir, SINGLE_PROCESS)
    assert built(1, False) is None
    assert built(0, True, validation_disable=True) is None
    assert made == []
    assert built(1, True) is not None
    [(folder, together)] = made
    assert folder != run.session.output_dir
    assert together is run.session.process_group
    script = {"validation_method": "external-script", "validation_external_script": "echo"}
    assert built(1, True, **script) is None
    assert isinstance(built(0, True, **script), build.ExternalScript)
    monkeypatch.setattr(build, "Validator", lambda *given, **named: SimpleNamespace(requests=[]))
    assert built(0, False) is None


@pytest.mark.parametrize(("named", "expected"), [({}, "output"), ({"tracker_run_name": "a name"}, "a name")])
def test_an_external_script_is_given_the_name_of_the_run_or_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], expected: str
) -> None:
    run, _ = toy_run(tmp_path, ONE)
    script = {"validation_method": "external-script", "validation_external_script": "echo"}
    monkeypatch.setattr(build, "ExternalScript", lambda command, facts, *rest: facts)
    loaded: Any = SimpleNamespace(config=config_of(**script, **named, validation_prompt="a cat"), prompt_library=None)
    facts: Any = build_validator(loaded, run.model.family, [], run.session)
    assert facts["tracker_run_name"] == expected
    assert (facts["output_dir"], facts["validation_prompt"]) == (str(tmp_path / "output"), "a cat")


def test_a_start_says_what_is_about_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=7, tracker_run_name="a name")
    run.datasets = [ToyDataset(ONE), ToyDataset({"b": (1.0, 1.0), "c": (1.0, 1.0)}, id="others")]
    run.progress.global_step, run.is_complete = 2, True
    run.model.family.source = SimpleNamespace(model="the/base")
    monkeypatch.setattr(build, "form_and_kind", lambda *given: ("peft", "lora"))
    announce(run)
    [event] = recorder.of(RunStarted)
    assert (event.run_name, event.start_step, event.total_steps, event.is_complete) == ("a name", 2, 7, True)
    assert event.output_dir == run.session.output_dir
    mark = run.session.checkpoints.history.mark
    assert (event.run_id, event.branch) == (mark.run_id, mark.branch)
    assert event.details["images"] == "toys: 1, others: 2"
    assert event.details["adapter file"].startswith("peft format")
    assert event.details["device"] == "cpu in float32"
    assert event.details["model"] == f"{run.model.family.spec.title} (the/base)"
    assert event.details["checkpoints"].startswith("at the end")
    assert event.options["max_train_steps"] == 7


def test_a_resume_knows_the_eval_losses_up_to_its_step_and_says_where_it_stands(tmp_path, monkeypatch) -> None:
    options = {"max_train_steps": 3, "checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
    run, _ = toy_run(tmp_path, ONE, **options)
    run_training(run)
    write_eval_history(run.session, {1: 0.5, 2: 0.25, 3: 0.125})
    for name in ("announce", "write_lock", "was_finished"):
        monkeypatch.setattr(build, name, lambda *given, **named: True)
    history, path = run.session.checkpoints.history, tmp_path / "output/checkpoint-2"
    again, recorder = toy_run(tmp_path, ONE, **options)
    resume(again, Start(history, path, is_own=True, moves=False))
    assert again.progress.eval_losses == {1: 0.5, 2: 0.25}
    assert not again.is_complete
    assert texts(recorder)[-1] == "resumed checkpoint-2: step 2 of 3"
    foreign, recorder = toy_run(tmp_path / "other", ONE, **options)
    resume(foreign, Start(foreign.session.checkpoints.history, path, is_own=False, moves=False))
    assert foreign.progress.eval_losses == {}
    assert texts(recorder)[-1] == f"resumed {path}: step 2 of 3"
    done, _ = toy_run(tmp_path, ONE, **options)
    resume(done, Start(history, tmp_path / "output/checkpoint-3", is_own=True, moves=False))
    assert done.is_complete


@pytest.mark.parametrize("sizes", [1, 2])
def test_a_run_has_the_seed_the_limits_and_the_sizes_of_its_configuration(tmp_path, monkeypatch, sizes: int) -> None:
    options = {"seed": 7, "checkpoints_total_limit": 3, "pause_on_full_disk": True, "max_train_steps": 9}
    toy, _ = toy_run(tmp_path, ONE, mixed_precision="fp16", **options)
    datasets: Any = [ToyDataset({"a": (1.0, 3.0), "b": (1.0, 3.0)})]
    datasets[0].kind = "image"
    if sizes == 2:
        datasets[0].buckets = {(8, 8): datasets[0].buckets[8, 8][:1], (8, 16): datasets[0].buckets[8, 8][1:]}
    asked: list[Any] = []
    family: Any = toy.model.family
    family.number_formats = None
    answers = {
        **{"plan_start": Start(toy.session.checkpoints.history), "keep_choice": toy.loaded, "build_family": family},
        **{"require_usable": None, "find_assistant": None, "prepare_datasets": datasets, "require_device": None},
        **{"fit_into_memory": (toy.loaded, 5), "prepare_data": (datasets, {}), "build_sampler": toy.batches.sampler},
        **{"build_evaluator": None, "build_validator": None, "resume": None},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(build, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(build, "load_model", lambda *given: (asked.extend(given), toy.model)[1])
    bus, stop = toy.session.bus, toy.session.stop
    run = build.build_run(toy.loaded, Process(guard=FolderGuard(toy.session.output_dir), bus=bus, stop=stop))
    assert (run.seed, run.max_train_steps, run.session.checkpoints.limit) == (7, 9, 3)
    assert run.session.pauses_on_full_disk
    assert (run.progress.loss_scale.is_active, run.progress.loss_scale.scale) == (True, 65536)
    assert asked[-2:] == [5, sizes == 2]  # the bytes of `memory`, and whether images come in several sizes


@pytest.mark.parametrize("is_written", [False, True])
def test_a_model_is_built_with_the_seed_the_strength_and_the_memory_that_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    """And it has an average, or the assistant, only where that is asked for."""
    average = {"use_ema": True} if is_written else {}
    run, _ = toy_run(tmp_path, ONE, seed=7, activation_memory="high", **average)
    loaded = replace(run.loaded, config=run.loaded.config.with_values({"assistant_lora_strength": 0.25}))
    asked: dict[str, Any] = {}
    answers = {
        **{"mesh_of": None, "must_take_turns": False, "attach_adapter": run.model.adapter, "describe_adapter": None},
        **{"place_denoiser": run.model.placement, "choose_kernels": None, "compile_blocks": None},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(build, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(build, "build_optimizer", lambda options, parameters, seed=0: asked.update(seed=seed))
    monkeypatch.setattr(build, "attach_assistant", lambda base, file, strength, spec: asked.update(a=strength) or "one")
    recomputing = SimpleNamespace(of=lambda config, device, limit, *rest: asked.update(limit=limit))
    monkeypatch.setattr(build, "GradientCheckpointing", recomputing)
    run.model.family.load_base = lambda: run.model.denoiser  # type: ignore[method-assign]
    file = Path("assistant.safetensors") if is_written else None
    model = build.load_model(loaded, run.model.family, run.session, None, 10, file, 5, has_sizes=False)
    assert asked == {"seed": 7, "limit": 5} | ({"a": 0.25} if is_written else {})
    assert (model.ema is not None) == is_written


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_a_model_is_loaded_in_turns_where_memory_asks_for_it_and_a_cpu_says_what_it_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, waits: bool
) -> None:
    run, recorder = toy_run(tmp_path, ONE, gradient_checkpointing=False)
    seen: list[str] = []

    @contextmanager
    def in_turns(self: ProcessGroup) -> Iterator[None]:
        seen.append("begin")
        yield
        seen.append("end")

    monkeypatch.setattr(ProcessGroup, "in_turns", in_turns)
    answers = {
        **{"mesh_of": None, "must_take_turns": waits, "attach_adapter": run.model.adapter, "describe_adapter": None},
        **{"place_denoiser": run.model.placement, "choose_kernels": None, "compile_blocks": None},
    }
    for name, answer in answers.items():
        monkeypatch.setattr(build, name, lambda *given, answer=answer: answer)
    run.model.family.device = torch.device(device)
    run.model.family.load_base = lambda: (seen.append("load"), run.model.denoiser)[1]  # type: ignore[method-assign]
    loaded = replace(run.loaded, config=run.loaded.config.with_values({"activation_memory": "high"}))
    build.load_model(loaded, run.model.family, run.session, None, 10, None, None, has_sizes=False)
    assert seen == (["begin", "load", "end"] if waits else ["load"])
    assert ("activation_memory: high, the default on a CPU" in texts(recorder)) == (device == "cpu")


def test_an_epoch_that_is_shorter_now_ends_a_resumed_run_where_as_much_is_left(tmp_path: Path) -> None:
    """Half of the first of two epochs is done: of two images in one batch that is none of it."""
    two = {"a": (1.0, 3.0), "b": (1.0, 3.0)}
    options = {"max_train_steps": 0, "num_train_epochs": 2, "checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
    run, _ = toy_run(tmp_path, two, train_batch_size=1, **options)
    run_training(run)
    other, _ = toy_run(tmp_path / "other", two, train_batch_size=2, **options)
    resumed = run_length(other.config.training, other.batches.sampler, tmp_path / "output/checkpoint-1")
    assert resumed.total_steps == 1 + 2


def test_a_resume_finds_the_best_checkpoint_that_the_record_lacks_and_tells_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_train_steps": 3, "checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
    run, _ = toy_run(tmp_path, ONE, **options)
    run_training(run)
    write_eval_history(run.session, {1: 0.5})
    run.session.checkpoints.link_best(2, 0.25)
    for name in ("announce", "write_lock"):
        monkeypatch.setattr(build, name, lambda *given, **named: None)
    start = Start(run.session.checkpoints.history, tmp_path / "output/checkpoint-2", is_own=True, moves=False)
    again, _ = toy_run(tmp_path, ONE, **options)
    resume(again, start)
    assert again.progress.eval_losses == {1: 0.5, 2: 0.25}
    of_main = iter([{"1": 0.5}, {"1": 0.5, "2": 0.25}])
    monkeypatch.setattr(ProcessGroup, "is_main", property(lambda self: False))
    monkeypatch.setattr(ProcessGroup, "from_main", lambda self, value: next(of_main))
    other, _ = toy_run(tmp_path, ONE, **options)
    resume(other, start)
    assert other.progress.eval_losses == {1: 0.5, 2: 0.25}


def test_eval_losses_of_other_images_are_gone_from_the_folder_too(tmp_path: Path, monkeypatch) -> None:
    options = {"max_train_steps": 2, "checkpoint_step_interval": 1}
    run, _ = toy_run(tmp_path, ONE, **options)
    run_training(run)
    write_eval_history(run.session, {1: 0.5, 2: 0.25})
    for name in ("announce", "write_lock"):
        monkeypatch.setattr(build, name, lambda *given, **named: None)
    monkeypatch.setattr(build, "is_comparable", lambda *given: False)
    again, _ = toy_run(tmp_path, ONE, max_train_steps=3)
    path = tmp_path / "output/checkpoint-2"
    resume(again, Start(run.session.checkpoints.history, path, is_own=True, moves=False))
    assert again.progress.eval_losses == {}
    assert storage.read_json(tmp_path / "output" / "eval_losses.json")["losses"] == {}


@pytest.mark.parametrize(("model_type", "dtype"), [("full", torch.bfloat16), ("lora", torch.float32)])
def test_an_optimizer_is_tried_in_the_number_format_of_what_it_will_train(monkeypatch, model_type, dtype) -> None:
    tried: list[Any] = []
    for name in ("check_denoiser_file", "require_device", "require_compiler"):
        monkeypatch.setattr(build, name, lambda *given: None)
    monkeypatch.setattr(build, "require_optimizer", lambda options, device, dtype: tried.append(dtype))
    name = next(name for name, row in OPTIMIZERS.items() if row.bf16_weights and name != "adamw_bf16")
    loaded: Any = SimpleNamespace(config=config_of(model_type=model_type, mixed_precision="bf16", optimizer=name))
    family: Any = SimpleNamespace(**dict.fromkeys(("source", "spec", "number_formats", "device", "dtype")))
    build.require_usable(loaded, family)
    assert tried == [dtype]
