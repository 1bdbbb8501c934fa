"""What the monitor keeps of a run, and which posts it refuses: by hand, without a server."""

from __future__ import annotations

import base64
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from simpletuner.reporting.events import ImagesMade, Notice, SavedImage, StepDone
from simpletuner.reporting.monitor import following, history, reading
from simpletuner.reporting.monitor.following import Follower, event_of
from simpletuner.reporting.monitor.history import History, Image, ImageStore, RunHistory
from simpletuner.reporting.monitor.reading import BadEvent, read_event

PNG = "data:image/png;base64," + base64.b64encode(b"png").decode()


def event(kind: str, data: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": os.urandom(8).hex(), "type": kind, "run_name": "stars", "data": data, **keys}


def progress(*rows: tuple[int, float], **data: Any) -> dict[str, Any]:
    curve = [[step, loss, 1e-4, 0.5] for step, loss in rows]
    return event("training.status", {"status": "running", "curve": curve, **data})


def only(kept: History) -> dict[str, Any]:
    (snapshot,), _ = kept.snapshots()
    return snapshot


def test_a_run_is_kept_fact_by_fact() -> None:
    kept = History()
    about = {"timestamp": "t", "severity": "info", "title": "start", "message": "of it"}
    start = {"status": "running", "start_step": 0, "total_steps": 9, "output_dir": "o", "unknown": 1}
    kept.add(event("training.status", start, **about), [])
    kept.add(progress((1, 2.0), (2, 1.0), regularisation_steps=[2], step=2, loss=1.0), [])
    kept.add(event("training.evaluation", {"step": 2, "pooled": 0.5, "reference": 0.75}), [])
    kept.add(event("validation.score", {"step": 2, "metric": "clip", "mean": 30.0, "scores": {}}), [])
    line = {key: "" for key in ("timestamp", "severity", "title", "message")}
    assert only(kept) == {
        "run": "stars",
        "reset": True,
        "status": {"status": "running", "total_steps": 9, "start_step": 0, "output_dir": "o", "step": 2, "loss": 1.0},
        "stage": None,
        "curve": [[1, 2.0, 1e-4, 0.5, False], [2, 1.0, 1e-4, 0.5, True]],
        "evals": [[2, 0.5, 0.75]],
        "scores": [{"step": 2, "metric": "clip", "mean": 30.0}],
        "pictures": [],
        "log": [
            {**about, "type": "training.status"},
            {**line, "type": "training.evaluation"},
            {**line, "type": "validation.score"},
        ],
    }


def test_a_start_again_keeps_what_comes_up_to_its_step_and_a_fresh_one_nothing() -> None:
    kept = History()
    for sent in (
        progress((1, 3.0), (2, 2.0), (3, 1.0)),
        event("training.evaluation", {"step": 2}),
        event("training.evaluation", {"step": 3}),
        event("validation.score", {"step": 2}),
    ):
        kept.add(sent, [])
    kept.add(event("validation.image", {"step": 2, "pictures": [{"image": 0}]}), [Image("image/png", b"a")])
    for start, steps, evals, others in ((2, [1, 2], [2], 1), (0, [], [], 0)):
        kept.add(event("training.status", {"start_step": start, "status": "running"}), [])
        now = only(kept)
        assert [row[0] for row in now["curve"]] == steps
        assert [row[0] for row in now["evals"]] == evals
        assert (len(now["scores"]), len(now["pictures"])) == (others, others)
        assert now["status"] == {"status": "running", "start_step": start}


def test_a_step_is_drawn_once_and_a_long_curve_by_every_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MAX_POINTS", 4)
    run = RunHistory("a")
    run.apply(progress((1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0)), [])
    assert run.apply(progress((4, 9.0)), []) == {"run": "a", "status": {"status": "running"}}
    assert [row[0] for row in run.curve] == [1, 2, 3, 4]
    run.apply(progress((4, 9.0), (5, 1.0)), [])
    assert [row[0] for row in run.curve] == [1, 3, 5]


def test_a_stage_remembers_how_much_there_is_to_do_and_ends_with_the_run() -> None:
    run = RunHistory("a")

    def stage(key: str, status: str = "running", **done: int) -> Any:
        return run.apply(event("lifecycle.stage", {"stage": {"key": key, "status": status, "progress": done}}), [])

    stage("scan", total=9)
    assert stage("scan", done=4)["stage"] == {"key": "scan", "status": "running", "progress": {"total": 9, "done": 4}}
    assert stage("scan", total=10, done=5)["stage"]["progress"] == {"total": 10, "done": 5}
    assert stage("cache", done=1)["stage"]["progress"] == {"done": 1}
    assert "log" not in stage("cache", done=2)
    ended = stage("cache", "completed")
    assert (ended["stage"], ended["log"][0]["type"], run.stage) == (None, "lifecycle.stage", None)
    stage("scan")
    run.apply(event("training.status", {"status": "running"}), [])
    assert run.stage is not None
    assert run.apply(event("error", {"status": "failed", "seconds": 4}), [])["status"] == {"status": "failed"}
    assert run.stage is None


def test_images_carry_the_facts_of_their_event_and_those_that_were_not_sent_are_left_out() -> None:
    kept = History()
    facts = {"step": 2, "step_label": "step 2", "sampling_step": 5, "num_sampling_steps": 20, "sigma": 0.5}
    images = [{"shortname": "a", "image": 1}, {"shortname": "b", "image": None}, {"shortname": "c", "image": 2}]
    images += [{"shortname": "d", "image": -1}, {"shortname": "e", "image": 0}]
    sent = event("validation.preview", {**facts, "more": 1, "pictures": images})
    assert kept.add(sent, [Image("image/png", b"x"), Image("image/webp", b"y")])
    assert not kept.add(sent, [])
    first, second = only(kept)["pictures"]
    assert first == {"shortname": "a", **facts, "image": first["image"]}
    assert second["shortname"] == "e"
    assert kept.image(first["image"]) == Image("image/webp", b"y")
    assert kept.image(second["image"]) == Image("image/png", b"x")
    assert kept.image("0" * 32) is None
    assert only(kept)["log"] == []


def test_a_preview_that_becomes_an_image_gives_way_to_no_preview() -> None:
    store = ImageStore(max_bytes=8)
    shown, preview = Image("image/png", b"aaaa"), Image("image/png", b"bbbb")
    store.add(shown, True)
    number = store.add(shown, False)
    again = store.add(shown, True)  # it was shown as an image, and stays one
    assert again == number
    late = store.add(preview, True)
    store.add(Image("image/png", b"cccc"), False)
    assert store.get(number) == shown
    assert store.get(late) is None
    store.add(Image("image/png", b"dddd"), False)
    assert store.get(number) is None  # the oldest, where there is no preview


def test_limits_are_those_that_a_browser_and_a_machine_bear() -> None:
    assert (history.MAX_RUNS, history.MAX_POINTS, history.MAX_LOG_LINES, history.MAX_IMAGES) == (12, 20_000, 2000, 3000)
    assert history.MAX_IMAGE_BYTES == 256 << 20
    assert (RunHistory("a").images.maxlen, RunHistory("a").log.maxlen) == (3000, 2000)
    assert (reading.MAX_IMAGES, reading.MAX_DEPTH, reading.MAX_STEP) == (32, 20, 2**53)
    kept = History()
    for number in range(14):
        kept.add({**event("x", {}), "run_name": f"run {number}"}, [])
    kept.add({**event("x", {}), "run_name": "run 3"}, [])
    names = [snapshot["run"] for snapshot in kept.snapshots()[0]]
    assert names == [*(f"run {number}" for number in (2, *range(4, 14))), "run 3"]
    kept.add({**event("x", {}), "run_name": None}, [])
    assert kept.snapshots()[0][-1]["run"] == "run"


def test_losses_are_split_by_kind_and_nothing_that_is_no_number_is_a_point() -> None:
    kept = History()
    kept.add(progress((1, 2.0), (2, 0.5), (3, float("nan")), (4, 1e300), (5, 1.0), regularisation_steps=[2]), [])
    kept.add(progress((6, True)), [])
    for step, pooled, reference in ((2, 0.75, 0.9), (6, 0.5, 0.8), (7, None, 0.7)):
        kept.add(event("training.evaluation", {"step": step, "pooled": pooled, "reference": reference}), [])
    train, prior, evaluation, base, last = kept.losses("stars")
    assert (train, prior) == ([(1.0, 2.0), (5.0, 1.0)], [(2.0, 0.5)])
    assert (evaluation, base, last) == ([(2.0, 0.75), (6.0, 0.5)], 0.8, 6.0)
    assert kept.losses("other") == ([], [], [], None, 0.0)


def test_who_waits_is_woken_by_the_next_patch_and_not_before_its_time() -> None:
    kept = History()
    waits: list[float] = []
    real = kept._condition.wait

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        kept._report({"run": "stars"})
        return real(0)

    kept._condition.wait = wait  # type: ignore[method-assign]
    assert kept.wait(0, 5.0) == ([{"run": "stars"}], 1)
    assert waits == [5.0]
    assert kept.wait(0, 5.0) == ([{"run": "stars"}], 1)  # it is there already
    assert waits == [5.0]
    kept.forget("stars")
    assert kept.wait(1, 0) == ([RunHistory("stars").snapshot()], 2)


def body(**changes: Any) -> bytes:
    return json.dumps({"id": "1", "type": "x", "data": {}} | changes).encode()


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\xff", "not JSON"),
        (b'{"id": "1", "type": "x", "data": {"a": Infinity}}', "not JSON"),
        (body(data={"a": nested(18)}), "nested deeper than 20"),
        (b"[]", "not an event of a raw webhook"),
        (body(type=1), "not an event of a raw webhook"),
        (body(id=1), "an event has id and data"),
        (body(data=[]), "an event has id and data"),
        (body(run_name=1), "timestamp, severity, title, message are texts"),
        (body(severity=[]), "timestamp, severity, title, message are texts"),
        (body(data={"curve": {}}), "curve is a list of [step, loss, learning rate, gradient norm]"),
        (body(data={"curve": [[1, 2, 3]]}), "curve is a list of [step, loss, learning rate, gradient norm]"),
        (body(data={"curve": [[True, 2, 3, 4]]}), "curve is a list of [step, loss, learning rate, gradient norm]"),
        (body(data={"regularisation_steps": ["1"]}), "regularisation_steps is a list of whole numbers"),
        (body(data={"regularisation_steps": 1}), "regularisation_steps is a list of whole numbers"),
        (body(data={"pictures": [1]}), "images is a list of objects"),
        (body(data={"step": 2**53 + 1}), "step is a whole number"),
        (body(data={"start_step": 1.5}), "start_step is a whole number"),
        (body(type="training.evaluation"), "training.evaluation has a step"),
        (body(type="validation.score"), "validation.score has a step"),
        (body(data={"stage": {"progress": [1]}}), "stage is an object, and its progress too"),
        (body(images=[PNG] * 33), "images is a list of at most 32"),
        (body(images={}), "images is a list of at most 32"),
        (body(images=["data:image/gif;base64,"]), "an image is a data URI of a PNG, JPEG or WebP"),
        (body(images=[1]), "an image is a data URI of a PNG, JPEG or WebP"),
        (body(images=["data:image/png;base64,a"]), "an image is not base64"),
    ],
)
def test_a_post_that_is_no_event_is_refused_with_its_reason(sent: bytes, reason: str) -> None:
    with pytest.raises(BadEvent) as caught:
        read_event(sent)
    assert str(caught.value) == reason


def test_what_just_fits_is_taken() -> None:
    data = {"a": nested(17), "curve": [[-(2**53), None, 3, 4, 5]], "step": 2**53, "stage": {"progress": None}}
    found, images = read_event(body(data=data, title=None, images=[PNG] * 32))
    assert found["data"] == data
    assert images == [Image("image/png", b"png")] * 32


class Kept(History):
    """Also keeps the events as they came."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def add(self, event: Any, images: Any) -> bool:
        self.events.append(event)
        return super().add(event, images)


def write_lines(path: Path, *records: Any, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write("\n".join(each if isinstance(each, str) else json.dumps(each) for each in records) + end)


def test_a_file_is_followed_line_by_line_and_a_half_one_is_read_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "_STEPS_PER_REPORT", 2)
    path, kept = tmp_path / "metrics.jsonl", Kept()
    follower = Follower(tmp_path, kept)
    follower.read()  # there is none yet
    step = {"event": "step_done", "total_steps": 9, "learning_rate": 0.1, "seconds": 1.0, "loss": 1.0}
    step |= {"epoch": 0, "samples": 1, "grad_norm": None}
    notice = {"event": "notice", "severity": "warning", "text": "w", "time": 5.0}
    write_lines(path, {**notice, "text": "before"}, "{damaged", "[1]", {"event": "of a later version"})
    follower.read()
    assert [each["run_name"] for each in kept.events] == [tmp_path.name]
    assert kept.events[0]["timestamp"].startswith("1970-01-01T00:00:05")
    follower.read()
    assert len(kept.events) == 1
    write_lines(path, '{"event": "notice", "severity": "warn', end="")
    follower.read()
    assert len(kept.events) == 1
    write_lines(path, 'ing", "text": "whole"}')
    follower.read()
    assert [each["message"] for each in kept.events] == ["before", "whole"]
    write_lines(path, *({**step, "step": number} for number in (1, 2, 3)), {**notice, "text": "between"})
    write_lines(path, {**step, "step": 4}, {"event": "run_started", "run_name": "stars", "output_dir": "o"})
    follower.read()
    seen = [[row[0] for row in each["data"].get("curve", [])] or each["message"] for each in kept.events[2:]]
    assert seen[:4] == [[1, 2], [3], "between", [4]]
    path.unlink()
    write_lines(path, {**notice, "text": "anew"})
    follower.read()
    assert [line["message"] for line in kept.snapshots()[0][-1]["log"]] == ["anew"]
    is_over = threading.Event()
    waits: list[float] = []
    is_over.wait = lambda seconds=None: waits.append(seconds) or is_over.set() or True  # type: ignore[assignment]
    follower.follow(is_over)
    assert waits == [following.POLL_SECONDS]


def test_records_become_the_events_that_they_were_written_of() -> None:
    assert event_of({"event": "notice", "severity": "info", "text": "t", "time": 1.0, "more": 2}) == Notice("info", "t")
    assert event_of({"event": "nothing known"}) is None
    assert event_of({}) is None
    assert event_of({"event": "notice"}) is None
    assert event_of({"event": "pictures_made", "step": 1, "pictures": [{"path": "a"}]}) is None
    image = {"path": "a/b.png", "shortname": "s", "prompt": "p", "width": 1, "height": 2, "seed": 3, "kind": "live"}
    made = event_of({"event": "pictures_made", "step": 1, "pictures": [image]})
    assert made == ImagesMade(1, (SavedImage(Path("a/b.png"), "s", "p", 1, 2, 3, "live"),))
    step = {"step": 1, "total_steps": 9, "learning_rate": 0.1, "seconds": 1.0, "samples": 1, "epoch": 0}
    read = event_of({"event": "step_done", **step, "loss": "nan", "grad_norm": "Infinity"})
    assert isinstance(read, StepDone)
    assert (math.isnan(read.loss), read.grad_norm) == (True, math.inf)
