"""The monitor's server: what it keeps, what it streams, and what it refuses."""

from __future__ import annotations

import http.client
import json
import random
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
from PIL import Image as PilImage
from pydantic import SecretStr

from simpletuner.commands.monitor import make_server
from simpletuner.config.webhooks import Webhook, Webhooks
from simpletuner.errors import ConfigError
from simpletuner.reporting import events
from simpletuner.reporting.events import to_record
from simpletuner.reporting.monitor import server as monitor_server
from simpletuner.reporting.monitor.following import Follower
from simpletuner.reporting.monitor.history import History, Image, ImageStore
from simpletuner.reporting.monitor.reading import BadEvent, read_event
from simpletuner.reporting.monitor.server import MonitorServer
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, JsonlSink
from simpletuner.reporting.webhooks.encoding import raw_event
from simpletuner.reporting.webhooks.messages import CurvePoint, progress_message
from simpletuner.reporting.webhooks.sink import WebhookSink
from tests.events import step_done

WITHOUT_STEP = b'{"type": "training.evaluation", "id": "1", "data": {"pooled": 0.5}}'
PNG = "data:image/png;base64,iVBORw0KGgo="


@contextmanager
def running(token: str | None = None, output_dir: Path | None = None) -> Iterator[MonitorServer]:
    server = make_server(output_dir, "127.0.0.1", 0, token, lambda line: None)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.is_over.set()
        server.shutdown()
        server.server_close()


def ask(server: MonitorServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
    """(status, body, headers) of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None:
        named.setdefault("Content-Type", "application/json")
    connection.request(method, path, content, named)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def event(kind: str, data: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": uuid.uuid4().hex, "type": kind, "run_name": "stars", "data": data, "images": [], **keys}


def progress(*rows: tuple[int, float]) -> dict[str, Any]:
    curve = [[step, loss, 1e-4, 0.5] for step, loss in rows]
    return event("training.status", {"status": "running", "step": rows[-1][0], "total_steps": 100, "curve": curve})


def stream(server: MonitorServer, count: int) -> list[dict[str, Any]]:
    """The first `count` patches of the stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
    connection.request("GET", "/stream")
    answer, found = connection.getresponse(), []
    while len(found) < count:
        line = answer.readline()
        if line.startswith(b"data: "):
            found += json.loads(line[6:])
    connection.close()
    return found


def test_a_page_that_is_opened_late_sees_everything() -> None:
    with running() as server:
        start = {"status": "running", "step": 0, "start_step": 0, "total_steps": 100, "details": {"model": "Tiny"}}
        image = {"shortname": "cat", "prompt": "a cat", "resolution": "64x64", "kind": "live", "image": 0}
        for sent in (
            event("training.status", start),
            progress((1, 1.0), (2, 0.5)),
            event("training.evaluation", {"step": 2, "pooled": 0.7, "losses": {}}),
            event("validation.image", {"step": 2, "pictures": [image]}, images=[PNG]),
        ):
            assert ask(server, "POST", "/", sent)[0] == 204
        _, snapshot = stream(server, 2)
        assert snapshot["run"] == "stars"
        assert snapshot["status"]["details"] == {"model": "Tiny"}
        assert [row[:2] for row in snapshot["curve"]] == [[1, 1.0], [2, 0.5]]
        assert snapshot["evals"][0][:2] == [2, 0.7]
        number = snapshot["pictures"][0]["image"]
        status, body, headers = ask(server, "GET", f"/pictures/{number}")
        assert (status, body, headers["Content-Type"]) == (200, b"\x89PNG\r\n\x1a\n", "image/png")
        assert ask(server, "GET", "/pictures/999")[0] == 404


def test_what_comes_later_is_streamed() -> None:
    with running() as server:
        ask(server, "POST", "/", progress((1, 1.0)))
        later = threading.Timer(0.2, lambda: ask(server, "POST", "/", progress((2, 0.5))))
        later.start()
        assert stream(server, 3)[-1]["curve"] == [[2, 0.5, 1e-4, 0.5, False]]


def test_a_monitor_that_is_started_again_shows_no_image_under_the_address_of_another() -> None:
    """Browsers keep images by their address, and would show those of before."""
    before, again = ImageStore(), ImageStore()
    assert before.add(Image("image/png", b"star"), False) != again.add(Image("image/png", b"circle"), False)
    assert before.add(Image("image/png", b"moon"), False) == again.add(Image("image/png", b"moon"), False)


def test_steps_on_regularisation_data_are_marked_in_the_curve() -> None:
    history = History()
    steps = [
        step_done(1, total_steps=3, loss=2.0, grad_norm=0.5),
        step_done(
            2, total_steps=3, loss=0.1, grad_norm=0.5, extra={"regularisation_loss": 0.1}, is_regularisation=True
        ),
        # Both kinds in one step.
        step_done(3, total_steps=3, loss=1.0, grad_norm=0.5, extra={"regularisation_loss": 0.2}),
    ]
    message = progress_message(steps[-1], "stars", [CurvePoint.of(each) for each in steps])
    target = Webhook(webhook_type="raw", callback_url=SecretStr("http://localhost/"))
    history.add(raw_event(target, message, [], None), [])
    (snapshot,), _ = history.snapshots()
    assert [[row[0], row[4]] for row in snapshot["curve"]] == [[1, False], [2, True], [3, False]]


def test_an_event_that_comes_twice_counts_once() -> None:
    with running() as server:
        sent = event("notification", {"severity": "warning"}, title="warning", message="full")
        for _ in range(2):
            assert ask(server, "POST", "/", sent)[0] == 204
        assert len(stream(server, 2)[1]["log"]) == 1


def test_a_run_that_goes_on_draws_its_last_steps_anew() -> None:
    history = History()
    history.add(progress((1, 1.0), (2, 0.5), (3, 0.4)), [])
    history.add(event("training.status", {"status": "running", "step": 2, "start_step": 2}), [])
    history.add(progress((3, 0.3)), [])
    (snapshot,), _ = history.snapshots()
    assert [row[:2] for row in snapshot["curve"]] == [[1, 1.0], [2, 0.5], [3, 0.3]]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[" * 100_000,
        {},
        {"type": "x"},
        event(None, {}),  # type: ignore[arg-type]
        event("training.status", {"curve": [1]}),
        event("training.status", {"curve": [["1", 2]]}),
        event("training.status", {"start_step": "x"}),
        event("validation.image", {"pictures": 1}),
        event("validation.image", {"step": 1}, images=["data:text/html;base64,PGI+"]),
        event("validation.image", {"step": 1}, images=["data:image/png;base64,*"]),
        event("lifecycle.stage", {"stage": 1}),
        event("error", {}, id=None),
    ],
)
def test_what_is_no_event_is_refused(body: Any) -> None:
    with running() as server:
        assert ask(server, "POST", "/", body)[0] == 400
        assert server.history.snapshots()[0] == []


def say_raw(server: MonitorServer, request: bytes) -> bytes:
    """The status line that bytes on a connection get."""
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=300) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    return answer.split(b"\r\n")[0]


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: ²",
        "Content-Length: ٣",
        "Content-Length: -1",
        "Content-Length: 1e3",
        "Content-Length: 0x10",
        "Content-Length: 10",  # of a body that has two bytes
        "Host: [",
    ],
)
def test_odd_headers_are_answered_with_400(head: str) -> None:
    host = "" if head.startswith("Host") else "Host: localhost\r\n"
    request = f"POST / HTTP/1.1\r\n{host}{head}\r\nContent-Type: application/json\r\n\r\n{{}}"
    with running() as server:
        assert say_raw(server, request.encode("utf-8")) == b"HTTP/1.1 400 Bad Request"
        assert say_raw(server, b"GET http://[/ HTTP/1.1\r\nHost: localhost\r\n\r\n") == b"HTTP/1.1 400 Bad Request"
        assert say_raw(server, b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n") == b"HTTP/1.1 411 Length Required"
        too_long = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"
        assert b" 413 " in say_raw(server, too_long)
        assert ask(server, "POST", "/", event("training.status", {"step": 1}))[0] == 204


@pytest.mark.parametrize("width", ["", "119", "4001", "0400000000", "1200000000000000000", "-200", "२००", "1e3"])
def test_a_chart_of_another_size_than_a_page_has_is_not_drawn(width: str) -> None:
    with running() as server:
        ask(server, "POST", "/", event("training.status", {"start_step": 0, "step": 1}))
        assert ask(server, "GET", f"/chart?run=run&width={quote(width)}&height=200")[0] == 400
        assert ask(server, "GET", "/chart?run=run&width=4000&height=120")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b'{"type": "training.status", "id": "1", "data": {"loss": NaN}}',
        b'{"type": "training.status", "id": "1", "data": {"loss": -Infinity}}',
        b'{"type": "training.status", "id": "1", "data": {"loss": ' + b"9" * 5000 + b"}}",
        b'{"type": "training.status", "id": "1", "data": {"details": ' + b"[" * 60 + b"]" * 60 + b"}}",
        "{}".encode("utf-16"),
        WITHOUT_STEP,
        WITHOUT_STEP.replace(b'"pooled"', b'"step": "7", "pooled"'),
        WITHOUT_STEP.replace(b'"pooled"', b'"step": true, "pooled"'),
        WITHOUT_STEP.replace(b'"pooled"', b'"step": null, "pooled"'),
        WITHOUT_STEP.replace(b'"pooled"', b'"step": 99999999999999999999, "pooled"'),
        WITHOUT_STEP.replace(b"training.evaluation", b"validation.score"),
        b'{"type": "lifecycle.stage", "id": "1", "data": {"stage": {"status": "running", "progress": 3}}}',
        b'{"type": "training.status", "id": "1", "title": ["x"], "data": {}}',
        b'{"type": "training.status", "id": "1", "run_name": {}, "data": {}}',
        b'{"type": "training.status", "id": "' + b"1" * 201 + b'", "data": {}}',
        b'{"type": "training.status", "id": "1", "message": "' + b"m" * 50_001 + b'", "data": {}}',
    ],
)
def test_events_that_make_no_sense_are_answered_with_400(body: bytes) -> None:
    with running() as server:
        assert ask(server, "POST", "/", body)[0] == 400
        assert ask(server, "POST", "/", event("training.status", {"start_step": 0, "step": 1}))[0] == 204


def test_whatever_is_posted_leaves_a_page_that_can_be_sent() -> None:
    """Values of sound events exchanged for others: refused, or taken in without harm."""
    rng = random.Random(5)
    sound = [
        event("training.status", {"start_step": 0, "step": 1, "total_steps": 3, "details": {"a": "b"}}),
        event("training.status", {"step": 2, "curve": [[1, 0.5, 1e-4, 2.0]], "regularisation_steps": [1]}),
        event("training.evaluation", {"step": 2, "pooled": 0.5, "reference": None}),
        event("validation.image", {"step": 2, "pictures": [{"image": 0, "prompt": "x"}]}, images=[PNG]),
        event("lifecycle.stage", {"stage": {"key": "a", "status": "running", "progress": {"total": 3}}}),
        event("validation.score", {"step": 2, "metric": "clip", "mean": 3.0}),
    ]
    values: list[Any] = [None, True, -1, 2**70, 0.5, "", "x", "\ud800", [], [1], [[1]], [[1, 2, 3, 4]], {}, {"a": {}}]
    history, num_taken = History(), 0
    for number in range(3000):
        changed = json.loads(json.dumps(rng.choice(sound)))
        place = rng.choice([changed, changed["data"], *(v for v in changed["data"].values() if isinstance(v, dict))])
        if place:
            place[rng.choice(list(place))] = rng.choice(values)
        if isinstance(changed.get("id"), str):
            changed["id"] = str(number)
        try:
            taken, images = read_event(json.dumps(changed).encode())
        except BadEvent:
            continue
        history.add(taken, images)
        num_taken += 1
    json.dumps(history.snapshots()[0], allow_nan=False)
    assert 500 < num_taken < 2900


def test_other_sites_are_kept_out() -> None:
    """A page that the user has open elsewhere can reach this server; browsers mark what it sends."""
    with running() as server:
        good = progress((1, 1.0))
        assert ask(server, "GET", "/", Host="evil.example")[0] == 421
        assert ask(server, "POST", "/", good, Host="evil.example:80")[0] == 421
        assert ask(server, "GET", "/stream", Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(server, "GET", "/monitor.js", Sec_Fetch_Site="same-site")[0] == 403, "another port of this computer"
        assert ask(server, "GET", "/monitor.js", Sec_Fetch_Site="same-origin")[0] == 200
        assert ask(server, "POST", "/", good, Sec_Fetch_Site="cross-site")[0] == 403
        assert ask(server, "POST", "/", good, Content_Type="text/plain")[0] == 415
        assert ask(server, "GET", "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate")[0] == 200
        assert ask(server, "GET", "/", Host=f"localhost:{server.server_port}")[0] == 200
        assert server.history.snapshots()[0] == []


def test_a_token_is_asked_for_by_runs_and_pages() -> None:
    with running(token="s3cret") as server:
        assert ask(server, "POST", "/", progress((1, 1.0)))[0] == 401
        assert ask(server, "POST", "/", progress((1, 1.0)), X_API_Key="wrong")[0] == 401
        assert ask(server, "POST", "/", progress((1, 1.0)), X_API_Key="s3cret")[0] == 204
        assert ask(server, "GET", "/")[0] == 401
        assert ask(server, "GET", "/?token=wrong")[0] == 401
        status, _, headers = ask(server, "GET", "/?token=s3cret")
        assert (status, headers["Location"]) == (303, "/")
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
        assert ask(server, "GET", "/", Cookie=cookie)[0] == 200


def test_sizes_are_limited() -> None:
    with running() as server:
        assert ask(server, "POST", "/", b"{}", Content_Length=str(1 << 40))[0] == 413
    store = ImageStore(max_bytes=100)
    first = store.add(Image("image/png", b"a" * 40), False)
    preview = store.add(Image("image/png", b"b" * 40), True)
    store.add(Image("image/png", b"a" * 40), False)  # the same again takes no room
    last = store.add(Image("image/png", b"c" * 40), False)
    assert [store.get(digest) is not None for digest in (first, preview, last)] == [True, False, True]


def test_nothing_is_loaded_from_elsewhere() -> None:
    with running() as server:
        _, page, headers = ask(server, "GET", "/")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        kept = ("X-Content-Type-Options", "Referrer-Policy", "X-Frame-Options")
        assert [headers[name] for name in kept] == ["nosniff", "no-referrer", "DENY"]
        for path in ("/monitor.js", "/chart.js", "/monitor.css", "/icon.svg"):
            status, text, headers = ask(server, "GET", path)
            assert status == 200
            kinds = {"/monitor.css": "text/css; charset=utf-8", "/icon.svg": "image/svg+xml"}
            assert headers["Content-Type"] == kinds.get(path, headers["Content-Type"])
            page += text
        assert b"https://" not in page
        assert b"innerHTML" not in page


def test_a_listener_for_others_makes_a_token() -> None:
    said: list[str] = []
    server = make_server(None, "0.0.0.0", 0, None, said.append)
    server.server_close()
    assert server.token is not None
    assert len(server.token) > 16
    assert f"?token={server.token}" in said[0]
    assert "0.0.0.0" not in said[0], "nobody can open that"
    assert f'"auth_token": "{server.token}"' in said[1]


def test_a_port_that_is_taken_is_reported() -> None:
    with running() as server, pytest.raises(ConfigError, match="--port"):
        make_server(None, "127.0.0.1", server.server_port, None, print)
    with pytest.raises(ConfigError, match="no folder"):
        make_server(Path("/nowhere/run"), "127.0.0.1", 0, None, print)


def report(sink: Any, folder: Path) -> None:
    """A small run."""
    PilImage.new("RGB", (8, 8), "teal").save(folder / "cat.png")
    cat = events.SavedImage(folder / "cat.png", "cat", "a cat", 8, 8, 1, "live")
    sink.handle(events.PhaseDone("reading the data sets", 1.0))
    sink.handle(events.RunStarted("stars", folder, 10, details={"model": "Tiny"}))
    for step in range(1, 11):
        sink.handle(step_done(step, loss=1.0 / step))
    sink.handle(events.PreviewMade(10, cat, 5, 20, 0.75))
    sink.handle(events.ImagesMade(10, (cat,)))
    sink.handle(events.EvalDone(10, {}, float("nan")))
    sink.handle(events.RunFinished(10, 1.0))
    sink.close()


def test_a_run_without_a_webhook_is_shown_as_one_with(tmp_path: Path) -> None:
    with running() as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        webhooks = Webhooks((Webhook(webhook_type="raw", callback_url=SecretStr(url)),))
        report(WebhookSink(webhooks, tmp_path, run_name="stars"), tmp_path)
        (received,), _ = server.history.snapshots()
    history = History()
    follower = Follower(tmp_path, history)
    follower.read()
    report(JsonlSink(tmp_path), tmp_path)
    follower.read()
    follower.read()
    (followed,), _ = history.snapshots()
    for key in ("curve", "evals", "pictures", "status"):
        assert followed[key] == received[key], key
    assert [line["title"] for line in followed["log"]] == [line["title"] for line in received["log"]]
    assert [row[0] for row in followed["curve"]] == list(range(1, 11))


def test_a_file_that_is_begun_again_is_read_again(tmp_path: Path) -> None:
    history = History()
    follower = Follower(tmp_path, history)
    for _ in range(2):
        report(JsonlSink(tmp_path), tmp_path)
        follower.read()
        (snapshot,), _ = history.snapshots()
        assert len(snapshot["curve"]) == 10
        assert len(snapshot["log"]) == 4


def test_the_chart_is_an_svg_of_the_points_of_a_run_and_of_no_other() -> None:
    """Positions by hand: the plot is 400 - 58 - 14 = 328 pixels wide, and step 2 of 1 to 3 stands in its middle."""
    with running() as server:
        assert ask(server, "POST", "/", progress((1, 1.0), (2, 0.5), (3, 0.25)))[0] == 204
        status, body, headers = ask(server, "GET", "/chart?run=stars&width=400&height=200&log=0")
        assert (status, headers["Content-Type"]) == (200, "image/svg+xml; charset=utf-8")
        lines = [each for each in ElementTree.fromstring(body).iter() if each.tag.endswith("polyline")]
        steps = [[float(point.split(",")[0]) for point in line.get("points", "").split()] for line in lines]
        assert steps == [[58.0, 222.0, 386.0]] * 2, "each step, and smoothed"
        assert ask(server, "GET", "/chart?run=other&width=400&height=200")[:2] == (200, b"")
        of_another_script = "width=%D9%A3%D9%A3%D9%A3&height=200"
        odd = ("width=400", "width=-1&height=5", "width=99999&height=200", "width=4e2&height=200", of_another_script)
        for query in odd:
            assert ask(server, "GET", f"/chart?run=stars&{query}")[0] == 400


def test_on_a_logarithmic_axis_equal_ratios_are_equal_heights() -> None:
    with running() as server:
        ask(server, "POST", "/", progress((1, 1.0), (2, 0.1), (3, 0.01)))
        _, body, _ = ask(server, "GET", "/chart?run=stars&width=400&height=200&log=1")
        line = next(each for each in ElementTree.fromstring(body).iter() if "faint" in each.get("class", ""))
        heights = [float(point.split(",")[1]) for point in line.get("points", "").split()]
        assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)


def test_an_image_that_comes_again_takes_no_more_room_and_previews_give_way_first() -> None:
    store = ImageStore(max_bytes=10)

    def add(data: bytes, is_preview: bool) -> str:
        return store.add(Image("image/png", data), is_preview)

    first, preview = add(b"aaaa", False), add(b"bbbb", True)
    assert add(b"aaaa", False) == first
    assert store.get(preview) is not None  # 8 bytes in all
    third = add(b"cccc", False)
    assert [store.get(each) is not None for each in (first, preview, third)] == [True, False, True]


def test_the_seconds_of_a_run_are_not_those_of_a_step() -> None:
    history = History()
    history.add(event("training.status", {"status": "running", "step": 1, "seconds": 2.0}), [])
    history.add(event("training.status", {"status": "completed", "step": 9, "seconds": 100.0}), [])
    (snapshot,), _ = history.snapshots()
    assert (snapshot["status"]["step"], snapshot["status"]["seconds"]) == (9, 2.0)


def test_a_page_gets_every_patch_until_it_has_missed_one() -> None:
    """A thousand patches are kept."""
    history = History()
    history.add(progress((1, 1.0)), [])
    found = history.wait(0, 0)
    assert found is not None
    assert (len(found[0]), found[1]) == (1, 1)
    for step in range(2, 1002):
        history.add(progress((step, 1.0)), [])
    assert history.wait(0, 0) is None
    found = history.wait(1, 0)
    assert found is not None
    assert (len(found[0]), found[1]) == (1000, 1001)


def test_a_file_that_was_shortened_in_place_is_read_again(tmp_path: Path) -> None:
    path, history = tmp_path / METRICS_FILE, History()
    follower = Follower(tmp_path, history)
    for losses in ([0.5, 0.4, 0.3], [0.75]):
        lines = [json.dumps({"time": 1.0, **to_record(step_done(n, loss=x))}) for n, x in enumerate(losses, start=1)]
        path.write_text("".join(f"{line}\n" for line in lines))
        follower.read()
    (snapshot,), _ = history.snapshots()
    assert [row[:2] for row in snapshot["curve"]] == [[1, 0.75]]


def test_a_page_that_was_closed_makes_room_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_server, "MAX_PAGES", 1)
    with running() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=300)
        connection.request("GET", "/stream")
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: ")
        assert ask(server, "GET", "/stream")[0] == 503
        answer.close()
        connection.close()
        for number in range(100):  # a page that is gone is noticed when there is something to tell it
            server.history.add(progress((number, 1.0)), [])
            if has_room := server.pages.acquire(timeout=0.1):
                break
        assert has_room
