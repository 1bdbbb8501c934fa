"""A checkpoint that the disk does not take is tried again, waits where asked, and never ends with a traceback."""

from __future__ import annotations

import errno
import signal
from types import SimpleNamespace

import pytest

from simpletuner import storage
from simpletuner.disk import DiskError
from simpletuner.reporting.events import CheckpointSaved, Notice
from simpletuner.tempnames import new_sibling
from simpletuner.training import full_disk
from simpletuner.training.loop import run_training
from tests.toy import toy_run, weights_of

ONE = {"a": (1.0, 3.0)}
WAITS = (full_disk.RETRY_SECONDS, full_disk.POLL_SECONDS, full_disk.FIRST_PAUSE_SECONDS)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(full_disk, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(full_disk, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(full_disk, "FIRST_PAUSE_SECONDS", 0.0)


def refuse_commits(monkeypatch, count: int, number: int = errno.ENOSPC, before=lambda tries: None) -> list[str]:
    """The first `count` checkpoints find no room."""
    tries: list[str] = []
    commit = storage.commit_dir

    def refusing(path, metadata=None):
        tries.append(path.name)
        before(tries)
        if len(tries) <= count:
            raise DiskError(storage.Problem("cannot be written: the disk is full", file=str(path)), number)
        return commit(path, metadata)

    monkeypatch.setattr(storage, "commit_dir", refusing)
    return tries


def texts(recorder, severity: str) -> list[str]:
    return [notice.text for notice in recorder.of(Notice) if notice.severity == severity]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_checkpoint_is_tried_again_after_leftovers_are_removed(tmp_path, monkeypatch, number):
    run, recorder = toy_run(tmp_path, ONE)
    (tmp_path / "output").mkdir(exist_ok=True)
    with monkeypatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: "a-machine-that-died")
        stale = new_sibling(tmp_path / "output" / "x", "tmp")
    stale.write_bytes(b"half")
    tries = refuse_commits(monkeypatch, 1, number)
    run_training(run)
    assert tries == ["checkpoint-3", "checkpoint-3"]
    assert [event.step for event in recorder.of(CheckpointSaved)] == [3]
    assert not stale.exists()
    assert texts(recorder, "warning")[0] == (
        "checkpoint-3 could not be written, and is tried again: cannot be written: the disk is full; "
        "1 stale files of earlier processes were removed"
    )


def test_without_the_option_a_disk_that_stays_full_ends_the_run_with_code_3(tmp_path, monkeypatch):
    run, recorder = toy_run(tmp_path, ONE)
    tries = refuse_commits(monkeypatch, 99)
    with pytest.raises(DiskError, match="disk is full") as caught:
        run_training(run)
    assert caught.value.exit_code == 3
    assert len(tries) == 2
    assert recorder.of(CheckpointSaved) == []


def test_with_it_the_run_waits_says_so_once_and_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    options = {"checkpoint_step_interval": 1, "max_train_steps": 4, "pause_on_full_disk": True}
    straight, _ = toy_run(tmp_path / "straight", ONE, **options)
    run_training(straight)
    run, recorder = toy_run(tmp_path / "paused", ONE, **options)
    tries = refuse_commits(monkeypatch, 6)
    run_training(run)
    assert len(tries) == 6 + 4
    [paused] = texts(recorder, "error")
    place = f"It continues when there is room ({tmp_path / 'paused' / 'output'})"
    assert paused == f"the run is paused at step 1: checkpoint-1 cannot be written: the disk is full. {place}"
    assert texts(recorder, "info")[-1] == "the run continues: checkpoint-1 is written"
    assert weights_of(run) == weights_of(straight)


def test_a_signal_ends_the_wait(tmp_path, monkeypatch):
    run, _ = toy_run(tmp_path, ONE, pause_on_full_disk=True)

    def stop(tries):
        if len(tries) == 3:
            run.session.stop.received = signal.SIGTERM

    refuse_commits(monkeypatch, 99, before=stop)
    with pytest.raises(DiskError) as caught:
        run_training(run)
    [problem] = caught.value.problems
    assert problem.message == "stopped while it waited for room: checkpoint-3 cannot be written: the disk is full"
    assert problem.file == str(tmp_path / "output" / "checkpoint-3")
    assert problem.fix == "free some space; the same command continues from the checkpoint before"
    assert caught.value.number == errno.ENOSPC


def test_a_run_looks_for_room_twice_a_minute_and_for_a_signal_twice_a_second() -> None:
    assert WAITS == (30.0, 0.5, 1.0)


def test_an_error_that_cannot_pass_is_not_tried_again(tmp_path, monkeypatch):
    run, _ = toy_run(tmp_path, ONE, pause_on_full_disk=True)
    tries = refuse_commits(monkeypatch, 99, errno.EROFS)
    with pytest.raises(DiskError):
        run_training(run)
    assert len(tries) == 1


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch):
    def refuse(path):
        raise DiskError(storage.Problem("cannot be written: permission denied", file=str(path)), errno.EACCES)

    monkeypatch.setattr(storage, "remove_dir", refuse)
    run, recorder = toy_run(tmp_path, ONE, checkpoint_step_interval=1, checkpoints_total_limit=2)
    run_training(run)
    assert [event.step for event in recorder.of(CheckpointSaved)] == [1, 2, 3]
    [reported] = texts(recorder, "warning")
    assert "could not be removed" in reported
    assert "checkpoint-1" in reported


def test_a_paused_run_sleeps_between_its_looks_at_the_signal(tmp_path, monkeypatch):
    run, _ = toy_run(tmp_path, ONE)
    now, slept = [0.0], []

    def monotonic() -> float:
        now[0] += 0.001
        return now[0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(full_disk, "time", SimpleNamespace(monotonic=monotonic, sleep=sleep))
    error = DiskError(storage.Problem("cannot be written: the disk is full"), errno.ENOSPC)
    full_disk.wait_for_disk_space(run.session, "checkpoint-1", error)
    assert slept == [0.01] * 2
