"""A real HTTP server that receives webhooks and can misbehave in every way that services do."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Behavior = str  # ok, refuses, hangs, drips, or a status: 500, 429, 413, 302, ...


class Receiver:
    """Received requests and what the server answers.

    Attributes:
        behavior: `ok`, `hangs`, `drips`, or a status as text.
        requests: bodies of all requests that came whole, in order; (headers, body).
        accepted: the events (raw) that were answered with 204, in order.
    """

    def __init__(self, behavior: Behavior = "ok"):
        self.behavior = behavior
        self.headers: dict[str, str] = {}
        self.max_body = 1 << 40
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.accepted: list[dict[str, Any]] = []
        self.accepted_bodies: list[bytes] = []
        self.tries: list[float] = []
        self.is_over = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                receiver.answer(self)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients break off on purpose
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hook"

    @property
    def accepted_once(self) -> list[dict[str, Any]]:
        """`accepted`, without what came again because its sender no longer waited for the answer."""
        return list({event["id"]: event for event in self.accepted}.values())

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.tries.append(time.monotonic())
        behavior = self.behavior
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        self.requests.append((dict(handler.headers), body))
        if behavior == "hangs":
            self.is_over.wait(60)
            return
        if behavior == "drips":
            self.drip(handler.connection)
            return
        status = 413 if len(body) > self.max_body else 204 if behavior == "ok" else int(behavior)
        if status == 204:
            self.accepted_bodies.append(body)
            if handler.headers["Content-Type"] == "application/json":
                self.accepted.append(json.loads(body))
        handler.send_response(status)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        if status != 204:
            handler.send_header("Content-Length", "0")
        handler.end_headers()

    def drip(self, connection: socket.socket) -> None:
        """A byte now and then: no read ever times out."""
        for byte in b"HTTP/1.1 204 No Content\r\nX-Pad: " + b"x" * 10_000:
            if self.is_over.wait(0.05):
                return
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return

    def close(self) -> None:
        self.is_over.set()
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def receiver(behavior: Behavior = "ok") -> Iterator[Receiver]:
    """A running receiver."""
    server = Receiver(behavior)
    try:
        yield server
    finally:
        server.close()


def wait_until(condition: Any, seconds: float = 240.0) -> None:
    """Wait for a condition; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
