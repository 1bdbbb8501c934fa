"""What the end of a run tells its user."""

from __future__ import annotations

import json
import shlex
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.errors import DataError, Interrupted, Problem
from simpletuner.reporting.events import Notice, RunFinished
from simpletuner.training import adapter_roundtrip, finish, trainer
from simpletuner.training.adapter_roundtrip import probe_dtype
from simpletuner.training.finish import (
    costing_only,
    final_files,
    generate_command,
    has_final_weights,
    has_outputs,
    note_final_weights,
)
from simpletuner.training.loop import run_training
from simpletuner.training.run import Run
from tests.toy import load_toy, toy_run

ONE = {"a": (1.0, 3.0)}


def test_the_command_at_the_end_generates_as_validation_does(tmp_path: Path) -> None:
    """`validation_resolution` is width x height."""
    loaded = load_toy(
        tmp_path,
        validation_prompt="a red star",
        validation_resolution="64x32",
        validation_num_inference_steps=7,
        validation_guidance=2.5,
    )
    family: Any = SimpleNamespace(source=SimpleNamespace(model="the/base", file=None), prompt_settings={})
    words = shlex.split(generate_command(loaded, family, {"adapter": Path("out/a.safetensors")}))
    assert words[1] == "generate"
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--model"] == "the/base"
    assert given["--adapter"] == "out/a.safetensors"
    assert given["--prompt"] == "a red star"
    assert (given["--width"], given["--height"]) == ("64", "32")
    assert (given["--steps"], given["--guidance"]) == ("7", "2.5")
    whole = shlex.split(generate_command(loaded, family, {"model": Path("out/pipeline")}))
    assert whole[whole.index("--model") + 1] == "out/pipeline"
    assert "--adapter" not in whole


def test_final_weights_count_where_they_are_whole_and_of_this_step(tmp_path: Path) -> None:
    run, _ = toy_run(tmp_path, {"a": (1.0, 3.0)}, max_train_steps=2)
    path = run.session.output_dir / run.model.adapter.file_name
    run.model.adapter.save(path, {})
    run.progress.global_step = 2
    note_final_weights(run)
    assert has_final_weights(run)
    run.progress.global_step = 3
    assert not has_final_weights(run)
    run.progress.global_step = 2
    run.model.adapter.save(path, {"written": "again"})
    assert not has_final_weights(run)


def test_the_command_has_what_images_depend_on(tmp_path: Path) -> None:
    """A file of settings where no flag says it; a whole model has its settings in its folder."""
    loaded = load_toy(tmp_path, validation_negative_prompt="blurry", base_model_precision="int8-quanto")
    family: Any = SimpleNamespace(source=SimpleNamespace(model="the/base", file=None), prompt_settings={})
    words = shlex.split(generate_command(loaded, family, {"adapter": Path("a")}))
    assert words[words.index("--negative-prompt") + 1] == "blurry"
    assert words[words.index("--base-precision") + 1] == "int8-quanto"
    assert words[words.index("--prompt") + 1] == "a cat"
    assert words[words.index("--model-family") + 1] == loaded.config.model.model_family
    family.prompt_settings = {"max_sequence_length": 77}
    words = shlex.split(generate_command(loaded, family, {"model": Path("out/pipeline")}))
    assert words[1:4] == ["generate", "--config", str(loaded.config_file)]
    assert "--pretrained_model_name_or_path=out/pipeline" in words
    family.source.file, family.prompt_settings = "base.safetensors", {}
    assert "--config" in generate_command(loaded, family, {"adapter": Path("a")})
    assert "--config" not in generate_command(loaded, family, {"model": Path("out/pipeline")})


def test_what_fails_beside_the_weights_costs_a_warning(tmp_path: Path) -> None:
    run, recorder = toy_run(tmp_path, ONE)
    for error in (DataError(Problem("no room")), OSError("gone"), ImportError("no", name="matplotlib")):
        with costing_only(run.session, "loss curve"):
            raise error
    with pytest.raises(ZeroDivisionError), costing_only(run.session, "loss curve"):
        raise ZeroDivisionError
    told = [notice.text for notice in recorder.of(Notice)]
    assert told == [
        "no loss curve: no room",
        "no loss curve: gone",
        "no loss curve: the package matplotlib cannot be imported; fix: install it again",
    ]


def test_the_end_is_reported_with_all_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2, checkpoint_step_interval=1, checkpoints_total_limit=1)
    run_training(run)
    output = run.session.output_dir
    run.session.checkpoints.link_best(2, 0.25)
    recorder.events.clear()
    (output / "report.html").write_text("of an earlier end")
    run.model.adapter.save(output / run.model.adapter.file_name, {})
    run.model.family.num_cut_prompts = 3
    monkeypatch.setattr(type(run.model.family), "max_prompt_tokens", 77)
    reported = []
    monkeypatch.setattr(finish, "save_weights", lambda run: {"adapter": output / "toy.safetensors"})
    monkeypatch.setattr(finish, "generate_command", lambda *given: "generate it")
    monkeypatch.setattr(finish, "report_run", lambda *given: reported.append((output / "report.html").exists()))
    finish.finish_run(run, 12.5)
    [end] = recorder.of(RunFinished)
    assert (end.step, end.seconds, end.commands) == (2, 12.5, ("generate it",))
    assert list(end.outputs) == ["adapter", "best checkpoint (step 2, eval loss 0.2500)", "report"]
    told = [notice.text for notice in recorder.of(Notice)]
    assert told[0] == "truncated 3 prompts to 77 tokens"
    assert "checkpoint-1 removed: checkpoints_total_limit is 1" in told
    assert reported == [False]  # that of an earlier end is gone by then
    assert has_final_weights(run)


def test_an_end_counts_where_all_that_it_made_is_still_there(tmp_path: Path) -> None:
    """The folder was renamed since: its paths are looked for where it is now, others are not looked for."""
    run, _ = toy_run(tmp_path, ONE)
    run.progress.global_step, output = 3, run.session.output_dir

    def end(step: int, *names: str) -> dict[str, Any]:
        outputs = {name: f"/before/{name}" for name in names} | {"elsewhere": "/somewhere/else"}
        return {"event": "run_finished", "step": step, "seconds": 1.0, "outputs": outputs, "commands": []}

    def write(*records: dict[str, Any]) -> None:
        lines = [{"event": "other", "output_dir": "/before"}, *records]
        (output / "metrics.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))

    write(end(2, "loss.png"))
    assert not has_outputs(run)
    write(end(3, "loss.png"), end(3, "report.html"), end(2, "x"))
    assert not has_outputs(run)
    (output / "report.html").touch()
    assert has_outputs(run)
    write(end(3, "report.html", "loss.png"))
    assert not has_outputs(run)


def test_an_average_has_final_weights_of_its_own(tmp_path: Path) -> None:
    run, _ = toy_run(tmp_path, ONE, use_ema=True)
    output = run.session.output_dir
    names = [path.relative_to(output).as_posix() for path in final_files(run.model, output)]
    assert names == ["toy.safetensors", "ema/toy.safetensors"]
    run.model.ema, run.model.adapter.can_be_disabled = None, False
    names = [path.relative_to(output).as_posix() for path in final_files(run.model, output)]
    assert names == ["pipeline/manifest.json"]


@pytest.mark.parametrize(
    ("error", "is_reported"),
    [(DataError("no room"), True), (Interrupted("stopped", 143), False)],
    ids=["failed", "stopped"],
)
def test_a_run_that_fails_gets_its_report_and_one_that_is_stopped_leaves_at_once(
    tmp_path, monkeypatch, error, is_reported
):
    run, _ = toy_run(tmp_path, ONE)
    reports = []

    def fail(run: Run) -> None:
        raise error

    for name, function in {
        "build_run": lambda loaded, process: run,
        "build_sinks": lambda *given, **named: [],
        "build_publisher": lambda *given: None,
        "chosen_kernels": lambda *given: nullcontext(),
        "run_training": fail,
        "report_run": lambda output_dir, *given: reports.append(output_dir),
    }.items():
        monkeypatch.setattr(trainer, name, function)
    with pytest.raises(type(error)):
        trainer.train(run.loaded)
    assert len(reports) == is_reported


def test_a_file_is_as_exact_as_the_coarsest_of_base_and_adapter():
    def probed(base: torch.dtype, *trained: torch.dtype) -> torch.dtype:
        family = SimpleNamespace(dtype=base)
        model: Any = SimpleNamespace(family=family, trainable=[torch.zeros(1, dtype=dtype) for dtype in trained])
        return probe_dtype(model)

    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32
    assert probed(wide, wide, wide) == wide
    assert probed(wide, wide, narrow) == probed(narrow, wide) == probed(half, narrow) == narrow
    assert probed(half, wide) == half


class Proving:
    """A family whose denoiser takes 80 bytes."""

    spec = source = prompts = None
    dtype = torch.float32

    def __init__(self, *given: Any) -> None:
        """The same everywhere."""

    def empty_denoiser(self) -> nn.Module:
        return nn.Linear(4, 4)

    load_denoiser = empty_denoiser


def test_a_file_is_proved_where_memory_holds_the_model_once_more_and_else_that_is_said(tmp_path, monkeypatch):
    proved: list[Path] = []
    monkeypatch.setattr(adapter_roundtrip, "check_saved_adapter", lambda path, *given: proved.append(path))
    run, recorder = toy_run(tmp_path, ONE)
    model: Any = SimpleNamespace(family=Proving(), denoiser=nn.Linear(4, 4), trainable=[torch.zeros(1)])
    for free in (119, 121):  # one and a half times 80 are 120
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(adapter_roundtrip.psutil, "virtual_memory", lambda memory=memory: memory)
        reference = adapter_roundtrip.LiveOutput(torch.zeros(1), torch.zeros(1))
        adapter_roundtrip.prove_adapter(model, run.session, Path(f"of-{free}"), reference)
    assert proved == [Path("of-121")]
    [notice] = recorder.of(Notice)
    assert notice.text.startswith("of-119 was not checked on a fresh model")


def test_a_file_is_proved_on_the_weights_that_a_packed_base_computed_with(tmp_path, monkeypatch):
    copied: list[tuple[Any, Any]] = []
    proved: list[Any] = []
    monkeypatch.setattr(adapter_roundtrip, "copy_unpacked", lambda *given: copied.append(given))
    monkeypatch.setattr(adapter_roundtrip, "check_saved_adapter", lambda path, fresh, *given: proved.append(fresh))
    run, _ = toy_run(tmp_path, ONE)
    model: Any = SimpleNamespace(family=Proving(), denoiser=nn.Linear(4, 4), trainable=[torch.zeros(1)])
    reference = adapter_roundtrip.LiveOutput(torch.zeros(1), torch.zeros(1))
    adapter_roundtrip.prove_adapter(model, run.session, Path("file"), reference)
    [fresh] = proved
    assert copied == [(model.denoiser, fresh)]
    assert fresh is not model.denoiser


def test_an_average_of_an_earlier_end_is_moved_aside_where_none_is_kept_now(tmp_path, monkeypatch):
    for name in ("save_adapter", "save_model"):
        monkeypatch.setattr(finish, name, lambda run, folder: folder / "weights")
    run, _ = toy_run(tmp_path, ONE)
    (tmp_path / "output" / "ema").mkdir()
    (tmp_path / "output" / "ema" / "weights").write_text("an average")
    finish.save_weights(run)
    assert not (tmp_path / "output" / "ema").exists()
    assert [path.read_text() for path in tmp_path.glob("output/earlier-runs/*/ema/weights")] == ["an average"]


def test_the_weights_at_the_end_are_those_that_the_optimizer_is_there_to_find(tmp_path, monkeypatch):
    """Those of a schedule-free optimizer are an average; the EMA is one of its own."""
    run, _ = toy_run(tmp_path, ONE, use_ema=True)
    saved: list[tuple[bool, Any]] = []
    inside: list[None] = []

    @contextmanager
    def averaged(optimizer):
        inside.append(None)
        yield
        inside.pop()

    monkeypatch.setattr(finish, "averaged_weights", averaged)
    monkeypatch.setattr(finish, "save_adapter", lambda run, folder: (saved.append((bool(inside), folder)), folder)[1])
    finish.save_weights(run)
    assert saved == [(True, run.session.output_dir), (False, run.session.output_dir / "ema")]


@pytest.mark.parametrize("is_generated", [False, True])
def test_an_end_without_its_last_images_is_none(tmp_path, monkeypatch, is_generated: bool):
    run, _ = toy_run(tmp_path, ONE)
    for name in ("has_final_weights", "has_outputs"):
        monkeypatch.setattr(finish, name, lambda run: True)
    assert finish.was_finished(run)  # nothing is generated in this run
    run.validator = SimpleNamespace(has_generated=lambda step, ema: is_generated)  # type: ignore[assignment]
    assert finish.was_finished(run) == is_generated
