"""Webhooks against a real server on this machine, which works, fails in every way, and recovers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from pydantic import SecretStr

from simpletuner.config.webhooks import Webhook, Webhooks
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    ImagesMade,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    SavedImage,
    StepDone,
)
from simpletuner.reporting.webhooks.encoding import Body
from simpletuner.reporting.webhooks.images import Attachment
from simpletuner.reporting.webhooks.messages import words_for
from simpletuner.reporting.webhooks.outbox import Outbox
from simpletuner.reporting.webhooks.sender import Patience, Sender, Timing
from simpletuner.reporting.webhooks.sink import WebhookSink
from simpletuner.reporting.webhooks.spool import Spool
from simpletuner.reporting.webhooks.transport import Deadlines, DeliveryFailed
from tests.events import step_done
from tests.receiver import Receiver, receiver, wait_until

QUICK = Timing(Deadlines(60.0, 60.0, 60.0), Patience(0.02, 0.1, 3), progress=0.05, drain=120.0)
HASTY = replace(QUICK, deadlines=Deadlines(0.3, 0.3, 0.4))
NAMED = ["hangs", "drips", "500", "429", "413", "302", "401"]


def raw(url: str, **keys: Any) -> Webhook:
    return Webhook(webhook_type="raw", callback_url=SecretStr(url), **keys)


def make_sink(folder: Path, *targets: Webhook, interval: int | None = None, timing: Timing = QUICK) -> WebhookSink:
    return WebhookSink(Webhooks(targets, "job-1", interval), folder, timing)


def step(number: int, total: int = 100) -> StepDone:
    return step_done(number, total_steps=total, loss=1.0 / number, grad_norm=0.5, seconds=0.01)


def image(folder: Path, name: str = "cat.png", side: int = 64, noise: bool = False) -> SavedImage:
    path = folder / name
    image = Image.effect_noise((side, side), 100).convert("RGB") if noise else Image.new("RGB", (side, side), "teal")
    image.save(path)
    return SavedImage(path, "cat", "a cat", side, side, 42, "live")


def must_arrive(folder: Path) -> list[Any]:
    """One event of each kind that is never dropped."""
    return [
        CheckpointSaved(5, folder / "checkpoint-5"),
        ImagesMade(5, (image(folder),)),
        RunFailed(6, "the disk is full", 3),
        RunFinished(7, 12.0),
    ]


def test_a_run_is_reported_in_order(tmp_path: Path) -> None:
    with receiver() as server:
        sink = make_sink(tmp_path, raw(server.url, auth_token=SecretStr("t0k"), message_prefix="lab"))
        sink.handle(RunStarted("stars", tmp_path, 100, details={"model": "Tiny"}, run_id="a1b2"))
        sink.handle(PhaseStarted("encoding", 4))
        sink.handle(PhaseDone("encoding", 1.0, "4 images"))
        for number in range(1, 101):
            sink.handle(step(number))
        sink.handle(EvalDone(100, {"held-out": 0.5}, 0.5))
        sink.handle(CheckpointSaved(100, tmp_path / "checkpoint-100"))
        sink.handle(ImagesMade(100, (image(tmp_path),)))
        sink.handle(RunFinished(100, 3.0))
        sink.close()
    types = [event["type"] for event in server.accepted]
    rest = [kind for kind in types if kind != "training.status"]
    stages, images = ["lifecycle.stage"] * 2, ["training.checkpoint", "validation.image"]
    assert rest == [*stages, "training.evaluation", *images]
    assert (types[0], types[-1]) == ("training.status", "training.status")
    curve = [row[0] for event in server.accepted for row in event["data"].get("curve", [])]
    assert curve == list(range(1, 101)), "the curve is whole, however seldom progress is sent"
    assert {event["run_name"] for event in server.accepted} == {"stars"}
    assert {event["run_id"] for event in server.accepted} == {"a1b2"}
    assert {event["prefix"] for event in server.accepted} == {"lab"}
    assert {event["job_id"] for event in server.accepted} == {"job-1"}
    assert {headers["X-API-Key"] for headers, _ in server.requests} == {"t0k"}
    assert len({event["id"] for event in server.accepted}) == len(types)
    sent = next(event for event in server.accepted if event["images"])
    assert sent["images"][0].startswith("data:image/png;base64,")
    assert sent["data"]["pictures"][0]["image"] == 0
    assert sink.take_notices() == []


@pytest.mark.slow
@pytest.mark.parametrize("behavior", NAMED)
def test_what_must_arrive_does_once_the_service_recovers(tmp_path: Path, behavior: str) -> None:
    with receiver(behavior) as server:
        server.headers = {"Retry-After": "0"} if behavior == "429" else {"Location": "/elsewhere"}
        timing = HASTY if behavior in ("hangs", "drips") else QUICK
        sink = make_sink(tmp_path, raw(server.url), timing=timing)
        for event in must_arrive(tmp_path):
            sink.handle(event)
        wait_until(lambda: len(server.tries) >= 4)
        assert server.accepted == []
        server.behavior = "ok"
        wait_until(lambda: len(server.accepted_once) >= 4)
        sink.close()
    titles = [event["title"] for event in server.accepted_once]
    assert sorted(titles) == [
        "checkpoint at step 5",
        "images at step 5",
        "training failed at step 6",
        "training is done",
    ]
    assert [len(event["images"]) for event in server.accepted_once if "images" in event["title"]] == [1]
    assert list((tmp_path / "webhooks" / "1-raw").glob("*.json")) == []
    texts = [notice.text for notice in sink.take_notices()]
    assert sum("does not work" in text for text in texts) == 1
    assert sum("works again" in text for text in texts) == 1
    assert not any(server.url in text for text in texts)
    assert "/elsewhere" not in {headers.get("path") for headers, _ in server.requests}


def test_the_next_process_sends_what_the_last_one_could_not(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and nobody listens; once closed, its port may be another server's
        sink = make_sink(tmp_path, raw(f"http://127.0.0.1:{deaf.getsockname()[1]}/hook"))
        for event in must_arrive(tmp_path):
            sink.handle(event)
        sink.close()
    assert "4 kept in" in sink.take_notices()[-1].text
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    with receiver() as server:
        second = make_sink(moved, raw(server.url))
        wait_until(lambda: len(server.accepted) == 4)
        second.close()
        assert make_sink(moved, raw(server.url)).close() is None
    assert len(server.accepted) == 4
    assert [len(event["images"]) for event in server.accepted] == [0, 1, 0, 0], "also after the folder was moved"


def test_a_lost_answer_gives_the_same_event_a_second_time_under_the_same_id(tmp_path: Path) -> None:
    with receiver("hangs") as server:
        sink = make_sink(tmp_path, raw(server.url), timing=HASTY)
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        wait_until(lambda: len(server.requests) >= 2)
        server.behavior = "ok"
        wait_until(lambda: server.accepted)
        sink.close()
    assert len({json.loads(body)["id"] for _, body in server.requests}) == 1
    assert {headers["X-Event-Id"] for headers, _ in server.requests} == {server.accepted[0]["id"]}


@pytest.mark.parametrize("behavior", ["hangs", "drips"])
def test_handling_an_event_takes_no_time_and_the_end_has_a_deadline(tmp_path: Path, behavior: str) -> None:
    with receiver(behavior) as server:
        patient = replace(QUICK, drain=0.5, deadlines=Deadlines(600.0, 600.0, 600.0))
        sink = make_sink(tmp_path, raw(server.url), timing=patient)
        started = time.thread_time()
        for number in range(1, 2001):
            sink.handle(step(number, 2000))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        assert time.thread_time() - started < 0.2, "0.1 ms for an event"
        wait_until(lambda: server.tries)
        started = time.monotonic()
        sink.close()
        assert time.monotonic() - started < 300, "not the ten minutes in which the service would be given up"


def test_a_dead_service_costs_bounded_memory(tmp_path: Path) -> None:
    with receiver("hangs") as server:
        sink = make_sink(tmp_path, raw(server.url), timing=replace(QUICK, drain=0.2))
        outbox = sink._senders[0].outbox
        for number in range(1, 3000):
            sink.handle(Notice("warning", "x" * 20_000))
            sink.handle(step(number, 3000))
        assert len(outbox) <= 500
        assert outbox.num_bytes <= 4 << 20
        assert len(outbox._curve) <= 1000
        sink.close()
    assert any("lost" in notice.text for notice in sink.take_notices())


def test_images_shrink_until_the_service_takes_them(tmp_path: Path) -> None:
    with receiver() as server:
        server.max_body = 60_000
        sink = make_sink(tmp_path, raw(server.url))
        big = [image(tmp_path, f"{index}.png", 256, noise=True) for index in range(2)]
        sink.handle(ImagesMade(1, tuple(big)))
        sink.handle(ImagesMade(2, tuple(big)))
        wait_until(lambda: len(server.accepted) == 2)
        sink.close()
    first, second = server.accepted
    assert len(first["images"]) == len(second["images"]) == 2
    assert first["images"][0].startswith("data:image/jpeg")
    sizes = [len(body) for _, body in server.requests]
    assert sizes[-1] <= 60_000
    assert sum(size > 60_000 for size in sizes) < 5, "what was learned is kept for the next message"


def test_a_service_that_found_everything_too_large_gets_images_whole_when_it_works(tmp_path: Path) -> None:
    big = image(tmp_path, "big.png", 256, noise=True)
    with receiver("413") as server:
        sink = make_sink(tmp_path, raw(server.url))
        sink.handle(ImagesMade(1, (big,)))
        wait_until(lambda: len(server.tries) > 20)
        server.behavior = "ok"
        wait_until(lambda: server.accepted)
        sink.close()
    sizes = [len(body) for _, body in server.requests]
    assert len(set(sizes)) > 2, "smaller ones were tried"
    assert server.accepted[0]["images"] != []


def test_an_image_in_a_folder_with_an_odd_name_waits_and_arrives(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"odd \xff")
    folder.mkdir()
    with receiver("500") as server:
        sink = make_sink(tmp_path, raw(server.url))
        sink.handle(ImagesMade(1, (image(folder),)))
        wait_until(lambda: server.tries)
        server.behavior = "ok"
        sink.close()
    assert len(server.accepted[0]["images"]) == 1


def test_an_image_that_is_gone_costs_only_itself(tmp_path: Path) -> None:
    with receiver() as server:
        sink = make_sink(tmp_path, raw(server.url))
        kept, gone = image(tmp_path, "a.png"), image(tmp_path, "b.png")
        gone.path.unlink()
        sink.handle(ImagesMade(1, (gone, kept)))
        sink.close()
    assert [facts["image"] for facts in server.accepted[0]["data"]["pictures"]] == [None, 0]
    assert len(server.accepted[0]["images"]) == 1


@pytest.mark.slow
def test_retry_after_is_kept(tmp_path: Path) -> None:
    with receiver("429") as server:
        server.headers = {"Retry-After": "0.6"}
        sink = make_sink(tmp_path, raw(server.url))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        wait_until(lambda: len(server.tries) == 2)
        assert server.tries[1] - server.tries[0] >= 0.6
        server.behavior = "ok"
        sink.close()


def test_a_message_that_is_never_accepted_lets_the_others_pass(tmp_path: Path) -> None:
    with receiver("400") as server:
        sink = make_sink(tmp_path, raw(server.url))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        wait_until(lambda: (tmp_path / "webhooks/1-raw/refused").is_dir())
        server.behavior = "ok"
        sink.handle(CheckpointSaved(6, "checkpoint-6"))
        sink.close()
    assert [event["data"]["step"] for event in server.accepted] == [6]
    assert len(list((tmp_path / "webhooks/1-raw/refused").iterdir())) == 1
    assert any("does not accept" in notice.text for notice in sink.take_notices())


def test_one_dead_service_does_not_keep_the_other_waiting(tmp_path: Path) -> None:
    with receiver("hangs") as dead, receiver() as alive:
        timing = Timing(Deadlines(30, 30, 30), drain=0.2)
        sink = make_sink(tmp_path, raw(dead.url), raw(alive.url), timing=timing)
        for number in range(5):
            sink.handle(CheckpointSaved(number, "checkpoint"))
        wait_until(lambda: len(alive.accepted) == 5, seconds=25)
        sink.close()


@pytest.mark.parametrize(
    ("level", "titles"),
    [("critical", ["training failed at step 1"]), ("warning", ["warning", "training failed at step 1"])],
)
def test_levels_choose(tmp_path: Path, level: str, titles: list[str]) -> None:
    with receiver() as server:
        sink = make_sink(tmp_path, raw(server.url, log_level=level))
        for event in (step(1), PhaseProgress("x", 1), Notice("info", "i"), Notice("warning", "w"), RunFailed(1, "f")):
            sink.handle(event)
        sink.close()
    assert [event["title"] for event in server.accepted] == titles


def discord_bodies(server: Receiver) -> list[str]:
    return [body.decode("utf-8", "replace") for body in server.accepted_bodies]


def test_discord_gets_words_and_files(tmp_path: Path) -> None:
    with receiver() as server:
        target = Webhook(webhook_type="discord", webhook_url=SecretStr(server.url), message_prefix="lab")
        sink = make_sink(tmp_path, target, interval=10)
        sink.handle(RunStarted("stars", tmp_path, 20))
        sink.handle(PhaseStarted("encoding", 4))
        for number in range(1, 21):
            sink.handle(step(number, 20))
        sink.handle(ImagesMade(20, tuple(image(tmp_path, f"{index}.png") for index in range(12))))
        sink.handle(Notice("warning", "@everyone " + "x" * 3000))
        sink.close()
    bodies = discord_bodies(server)
    payloads = [json.loads(body) for body in bodies if body.startswith("{")]
    texts = [payload["content"] for payload in payloads]
    assert texts[0].startswith("`(lab)` **training starts**")
    assert any("step 20 of 20" in text for text in texts)
    assert not any("encoding" in text for text in texts)
    assert max(map(len, texts)) == 2000
    assert {json.dumps(payload["allowed_mentions"]) for payload in payloads} == {'{"parse": []}'}
    forms = [body for body in bodies if "multipart" not in body and "payload_json" in body]
    assert [form.count('filename="') for form in forms] == [10, 2]
    assert 'name="files[9]"; filename="9.png"' in forms[0]


def test_a_disk_that_cannot_be_written_costs_no_message_while_the_service_works(tmp_path: Path) -> None:
    (tmp_path / "webhooks").write_text("in the way")
    with receiver() as server:
        sink = make_sink(tmp_path, raw(server.url))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        sink.handle(CheckpointSaved(6, "checkpoint-6"))
        sink.close()
    assert [event["data"]["step"] for event in server.accepted] == [5, 6]
    (notice,) = sink.take_notices()
    assert "kept in memory only" in notice.text


@pytest.mark.slow
def test_waiting_takes_no_processor_time(tmp_path: Path) -> None:
    with receiver("500") as server:
        sink = make_sink(tmp_path, raw(server.url), timing=Timing(drain=0.1))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        wait_until(lambda: server.tries)
        before = time.process_time()
        time.sleep(1.0)
        assert time.process_time() - before < 0.5
        sink.close()


def test_addresses_stay_out_of_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """httpx tells the log each URL that it asks for."""
    caplog.set_level(logging.DEBUG)
    with receiver() as server:
        sink = make_sink(tmp_path, raw(f"{server.url}/s3cret?token=s3cret"))
        sink.handle(CheckpointSaved(5, "checkpoint-5"))
        sink.close()
    assert len(server.accepted) == 1
    assert "s3cret" not in caplog.text


def test_progress_waits_for_the_messages_before_it() -> None:
    """Also for one that came after the sender had found none."""
    outbox = Outbox()
    start, saved = (
        words_for(event, "stars", "a1b2")[0]
        for event in (RunStarted("stars", Path("out"), 20), CheckpointSaved(5, Path("checkpoint-5")))
    )
    assert (start.must_arrive, saved.must_arrive) == (False, True)
    outbox.put(start)
    outbox.put_progress(step(1))
    assert outbox.take_progress(only_if_first=True) is None
    outbox.remove(start)
    outbox.put(saved)
    assert outbox.take_progress(only_if_first=True) is None
    assert outbox.take_urgent() == [saved]
    taken = outbox.take_progress(only_if_first=True)
    assert taken is not None
    assert taken[0] == step(1)


def test_the_last_step_goes_before_the_end_though_messages_wait() -> None:
    outbox = Outbox()
    outbox.put(words_for(RunStarted("stars", Path("out"), 20), "stars", "a1b2")[0])
    outbox.put_progress(step(20))
    taken = outbox.take_progress()
    assert taken is not None
    assert taken[0] == step(20)


def test_a_curve_that_could_not_be_sent_stays_in_the_order_of_its_steps() -> None:
    outbox = Outbox()
    for number in (1, 2):
        outbox.put_progress(step(number))
    taken = outbox.take_progress()
    assert taken is not None
    outbox.put_progress(step(3))
    outbox.put_back_progress(*taken)
    again = outbox.take_progress()
    assert again is not None
    event, curve = again
    assert isinstance(event, StepDone)
    assert event.step == 3  # what is newer counts
    assert [point.step for point in curve] == [1, 2, 3]


def test_a_large_request_gets_a_second_more_for_each_256_kib() -> None:
    content, image = b"x" * (256 << 10), Attachment("a.png", "image/png", b"x" * (512 << 10))
    assert Deadlines(total=15.0).of(Body(content, [image])) == 18


def test_the_oldest_message_goes_first_from_the_disk_or_from_memory(tmp_path: Path) -> None:
    """A damaged one between them is reported, moved away and missed."""
    notices: list[Notice] = []
    sender = Sender(
        "one", raw("http://127.0.0.1:9"), Spool(tmp_path, tmp_path), QUICK, lambda: ("", ""), notices.append
    )
    (tmp_path / f"{0:020d}-damaged.json").write_text("{")
    urgent, ordinary = (words_for(each, "", "")[0] for each in (RunFinished(7, 1.0), RunStarted("", Path("out"), 20)))
    for created, message in zip((1.0, 2.0, 3.0, 4.0), (urgent, ordinary) * 2, strict=True):
        sender.outbox.put(replace(message, id=str(created), created=created))

    async def take() -> float | None:
        if (delivery := sender._next_delivery()) is None:
            return None
        if delivery.file is not None:
            sender.spool.remove(delivery.file)
        sender.outbox.remove(delivery.message)
        return delivery.message.created

    assert [asyncio.run(take()) for _ in range(5)] == [1.0, 2.0, 3.0, 4.0, None]
    assert [notice.severity for notice in notices] == ["warning"]
    assert "cannot be read; moved to" in notices[0].text
    assert [path.name for path in (tmp_path / "refused").iterdir()] == [f"{0:020d}-damaged.json"]


@pytest.mark.parametrize(("seconds", "must_wait"), [(None, False), (0.0, False), (30.0, True)])
def test_only_a_pause_that_the_service_asks_for_is_not_cut_short(
    tmp_path: Path, seconds: float | None, must_wait: bool
) -> None:
    sender = Sender(
        "one", raw("http://127.0.0.1:9"), Spool(tmp_path, tmp_path), QUICK, lambda: ("", ""), lambda _: None
    )
    outcome: Any = SimpleNamespace(exception=lambda: DeliveryFailed("busy", seconds))
    sender._failed(SimpleNamespace(outcome=outcome, attempt_number=1))  # type: ignore[arg-type]
    assert sender._must_wait is must_wait
