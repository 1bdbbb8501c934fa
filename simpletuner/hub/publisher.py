"""Uploads beside training: one thread, newest state of the run first in safety on this disk, then on the Hub.

What is to be uploaded is linked into a folder of its own first, at the moment when it is committed, so that rotation
cannot take it away. An upload that fails is tried again, with growing pauses, for as long as the run lasts; one that
the Hub refuses is reported once and tried again at the end. Only the end of the run waits.
"""

from __future__ import annotations

import logging
import re
import shlex
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner import storage
from simpletuner.errors import DataError, Problem, UploadError
from simpletuner.hub.access import full_name
from simpletuner.hub.client import is_final, make_api, reason_of, status_of, upload_failures
from simpletuner.hub.job import ADAPTER_FILE, HubJob, gallery, image_files
from simpletuner.hub.staging import Upload, stage
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    ImagesMade,
    Notice,
    RunStarted,
    SavedImage,
    Severity,
)
from simpletuner.text import without_login

if TYPE_CHECKING:
    from huggingface_hub import HfApi

STAGING_DIR = "hub_upload"
STATE_FILE = "hub_upload.json"
MOST_WAITING = 4
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 300.0
# How long the end of a run goes on trying while no try succeeds.
GIVE_UP_SECONDS = 600.0
CLOSE_SECONDS = 20.0


class Publisher:
    """The sink that uploads.

    Args:
        job: what this run uploads.
        api: the Hub; made when needed.
        give_up_seconds: see `GIVE_UP_SECONDS`.
        first_pause: before the second try; each further one is twice as long.
    """

    name = "the Hub"
    failures: tuple[type[Exception], ...] = (OSError, DataError)

    def __init__(
        self,
        job: HubJob,
        api: HfApi | None = None,
        give_up_seconds: float = GIVE_UP_SECONDS,
        first_pause: float = FIRST_PAUSE,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self._job = job
        self._api = api
        self._give_up_seconds = give_up_seconds
        self._first_pause = first_pause
        self._should_stop = should_stop
        self._changed = threading.Condition()
        self._waiting: deque[Upload] = deque()
        self._notices: deque[Notice] = deque()
        self._worker: threading.Thread | None = None
        self._is_closing = False
        self._refusal: str | None = None
        self._trouble: str | None = None
        self._deadline: float | None = None
        self._repo_id: str | None = None
        self._images: list[SavedImage] = []
        self._eval_loss: float | None = None
        self._total_steps = 0
        self._run: dict[str, str] = {}

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._total_steps = event.total_steps
            self._run = {"run": event.run_id, "branch": event.branch}
            self._catch_up(event.start_step)
        elif isinstance(event, ImagesMade):
            self._images = gallery(event.images) or self._images
        elif isinstance(event, EvalDone):
            self._eval_loss = event.pooled
        elif isinstance(event, CheckpointSaved) and self._job.each_checkpoint:
            self._publish_checkpoint(Path(event.path))

    def take_notices(self) -> list[Notice]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def finish(self, step: int) -> None:
        """Upload the weights at the end of the run, and wait until everything is there.

        Raises:
            UploadError: it did not succeed, or the run was asked to stop; it says how to try again.
        """
        if self._state() == {"repo": self._job.name, "step": step, "is_last": True, **self._run}:
            return
        with self._changed:
            self._refusal = None
            self._waiting.clear()  # the end holds what they hold, and more
            self._deadline = time.monotonic() + self._give_up_seconds
        # A run that was killed between its last checkpoint and its end has only the checkpoint.
        files = self._job.final_files()
        files = files or self._job.checkpoint_files(self._job.output_dir / f"checkpoint-{step}")
        upload = self._stage(files, step, is_last=True)
        self._enqueue(upload)
        while self._is_pending(upload) and self._refusal is None and not self._should_stop():
            with self._changed:
                self._changed.wait(0.2)
        if self._is_pending(upload):
            raise self._error(upload)

    def close(self) -> None:
        """End the thread; what is not uploaded yet waits in its folder for the next start."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(CLOSE_SECONDS)
            self._worker = None
        if self._waiting and self._deadline is None:
            text = "the newest checkpoint is not on the Hub yet; the next start of this run uploads it"
            self._report("warning", text)

    def _catch_up(self, start_step: int) -> None:
        """Upload the checkpoint that the run continues from, if an earlier process did not come so far."""
        shutil.rmtree(self._job.output_dir / STAGING_DIR, ignore_errors=True)
        checkpoint = self._job.output_dir / f"checkpoint-{start_step}"
        done = self._state().get("step", -1)
        if start_step and self._job.each_checkpoint and isinstance(done, int) and done < start_step:
            self._publish_checkpoint(checkpoint)

    def _publish_checkpoint(self, folder: Path) -> None:
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match is None or storage.verify_dir(folder, full=False):
            return
        upload = self._stage(self._job.checkpoint_files(folder), int(match.group(1)), is_last=False)
        self._enqueue(upload)
        while self._job.waits and self._is_pending(upload) and not (self._refusal or self._trouble):
            if self._should_stop():
                return
            with self._changed:
                self._changed.wait(0.2)

    def _stage(self, files: dict[str, Path], step: int, is_last: bool) -> Upload:
        images = [image for image in self._images if image.path.is_file()]
        named = dict(zip(image_files(images), (image.path for image in images), strict=True))
        folder = self._job.output_dir / STAGING_DIR / (f"step-{step}-end" if is_last else f"step-{step}")
        return stage(folder, files | named, step, is_last, tuple(images), self._eval_loss)

    def _enqueue(self, upload: Upload) -> None:
        with self._changed:
            self._waiting.append(upload)
            # The one in front may be on its way; of those behind it the oldest is the one to miss.
            lost = self._waiting[1] if len(self._waiting) > MOST_WAITING else None
            if lost is not None:
                self._waiting.remove(lost)
            self._changed.notify_all()
        if lost is not None:
            shutil.rmtree(lost.folder, ignore_errors=True)
            self._report("warning", f"uploads are slower than checkpoints: step {lost.step} is skipped")
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="hub upload", daemon=True)
            self._worker.start()

    def _is_pending(self, upload: Upload) -> bool:
        with self._changed:
            return upload in self._waiting

    def _work(self) -> None:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        from tenacity import Retrying, retry_if_exception_type, wait_random_exponential

        retrying = Retrying(
            retry=retry_if_exception_type(_failures()),
            wait=wait_random_exponential(self._first_pause, LONGEST_PAUSE),
            sleep=self._pause,
        )
        try:
            while retrying(self._send_next):
                pass
        except BaseException as error:  # a mistake of ours: the end of the run must not wait for a thread that is gone
            with self._changed:
                self._refusal = f"unexpected {type(error).__name__}: {error}"
                self._changed.notify_all()
            raise

    def _send_next(self) -> bool:
        """One try of the newest upload; False at the end. A try after a failure may send a newer one.

        Raises:
            Exception: one of `_failures`; it is noted already.
        """
        upload = self._next()
        if upload is None:
            return False
        try:
            self._send(upload)
        except _failures() as error:
            self._fail(upload, error)
            raise
        self._trouble = None
        self._done(upload)
        return True

    def _next(self) -> Upload | None:
        """The upload to try now; None at the end."""
        with self._changed:
            while not self._is_closing and (not self._waiting or self._refusal):
                self._changed.wait()
            return None if self._is_closing else self._waiting[0]

    def _send(self, upload: Upload) -> None:
        """One try of one upload, from the beginning: files that are there already are not sent again."""
        api = self._api = self._api or make_api()
        if self._repo_id is None:
            repo_id = full_name(api.whoami(), self._job.name)
            api.create_repo(repo_id, private=self._job.is_private, exist_ok=True)
            if self._job.is_private and api.repo_info(repo_id).private is False:
                self._report("warning", f"{repo_id} existed before and is public: everybody can see the uploads")
            self._repo_id = repo_id
            if not upload.is_last:
                self._report("info", f"checkpoints go to {without_login(api.endpoint)}/{repo_id}")
        arguments = (upload.step, self._total_steps, upload.images, upload.eval_loss)
        card = self._job.card(self._repo_id, *arguments)
        storage.write_bytes(upload.folder / "README.md", card.encode())
        api.upload_folder(
            repo_id=self._repo_id,
            folder_path=upload.folder,
            commit_message=f"Weights of step {upload.step}" + (", the end of the run" if upload.is_last else ""),
            # Averages of an earlier run would stand there beside weights that they are not of.
            delete_patterns=None if (upload.folder / "ema").is_dir() else [f"ema/{ADAPTER_FILE}"],
        )
        self._tag(api, f"step-{upload.step}")

    def _tag(self, api: HfApi, tag: str) -> None:
        """Give the newest commit a tag; one of an earlier run, or of a branch that was left, moves to it."""
        from huggingface_hub.errors import HfHubHTTPError

        assert self._repo_id is not None
        try:
            api.create_tag(self._repo_id, tag=tag)
            return
        except HfHubHTTPError as error:
            if status_of(error) != 409:
                raise
        try:
            api.delete_tag(self._repo_id, tag=tag)
            api.create_tag(self._repo_id, tag=tag)
        except HfHubHTTPError as error:  # the weights are there; only their name is not
            if not is_final(error):
                raise
            self._report("warning", f"the tag {tag} stays at an earlier commit of {self._repo_id}: {reason_of(error)}")

    def _done(self, upload: Upload) -> None:
        state = {"repo": self._job.name, "step": upload.step, "is_last": upload.is_last, **self._run}
        try:
            storage.write_json(self._job.output_dir / STATE_FILE, state)
        except DataError as error:  # the weights are there, and only the note is not
            self._report("warning", f"{error}; the next start of this run may upload step {upload.step} again")
        with self._changed:
            if upload in self._waiting:
                self._waiting.remove(upload)
            self._changed.notify_all()
        whole = self._job.output_dir / STAGING_DIR
        shutil.rmtree(whole if upload.is_last else upload.folder, ignore_errors=True)
        if upload.is_last:
            assert self._api is not None
            self._report("info", f"uploaded to {without_login(self._api.endpoint)}/{self._repo_id}")

    def _fail(self, upload: Upload, error: Exception) -> None:
        reason = reason_of(error)
        gives_up = self._deadline is not None and time.monotonic() > self._deadline
        with self._changed:
            if is_final(error) or gives_up:
                self._refusal = reason
            was_reported, self._trouble = self._trouble is not None, reason
            self._changed.notify_all()
        if not was_reported and not upload.is_last:
            again = "it is retried at the end of the run" if is_final(error) else "it is retried during the run"
            self._report("warning", f"the upload of step {upload.step} failed ({reason}); {again}")

    def _pause(self, seconds: float) -> None:
        """Wait before the next try; the end of the run does not wait for long pauses of before."""
        until = time.monotonic() + seconds
        with self._changed:
            is_ending = self._deadline is not None
            while not self._is_closing and time.monotonic() < until:
                if not is_ending and self._deadline is not None:
                    return
                self._changed.wait(min(0.5, max(until - time.monotonic(), 0.01)))

    def _error(self, upload: Upload) -> UploadError:
        words = ["hf", "upload", self._repo_id or self._job.name, str(upload.folder), "."]
        words += ["--private"] if self._job.is_private else []
        reason = self._refusal or self._trouble or "the run was stopped"
        message = f"the weights are saved, but not on the Hub: {reason}"
        return UploadError(Problem(message, key="push_to_hub", fix=f"run: {shlex.join(words)}"))

    def _state(self) -> dict[str, object]:
        """What was uploaded last, by this process or an earlier one of the run.

        A note without a run is that of an earlier version: the run that continues in its folder is the same.
        """
        try:
            state = storage.read_json(self._job.output_dir / STATE_FILE, dict)
        except DataError:
            return {}
        if state.get("repo") != self._job.name:
            return {}
        is_same = all(state.get(key, value) == value for key, value in self._run.items())
        return {**self._run, **state} if is_same else {}

    def _report(self, severity: Severity, text: str) -> None:
        self._notices.append(Notice(severity, text))


def _failures() -> tuple[type[Exception], ...]:
    """What costs a try: the Hub's failures, and a disk that does not take the card."""
    return (*upload_failures(), DataError)
