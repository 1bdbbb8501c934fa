"""What surrounds the steps of a run: its folder is cleared up, its record begins or goes on, its caches are closed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner.errors import DataError
from simpletuner.training import trainer
from simpletuner.training.run import Run
from tests.toy import toy_run

# Of a process that ended in 1970, in the folder of a machine that is not known either.
LEFT_OVER = ".tmp-0123abcd-1-1-0123abcd"


@pytest.mark.parametrize(("resume", "is_new"), [("", True), ("none", True), ("latest", False)])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_clears_up_says_whether_it_is_new_and_is_closed_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, is_new: bool, fails: bool
) -> None:
    run, recorder = toy_run(tmp_path, {"a": (1.0, 3.0)}, resume_from_checkpoint=resume)
    output_dir = Path(run.loaded.config.checkpoint.output_dir)
    (output_dir / LEFT_OVER).mkdir(parents=True)
    (output_dir / "logs").mkdir()
    (output_dir / "logs" / LEFT_OVER).write_bytes(b"half of it")
    seen, closed = [], []

    def run_training(run: Run) -> None:
        assert not closed
        assert not list(output_dir.rglob(".tmp-*"))
        if fails:
            raise DataError("no more of it")

    monkeypatch.setattr(run, "close", lambda: closed.append(run))
    for name, function in {
        "build_run": lambda loaded, process: run,
        "build_sinks": lambda options, folder, is_new, **named: seen.append((folder, is_new)) or [recorder],
        "build_publisher": lambda *given: None,
        "chosen_kernels": lambda *given: nullcontext(),
        "run_training": run_training,
        "finish_run": lambda *given: None,
        "report_run": lambda *given: None,
    }.items():
        monkeypatch.setattr(trainer, name, function)
    with pytest.raises(DataError) if fails else nullcontext():
        trainer.train(run.loaded)
    assert seen == [(output_dir, is_new)]
    assert closed == [run]


def test_a_run_ends_with_the_seconds_that_its_steps_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, recorder = toy_run(tmp_path, {"a": (1.0, 3.0)})
    clock = iter([100.0, 103.5])
    seconds: list[float] = []
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for name, function in {
        "build_run": lambda loaded, process: run,
        "build_sinks": lambda *given, **named: [recorder],
        "build_publisher": lambda *given: None,
        "chosen_kernels": lambda *given: nullcontext(),
        "run_training": lambda run: None,
        "finish_run": lambda run, taken: seconds.append(taken),
        "report_run": lambda *given: None,
    }.items():
        monkeypatch.setattr(trainer, name, function)
    trainer.train(run.loaded)
    assert seconds == [3.5]
