"""What a webhook costs a training step when its service refuses, hangs, drips, answers 500, 429, 413 or a redirect.

One process trains a tiny OmniGen without end. Blocks of steps with a webhook and without take turns, in an order that
turns around too, so that whatever else the machine does falls on both; each block of a pair also tells of a checkpoint
and of images. The service is a process of its own. What is compared, pair by pair:

- seconds per step, median of the block: what a user waits. Valid on a quiet machine only; pairs of two blocks that both
  have no webhook ("nothing") say how far two equal things differ here.
- CPU time of the training thread, mean of the block: what the webhook takes from it.

On a machine that is busy with other things both are noise. There, two shares bound what a webhook can cost: processor
time of `handle`, which the training thread calls, over that of the steps; and CPU time of the background thread
over the seconds that it ran, since only while it runs can it keep the interpreter or a core from the training thread.

    python benchmarks/webhook_overhead.py            some minutes
    python benchmarks/webhook_overhead.py --quick    as many pairs as two and a half minutes hold

Goal: seconds per step at most 1.01 of those without, median of all pairs; where the seconds are not valid (under 20
pairs, or a 95 % interval of the median that is wider than 2 %), the two shares together at most 0.01. The last line is
one JSON object; exit code 1 when the goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

GOAL = 1.01
QUICK_SECONDS = 150
SERVICES = ("refuses", "hangs", "drips", "500", "429", "413", "302")


@dataclass(frozen=True)
class Block:
    """A block of steps.

    Args:
        wall: seconds per step, median.
        thread: CPU seconds of the training thread per step, mean.
        handle: those of `handle`, per step.
        background: CPU seconds of the background thread per second.
    """

    wall: float
    thread: float
    handle: float
    background: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of blocks for each service")
    parser.add_argument("--steps", type=int, default=25, help="steps of a block; the first three are not counted")
    parser.add_argument("--quick", action="store_true", help=f"end after {QUICK_SECONDS} s, one pair each at least")
    parser.add_argument("--services", nargs="*", default=SERVICES, choices=SERVICES)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folder = Path(tempfile.mkdtemp(prefix="webhook-overhead-"))
    try:
        seconds = QUICK_SECONDS if arguments.quick else None
        figures = measure(folder, arguments.services, arguments.pairs, arguments.steps, seconds)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures))
    if figures["seconds_are_valid"]:
        return 0 if figures["wall_ratio"] <= GOAL else 1
    return 0 if figures["handle_share"] + figures["background_share"] <= GOAL - 1 else 1


def measure(folder: Path, services: list[str], pairs: int, steps: int, seconds: float | None) -> dict[str, Any]:
    """All pairs, services in turn, so that a change of the machine's load falls on all of them.

    Args:
        seconds: no round of pairs begins that would not end by then; None: all are made.
    """
    started = time.monotonic()
    trainer = Trainer(folder)
    trainer.block(None, steps)
    memory = peak_memory_mb()
    found: dict[str, list[tuple[Block, Block]]] = {name: [] for name in ("nothing", *services)}
    for number in range(pairs):
        spent = time.monotonic() - started
        if number and seconds is not None and spent * (number + 1) / number > seconds:
            break
        for name in found:
            with service(name) as url:
                first = trainer.block(url if number % 2 else None, steps)
                second = trainer.block(None if number % 2 else url, steps)
            pair = (first, second) if number % 2 else (second, first)
            found[name].append(pair)
        shown = ", ".join(f"{name} {ratios(blocks)[0]:.3f}" for name, blocks in found.items())
        print(f"pair {number + 1} of {pairs}: {shown}", flush=True)
    everything = [pair for name in services for pair in found[name]]
    wall, thread = ratios(everything)
    low, high = interval([with_.wall / without.wall for with_, without in everything])
    return {
        "benchmark": "webhook_overhead",
        "wall_ratio": round(wall, 4),
        "wall_ratio_95": [round(low, 4), round(high, 4)],
        "seconds_are_valid": len(everything) >= 20 and high - low <= 0.02,
        "thread_ratio": round(thread, 4),
        "handle_share": round(statistics.mean(with_.handle / with_.thread for with_, _ in everything), 6),
        "background_share": round(statistics.mean(with_.background for with_, _ in everything), 5),
        "goal": GOAL,
        "nothing": [round(value, 4) for value in ratios(found["nothing"])],
        "services": {name: [round(value, 4) for value in ratios(found[name])] for name in services},
        "seconds_per_step": round(statistics.median(without.wall for _, without in everything), 5),
        "pairs": len(everything),
        "memory_grew_mb": round(peak_memory_mb() - memory, 1),
        "load": os.getloadavg()[0],
    }


def ratios(pairs: list[tuple[Block, Block]]) -> tuple[float, float]:
    """Medians of with / without: seconds, CPU time of the training thread."""
    return (
        statistics.median(with_.wall / without.wall for with_, without in pairs),
        statistics.median(with_.thread / without.thread for with_, without in pairs),
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Between which order statistics the median lies, with 95 % confidence (the binomial's normal approximation)."""
    ordered, count = sorted(values), len(values)
    reach = 1.96 * count**0.5 / 2
    return ordered[max(int(count / 2 - reach), 0)], ordered[min(int(count / 2 + reach), count - 1)]


def peak_memory_mb() -> float:
    from simpletuner.training.memory import peak_bytes

    return peak_bytes() / 2**20


class Trainer:
    """A real run of the shipped model, whose loop is driven by hand, so that its listeners can be changed."""

    def __init__(self, folder: Path):
        from PIL import Image

        from simpletuner.config.loading import load_run
        from simpletuner.reporting.bus import EventBus
        from simpletuner.reporting.events import SavedImage
        from simpletuner.training.build import build_run
        from simpletuner.training.process import Process
        from simpletuner.training.run_history import FolderGuard
        from simpletuner.training.signals import StopRequest

        self.folder = folder
        arguments = {
            **{"output_dir": "output", "cache_dir": "cache", "max_train_steps": 10**9, "report_to": "none"},
            **{"train_batch_size": 4, "validation_disable": True, "checkpoint_step_interval": 0},
            **{"eval_loss_disable": True, "data_backend_config": "data.json"},
        }
        # One kind of image: all steps do the same work.
        images = str(example_config().parent / "datasets" / "concept")
        entry = {"id": "images", "instance_data_dir": images, "caption_strategy": "textfile", "resolution": 64}
        (folder / "data.json").write_text(json.dumps([entry]))
        given = [f"--{key}={value}" for key, value in arguments.items()]
        loaded = load_run(given, {"CONFIG_PATH": str(example_config())}, folder)
        (folder / "output").mkdir()
        self.run = build_run(loaded, Process(guard=FolderGuard(folder / "output"), bus=EventBus(), stop=StopRequest()))
        self.run.model.denoiser.train()
        path = folder / "picture.png"
        Image.effect_noise((1024, 1024), 90).convert("RGB").save(path)
        self.image = SavedImage(path, "noise", "noise", 1024, 1024, 1, "live")

    def block(self, url: str | None, steps: int) -> Block:
        """Some steps with a webhook at `url`, or without."""
        from simpletuner.reporting.bus import EventBus
        from simpletuner.reporting.events import CheckpointSaved, ImagesMade
        from simpletuner.reporting.sinks.jsonl import JsonlSink

        sinks: list[Any] = [JsonlSink(self.folder / "metrics")]
        timer = HandleTimer(webhook_sink(url, Path(tempfile.mkdtemp(dir=self.folder)))) if url else None
        with EventBus([*sinks, timer] if timer else sinks) as bus:
            self.run.session.bus = bus
            wall, started, started_thread = [], time.perf_counter(), time.thread_time()
            for index in range(steps):
                before = time.perf_counter()
                self.step()
                if index == steps // 3:
                    bus.emit(CheckpointSaved(self.run.progress.global_step, "checkpoint"))
                if index == steps // 2:
                    bus.emit(ImagesMade(self.run.progress.global_step, (self.image,) * 2))
                wall.append(time.perf_counter() - before)
            thread = (time.thread_time() - started_thread) / steps
            handle = timer.seconds / steps if timer else 0.0
            background = background_seconds() / (time.perf_counter() - started)
        return Block(statistics.median(wall[3:]), thread, handle, background)

    def step(self) -> None:
        """What the training loop does for a step."""
        from simpletuner.training.loop import report_step, train_window

        run, started = self.run, time.perf_counter()
        epoch = run.progress.epoch
        window = run.batches.window(run.progress.global_step, epoch, run.progress.position)
        outcome = train_window(run, window)
        report_step(run, window, outcome, epoch, time.perf_counter() - started)


class HandleTimer:
    """A sink in front of another that adds up the CPU time of its `handle`."""

    def __init__(self, sink: Any):
        self.name, self.failures, self.close, self.take_notices = (
            sink.name,
            sink.failures,
            sink.close,
            sink.take_notices,
        )
        self._handle, self.seconds = sink.handle, 0.0

    def handle(self, event: Any) -> None:
        before = time.thread_time()
        self._handle(event)
        self.seconds += time.thread_time() - before


def background_seconds() -> float:
    """CPU time that the thread of the webhooks has had."""
    import psutil

    wanted = [thread.native_id for thread in threading.enumerate() if thread.name == "webhooks"]
    times = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process().threads()}
    return sum(times.get(identity or 0, 0.0) for identity in wanted)


def webhook_sink(url: str, folder: Path) -> Any:
    """The sink of a run, which at the end of a block does not wait for anything."""
    from pydantic import SecretStr

    from simpletuner.config.webhooks import Webhook, Webhooks
    from simpletuner.reporting.webhooks.sender import Timing
    from simpletuner.reporting.webhooks.sink import WebhookSink

    target = Webhook(webhook_type="raw", callback_url=SecretStr(url))
    return WebhookSink(Webhooks((target,)), folder, replace(Timing(), drain=0.05))


def example_config() -> Path:
    from simpletuner.examples import example_dir

    return example_dir("omnigen-tiny") / "config.json"


# ---- services ----


@contextmanager
def service(name: str) -> Iterator[str | None]:
    """The address of a service that misbehaves; None for "nothing"."""
    if name == "nothing":
        yield None
    elif name == "refuses":
        with socket.socket() as taken:  # bound, not listening: nobody else gets the port
            taken.bind(("127.0.0.1", 0))
            yield f"http://127.0.0.1:{taken.getsockname()[1]}/"
    else:
        command = [sys.executable, __file__, "--serve", name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
            process.kill()


def serve(name: str) -> int:
    """Answer every request as `name` says, until killed."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            if name == "hangs":
                threading.Event().wait()
            self.rfile.read(int(self.headers["Content-Length"]))
            if name == "drips":
                self.drip()
            self.send_response(int(name))
            for key, value in {"Content-Length": "0", "Retry-After": "1", "Location": "/x"}.items():
                self.send_header(key, value)
            self.end_headers()

        def drip(self) -> None:
            """A byte a second."""
            for byte in b"HTTP/1.1 204 No Content\r\nX-Pad: " + b"x" * 10**6:
                self.wfile.write(bytes([byte]))
                time.sleep(1)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    print(f"http://127.0.0.1:{server.server_port}/", flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
