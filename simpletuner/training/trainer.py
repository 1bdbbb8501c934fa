"""Starts a run and ends it: opens what it writes to and listens to, builds the run, trains, and closes all again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from simpletuner import storage, tempnames
from simpletuner.config.loading import LoadedRun
from simpletuner.disk import disk_error, reported_as_disk_errors
from simpletuner.distributed.process_group import ConnectionLost, joined
from simpletuner.errors import Interrupted, SimpleTunerError, UploadError
from simpletuner.families.registry import get_spec
from simpletuner.hub.job import make_job
from simpletuner.hub.publisher import Publisher
from simpletuner.models.devices import pick_device
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import RunFailed
from simpletuner.reporting.sinks import build_sinks
from simpletuner.training.build import build_run
from simpletuner.training.device_failures import explain
from simpletuner.training.finish import finish_run
from simpletuner.training.kernels import chosen_kernels
from simpletuner.training.loop import run_training
from simpletuner.training.phases import phase
from simpletuner.training.process import Process
from simpletuner.training.report import report_run
from simpletuner.training.run import Run, Session
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest


def train(loaded: LoadedRun) -> None:
    """Train as configured, from the start or from the newest checkpoint.

    Raises:
        SimpleTunerError: anything that a user can fix; it carries the exit code.
    """
    output_dir = Path(loaded.config.checkpoint.output_dir)
    with reported_as_disk_errors(), ExitStack() as stack:
        output_dir.mkdir(parents=True, exist_ok=True)
        process_group = stack.enter_context(joined(os.environ, loaded.config.processes.distributed_timeout))
        if process_group.is_main:
            stack.enter_context(storage.exclusive_lock(output_dir / ".lock", f"training into {output_dir}"))
            tempnames.clean_stale_tree(output_dir, is_locked=True)
        stop = stack.enter_context(StopRequest())
        if process_group.heartbeat is not None:
            process_group.heartbeat.stopping = stop.error_while_waiting
        is_new = not loaded.config.checkpoint.resumes
        sinks = (
            build_sinks(loaded.config.reporting, output_dir, is_new, webhooks=loaded.webhooks)
            if process_group.is_main
            else []
        )
        publisher = build_publisher(loaded, stop) if process_group.is_main else None
        bus = stack.enter_context(EventBus([*sinks, publisher] if publisher else sinks))
        process = Process(guard=FolderGuard(output_dir), bus=bus, stop=stop, process_group=process_group)
        run: Run | None = None
        try:
            stack.enter_context(chosen_kernels(loaded.config, pick_device()))
            with stopped_by_signals(stop):
                run = build_run(loaded, process)
            stack.callback(run.close)
            started = time.monotonic()
            if run.is_complete:
                process.inform(f"{output_dir} is complete: {run.place}")
            else:
                run_training(run)
                finish_run(run, time.monotonic() - started)
            if publisher is not None:
                publish(publisher, run.progress.global_step, run.session)
        except UploadError:  # the run itself is done, and its sinks have reported it
            if stop:
                raise stop.error("all but the upload to the Hub") from None
            raise
        except SimpleTunerError as error:
            step = run.progress.global_step if run is not None else 0
            bus.emit(RunFailed(step=step, message=error.render(), exit_code=error.exit_code))
            is_writing = run is not None and process_group.is_main and run.session.guard.is_there()
            if run is not None and is_writing and not isinstance(error, Interrupted):  # who stops a run is in haste
                report_run(output_dir, run.datasets, bus)
            raise
        except Exception as error:  # told to whoever listens; `cli.main` shows it
            step = run.progress.global_step if run is not None else 0
            what = f"training step {step + 1}" if run is not None else "preparing the run"
            if (known := explain(error, loaded.config, pick_device(), what) or disk_error(error)) is not None:
                bus.emit(RunFailed(step=step, message=known.render(), exit_code=known.exit_code))
                raise known from error
            bus.emit(RunFailed(step=step, message=f"unexpected {type(error).__name__}: {error}"))
            raise


@contextmanager
def stopped_by_signals(stop: StopRequest) -> Iterator[None]:
    """Inside, a signal ends each process by itself; what waits for one that has left was asked to leave too.

    Raises:
        Interrupted: a signal came.
    """
    try:
        yield
    except ConnectionLost:
        stop.check()
        raise


def build_publisher(loaded: LoadedRun, stop: StopRequest) -> Publisher | None:
    job = make_job(loaded, get_spec(loaded.config.model.model_family))
    return Publisher(job, should_stop=lambda: bool(stop)) if job is not None else None


def publish(publisher: Publisher, step: int, session: Session) -> None:
    """Upload the end of the run.

    Raises:
        UploadError: it did not succeed.
    """
    with phase(session.bus, "uploading to the Hub"):
        publisher.finish(step)
