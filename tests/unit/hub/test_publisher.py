"""Uploads in the background: what is committed, retries, and what a failing Hub costs."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from simpletuner import storage
from simpletuner.disk import DiskError
from simpletuner.errors import EXIT_UPLOAD, Problem, UploadError
from simpletuner.hub.job import ADAPTER_FILE, HubJob
from simpletuner.hub.publisher import MOST_WAITING, Publisher
from simpletuner.hub.staging import Upload, stage
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import CheckpointSaved, EvalDone, ImagesMade, Notice, RunStarted, SavedImage
from tests.hub_uploads import TOKEN, FakeRepo


class Reported:
    name, failures = "told", ()

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event) -> None:
        if isinstance(event, Notice):
            self.texts.append(event.text)

    def close(self) -> None:
        pass


def wait_for(condition, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come true in time"
        time.sleep(0.02)


def start(job: HubJob, api, reported: Reported, start_step: int = 0, **options) -> tuple[Publisher, EventBus]:
    publisher = Publisher(job, api, first_pause=0.02, **options)
    bus = EventBus([reported, publisher])
    bus.emit(RunStarted("stars", job.output_dir, 100, start_step))
    return publisher, bus


def test_checkpoints_and_the_end_become_commits_with_card_and_images(hub, api, job, checkpoint, image):
    reported = Reported()
    publisher, bus = start(job, api, reported)
    with bus:
        bus.emit(EvalDone(10, {}, 0.4321))
        shown = SavedImage(image, "star", "a red star", 8, 8, 1, "live")
        bus.emit(ImagesMade(10, (shown, SavedImage(image, "b", "", 8, 8, 1, "grid"))))
        bus.emit(ImagesMade(10, (SavedImage(image, "star", "a red star", 8, 8, 1, "base"),)))  # no result of training
        bus.emit(CheckpointSaved(10, checkpoint(10)))
        wait_for(lambda: hub.repos and hub.repos["me/stars"].tags == ["step-10"])
        repo = hub.repos["me/stars"]
        assert repo.files[ADAPTER_FILE] == b"weights of 10"
        assert b"after 10 of 100 steps" in repo.files["README.md"]
        publisher.finish(100)
    assert repo.is_private
    assert [summary for summary, _ in repo.commits] == ["Weights of step 10", "Weights of step 100, the end of the run"]
    assert set(repo.files) == {
        "README.md",
        ADAPTER_FILE,
        f"ema/{ADAPTER_FILE}",
        "images/00_star_live.png",
    }
    assert repo.files[ADAPTER_FILE] == b"the end"
    assert b"after 100 of 100 steps" in repo.files["README.md"]
    assert b"| eval loss | 0.4321 |" in repo.files["README.md"]
    assert repo.tags == ["step-10", "step-100"]
    assert not (job.output_dir / "hub_upload").exists()
    assert reported.texts == [f"checkpoints go to {hub.url}/me/stars", f"uploaded to {hub.url}/me/stars"]


def test_a_hub_that_fails_for_a_while_is_tried_again_and_reported_once(hub, api, job, checkpoint):
    hub.answers = [500, 503, 500]
    reported = Reported()
    publisher, bus = start(job, api, reported)
    with bus:
        bus.emit(CheckpointSaved(10, checkpoint(10)))
        wait_for(lambda: hub.repos and hub.repos["me/stars"].tags)
        publisher.finish(100)
    assert len(hub.repos["me/stars"].commits) == 2
    assert len([text for text in reported.texts if "failed" in text]) == 1


def test_a_connection_that_is_lost_costs_a_try_and_not_the_thread(hub, job, checkpoint):
    reported = Reported()
    api = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)
    publisher, bus = start(job, api, reported)
    with bus:
        bus.emit(CheckpointSaved(10, checkpoint(10)))
        wait_for(lambda: bus.emit(Notice("info", "")) or any("failed" in text for text in reported.texts))
        api.endpoint = hub.url
        wait_for(lambda: hub.repos and hub.repos["me/stars"].tags == ["step-10"])
        publisher.finish(100)


def test_training_does_not_wait_for_a_hub_that_hangs_and_rotation_takes_nothing_away(hub, api, job, checkpoint):
    hub.gate.clear()
    reported = Reported()
    _, bus = start(job, api, reported)
    with bus:
        for step in range(1, 11):
            path = checkpoint(step)
            bus.emit(CheckpointSaved(step, path))
            shutil.rmtree(path)
        assert not [commit for repo in hub.repos.values() for commit in repo.commits]  # the first one hangs for 30 s
        assert len(list((job.output_dir / "hub_upload").iterdir())) <= MOST_WAITING
        hub.gate.set()
        wait_for(lambda: hub.repos and "step-10" in hub.repos["me/stars"].tags)
    assert hub.repos["me/stars"].files[ADAPTER_FILE] == b"weights of 10"
    assert [text for text in reported.texts if "is skipped" in text]


def test_waiting_for_uploads_can_be_asked_for(hub, api, job, checkpoint):
    import dataclasses

    reported = Reported()
    _, bus = start(dataclasses.replace(job, waits=True), api, reported)
    with bus:
        for step in (1, 2, 3):
            bus.emit(CheckpointSaved(step, checkpoint(step)))
            assert len(hub.repos["me/stars"].commits) == step


def test_who_waits_for_an_upload_answers_a_signal_at_once(hub, api, job, checkpoint, monkeypatch):
    import dataclasses

    asked = []
    waits, should_stop = dataclasses.replace(job, waits=True), lambda: asked.append(1) or True
    publisher, bus = start(waits, api, Reported(), should_stop=should_stop)
    monkeypatch.setattr(publisher, "_enqueue", publisher._waiting.append)  # an upload that takes an hour
    with bus:
        bus.emit(CheckpointSaved(10, checkpoint(10)))
        assert asked, "a checkpoint"
        asked.clear()
        with pytest.raises(UploadError, match="not on the Hub"):
            publisher.finish(100)
        assert asked, "the end"


def test_an_upload_that_the_hub_refuses_ends_with_its_own_exit_code_and_the_command(hub, api, job):
    reported = Reported()
    publisher, bus = start(job, api, reported)
    hub.answers = [403] * 100
    with bus, pytest.raises(UploadError) as caught:
        publisher.finish(100)
    assert caught.value.exit_code == EXIT_UPLOAD
    text = caught.value.render()
    assert "may not write" in text
    command = text.split("fix: run: ")[1].split()
    assert command[:3] == ["hf", "upload", "me/stars"]
    assert command[4:] == [".", "--private"]  # a repository that this command makes is not a public one
    assert {path.name for path in Path(command[3]).iterdir()} == {ADAPTER_FILE, "ema", "README.md"}


def test_a_hub_that_never_answers_is_given_up_at_the_end(hub, api, job):
    reported = Reported()
    publisher, bus = start(job, api, reported, give_up_seconds=0.3)
    hub.answers = [500] * 10_000
    with bus, pytest.raises(UploadError, match="hf upload"):
        publisher.finish(100)


def test_a_run_that_goes_on_uploads_what_a_kill_kept_from_the_hub_and_nothing_twice(hub, api, job, checkpoint):
    reported = Reported()
    for start_step, expected in ((0, 0), (10, 1), (10, 1)):
        if start_step and not (job.output_dir / "checkpoint-10").exists():
            checkpoint(10)
        _, bus = start(job, api, reported, start_step)
        with bus:
            wait_for(lambda expected=expected: sum(len(repo.commits) for repo in hub.repos.values()) >= expected)
            time.sleep(0.05)
    [repo] = hub.repos.values()
    assert [summary for summary, _ in repo.commits] == ["Weights of step 10"]


def test_a_repository_that_is_public_already_is_reported(hub, api, job):
    hub.repos["me/stars"] = FakeRepo(is_private=False)
    reported = Reported()
    publisher, bus = start(job, api, reported)
    with bus:
        publisher.finish(100)
    assert len([text for text in reported.texts if "is public" in text]) == 1


def test_the_end_is_uploaded_once(hub, api, job):
    for _ in range(2):
        publisher, bus = start(job, api, Reported())
        with bus:
            publisher.finish(100)
    assert len(hub.repos["me/stars"].commits) == 1


def test_an_unfinished_checkpoint_is_never_uploaded(hub, api, job, checkpoint):
    reported = Reported()
    publisher, bus = start(job, api, reported)
    path = checkpoint(10)
    (path / "manifest.json").unlink()
    with bus:
        bus.emit(CheckpointSaved(10, path))
        publisher.finish(100)
    assert [summary for summary, _ in hub.repos["me/stars"].commits] == ["Weights of step 100, the end of the run"]


def test_a_new_run_of_equal_length_uploads_and_its_tag_moves_to_it(hub, api, job):
    def end(run_id: str, weights: bytes) -> None:
        (job.output_dir / ADAPTER_FILE).write_bytes(weights)
        publisher = Publisher(job, api, first_pause=0.02)
        with EventBus([Reported(), publisher]) as bus:
            bus.emit(RunStarted("stars", job.output_dir, 100, run_id=run_id, branch=f"{run_id}-a"))
            publisher.finish(100)

    end("one", b"of one")
    repo = hub.repos["me/stars"]
    assert repo.tagged == {"step-100": 1}
    end("one", b"of one")
    assert len(repo.commits) == 1  # it is there
    end("two", b"of two")
    assert len(repo.commits) == 2
    assert repo.files[ADAPTER_FILE] == b"of two"
    assert repo.tagged == {"step-100": 2}


def test_averages_of_an_earlier_run_do_not_stay_beside_the_new_weights(hub, api, job):
    reported = Reported()
    publisher, bus = start(job, api, reported)
    with bus:
        publisher.finish(100)
    repo = hub.repos["me/stars"]
    assert f"ema/{ADAPTER_FILE}" in repo.files
    off = replace(job, options={**job.options, "use_ema": False})
    (job.output_dir / "hub_upload.json").unlink()
    publisher, bus = start(off, api, reported)
    with bus:
        publisher.finish(100)
    assert set(repo.files) == {"README.md", ADAPTER_FILE}


def test_an_image_that_is_gone_costs_only_itself(hub, api, job, checkpoint, image):
    """Somebody tidied up: the card shows what is left."""
    reported = Reported()
    publisher, bus = start(job, api, reported)
    shown = [SavedImage(path, path.stem, "", 8, 8, 1, "live") for path in (image.with_name("gone.png"), image)]
    with bus:
        bus.emit(ImagesMade(10, tuple(shown)))
        publisher.finish(100)
    assert [name for name in hub.repos["me/stars"].files if name.startswith("images/")] == ["images/00_a_live.png"]


def test_the_end_does_not_wait_for_checkpoints_that_wait(hub, api, job, checkpoint, monkeypatch):
    """While the first one is on its way two more come; then the run ends."""
    hub.gate.clear()
    publisher, bus = start(job, api, Reported())
    with bus:
        for step in (10, 20, 30):
            bus.emit(CheckpointSaved(step, checkpoint(step)))
        enqueue = publisher._enqueue
        monkeypatch.setattr(publisher, "_enqueue", lambda upload: (hub.gate.set(), enqueue(upload)))
        publisher.finish(100)
    summaries = [summary for summary, _ in hub.repos["me/stars"].commits]
    assert summaries[-1] == "Weights of step 100, the end of the run"
    assert "Weights of step 20" not in summaries
    assert "Weights of step 30" not in summaries


def waiting(job: HubJob, steps: range) -> tuple[Publisher, list[Upload]]:
    """A publisher whose thread never begins, and uploads that wait in it."""
    publisher = Publisher(job, HfApi())
    publisher._worker = threading.Thread()
    uploads = [Upload(job.output_dir / "hub_upload" / f"step-{step}", step, is_last=False) for step in steps]
    for upload in uploads:
        upload.folder.mkdir(parents=True)
        publisher._enqueue(upload)
    return publisher, uploads


def test_of_too_many_that_wait_the_oldest_behind_the_first_is_skipped_with_its_folder(job):
    publisher, _ = waiting(job, range(1, 7))
    assert [upload.step for upload in publisher._waiting] == [1, 4, 5, 6]
    assert sorted(path.name for path in (job.output_dir / "hub_upload").iterdir()) == [
        *(f"step-{step}" for step in (1, 4, 5, 6)),
    ]
    texts = [notice.text for notice in publisher.take_notices()]
    assert texts == [f"uploads are slower than checkpoints: step {step} is skipped" for step in (2, 3)]
    assert publisher.take_notices() == []


def test_a_failure_is_reported_once_until_something_succeeds(job):
    publisher, [upload] = waiting(job, range(5, 6))
    for _ in range(2):
        publisher._fail(upload, RuntimeError("no answer"))
    [notice] = publisher.take_notices()
    assert notice.text == "the upload of step 5 failed (no answer); it is retried during the run"
    assert publisher._refusal is None
    publisher._trouble = None
    refused = RuntimeError("x")
    refused.response = SimpleNamespace(status_code=403)
    publisher._fail(upload, refused)
    [notice] = publisher.take_notices()
    assert notice.text.endswith("(the token may not write there); it is retried at the end of the run")
    assert publisher._refusal == "the token may not write there"


def test_a_staged_file_is_linked_else_copied_and_an_older_folder_is_replaced(tmp_path, monkeypatch):
    source, folder = tmp_path / "a", tmp_path / "staged"
    source.write_bytes(b"weights")
    (folder / "old").mkdir(parents=True)
    upload = stage(folder, {"ema/a": source}, 7, True, (), 0.5)
    assert (upload.folder, upload.step, upload.is_last, upload.eval_loss) == (folder, 7, True, 0.5)
    assert [path.name for path in folder.iterdir()] == ["ema"]
    assert (folder / "ema" / "a").stat().st_ino == source.stat().st_ino
    monkeypatch.setattr("os.link", lambda *names: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    stage(folder, {"a": source}, 7, True, (), None)
    assert (folder / "a").read_bytes() == b"weights"
    assert (folder / "a").stat().st_ino != source.stat().st_ino


def test_of_a_whole_model_the_denoiser_and_its_average_are_sent_and_at_the_end_the_pipeline(job, tmp_path):
    whole = replace(job, kind="full")
    checkpoint, pipeline = tmp_path / "checkpoint-3", tmp_path / "pipeline"
    for name in ("transformer/a", "ema/b", "optimizer.safetensors", ADAPTER_FILE, "transformer/manifest.json"):
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
    (pipeline / "vae").mkdir(parents=True)
    (pipeline / "vae" / "c").write_bytes(b"x")
    assert set(whole.checkpoint_files(checkpoint)) == {"transformer/a", "ema/b"}
    assert whole.final_files() == {"vae/c": pipeline / "vae" / "c"}
    assert set(job.checkpoint_files(checkpoint)) == {ADAPTER_FILE, "ema/b"}


def test_a_run_that_was_killed_before_its_end_uploads_its_last_checkpoint(hub, api, job, checkpoint):
    (job.output_dir / ADAPTER_FILE).unlink()
    checkpoint(100)
    publisher, bus = start(replace(job, options={"use_ema": False}), api, Reported())
    with bus:
        publisher.finish(100)
    files = hub.repos["me/stars"].files
    assert files[ADAPTER_FILE] == b"weights of 100"
    assert files[f"ema/{ADAPTER_FILE}"] == b"average of 100"


def test_what_waits_at_the_end_of_the_process_is_said_and_only_then(job):
    publisher, _ = waiting(job, range(5, 6))
    publisher._worker = None
    publisher.close()
    [notice] = publisher.take_notices()
    text = "the newest checkpoint is not on the Hub yet; the next start of this run uploads it"
    assert (notice.severity, notice.text) == ("warning", text)
    publisher._waiting.clear()
    publisher.close()
    assert publisher.take_notices() == []


class Tags:
    """Answers to requests for tags, in order: a status, or 200."""

    endpoint = "https://huggingface.co"

    def __init__(self, *answers: int):
        self.answers, self.asked = list(answers), []

    def _answer(self, name: str, repo_id: str, tag: str) -> None:
        self.asked.append((name, repo_id, tag))
        if (status := self.answers.pop(0)) != 200:
            raise HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("POST", "http://x")))

    def create_tag(self, repo_id: str, *, tag: str) -> None:
        self._answer("create", repo_id, tag)

    def delete_tag(self, repo_id: str, *, tag: str) -> None:
        self._answer("delete", repo_id, tag)


@pytest.mark.parametrize(
    ("answers", "asked", "raises", "texts"),
    [
        ((200,), "create", False, []),
        ((409, 200, 200), "create delete create", False, []),
        ((503,), "create", True, []),
        ((403,), "create", True, []),
        ((409, 503), "create delete", True, []),
        (
            (409, 403),
            "create delete",
            False,
            ["the tag step-5 stays at an earlier commit of me/stars: the token may not write there"],
        ),
    ],
)
def test_a_tag_that_cannot_move_is_a_warning_and_what_may_pass_is_tried_again(job, answers, asked, raises, texts):
    publisher, api = Publisher(job), Tags(*answers)
    publisher._repo_id = "me/stars"
    with pytest.raises(HfHubHTTPError) if raises else contextlib.nullcontext():
        publisher._tag(api, "step-5")
    assert api.asked == [(each, "me/stars", "step-5") for each in asked.split()]
    assert [notice.text for notice in publisher.take_notices()] == texts


def test_the_note_of_an_upload_counts_for_its_repository_and_run_alone(job):
    publisher = Publisher(job)
    file = job.output_dir / "hub_upload.json"
    assert publisher._state() == {}
    publisher._run = {"run": "r1", "branch": "b1"}
    for note, state in (
        ({"repo": "stars", "step": 3}, {"run": "r1", "branch": "b1", "repo": "stars", "step": 3}),
        ({"repo": "stars", "step": 3, "run": "r1", "branch": "b1"}, None),
        ({"repo": "stars", "step": 3, "run": "r1", "branch": "b2"}, {}),
        ({"repo": "other", "step": 3, "run": "r1", "branch": "b1"}, {}),
        ([3], {}),
    ):
        file.write_text(json.dumps(note))
        assert publisher._state() == (note if state is None else state)


def test_an_upload_is_given_up_after_its_time_and_says_why(job):
    publisher, [upload] = waiting(job, range(5, 6))
    publisher._deadline = time.monotonic() + 1e6
    publisher._fail(upload, RuntimeError("no answer"))
    assert (publisher._refusal, publisher._trouble) == (None, "no answer")
    publisher._deadline = time.monotonic() - 1e-3
    publisher._fail(upload, RuntimeError("still none"))
    assert publisher._refusal == "still none"
    [problem] = publisher._error(upload).problems
    assert problem.message == "the weights are saved, but not on the Hub: still none"
    assert problem.key == "push_to_hub"
    assert problem.fix == f"run: hf upload stars {upload.folder} . --private"


def test_a_disk_that_takes_neither_card_nor_note_costs_a_try_and_not_the_end(hub, api, job, monkeypatch):
    refused, write = [], storage.write_bytes

    def write_bytes(path: Path, data: bytes) -> None:
        if path.name == "hub_upload.json" or (path.name == "README.md" and not refused):
            refused.append(path.name)
            raise DiskError(Problem("the disk is full", file=str(path)), errno.ENOSPC)
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    reported = Reported()
    publisher, bus = start(job, api, reported)
    with bus:
        publisher.finish(100)
    assert refused == ["README.md", "hub_upload.json"]
    assert hub.repos["me/stars"].tags == ["step-100"]
    assert [text for text in reported.texts if "upload step 100 again" in text and "the disk is full" in text]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_upload_after_a_mistake_of_ours(job, monkeypatch):
    monkeypatch.setattr(Publisher, "_send", lambda self, upload: {}["mistake"])
    publisher = Publisher(job)
    with pytest.raises(UploadError, match="not on the Hub: unexpected KeyError: 'mistake'"):
        publisher.finish(100)
    publisher.close()
