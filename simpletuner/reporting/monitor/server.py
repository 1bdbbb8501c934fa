"""The monitor's HTTP server: takes events, serves the page, and streams what changes to it.

It listens on this machine only, unless --host says otherwise, and then asks for a token. A page of another site that
the user has open can reach a server on this machine too; so the Host header must be ours, and what a browser sends
for another site is refused.
"""

from __future__ import annotations

import hmac
import json
import mimetypes
import re
import threading
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from simpletuner.errors import bytes_text
from simpletuner.reporting.charts import chart, loss_series
from simpletuner.reporting.monitor.history import History, Patch
from simpletuner.reporting.monitor.reading import BadEvent, read_event

MAX_BODY_BYTES = 32 << 20
MAX_PAGES = 32
MAX_DIGITS = 20
MIN_SIDE, MAX_SIDE = 120, 4000
LOOPBACK = ("127.0.0.1", "localhost", "::1")
_COOKIE = "simpletuner_monitor"
_FILES = {"/": "page.html"} | {f"/{name}": name for name in ("monitor.css", "monitor.js", "chart.js", "icon.svg")}
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'"
_HEARTBEAT_SECONDS = 10.0


class MonitorServer(ThreadingHTTPServer):
    """A thread for each request.

    Args:
        token: what senders and pages must show; None: nothing.

    Raises:
        OSError: the port is taken, or the host is not this machine's.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, history: History, token: str | None = None):
        super().__init__((host, port), MonitorHandler)
        self.history, self.token = history, token
        self.names = {host.lower(), *(LOOPBACK if host in LOOPBACK else ())}
        self.checks_host = host in LOOPBACK
        self.pages = threading.Semaphore(MAX_PAGES)
        self.is_over = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle is no fault; anything else is shown as it is."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class MonitorHandler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: MonitorServer
    server_version, sys_version = "simpletuner", ""
    timeout = 30

    def do_GET(self) -> None:
        try:
            url = urlsplit(self.path)
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "this is not a valid address")
            return
        if not self._is_for_us():
            return
        if token := parse_qs(url.query).get("token"):
            self._remember(token[0])
        elif not self._shows_token():
            self._refuse(HTTPStatus.UNAUTHORIZED, "open the address that the monitor printed, with its token")
        elif url.path == "/stream":
            self._stream()
        elif url.path == "/chart":
            self._chart(parse_qs(url.query))
        elif url.path.startswith("/pictures/"):
            self._image(url.path.removeprefix("/pictures/"))
        elif url.path in _FILES:
            self._file(_FILES[url.path])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._is_for_us():
            return
        if not self._shows_token():
            self._refuse(HTTPStatus.UNAUTHORIZED, "X-API-Key is not the monitor's token")
        elif not length:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        elif not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.BAD_REQUEST, "Content-Length is not a number")
        elif len(length) > MAX_DIGITS or int(length) > MAX_BODY_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {bytes_text(MAX_BODY_BYTES)}")
        elif self.headers.get_content_type() != "application/json":
            # A form or a plain text could be sent by any web page without asking.
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "application/json is what is understood")
        else:
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                self._refuse(HTTPStatus.BAD_REQUEST, "the body is shorter than Content-Length says")
            else:
                self._take(body)

    def _take(self, body: bytes) -> None:
        try:
            event, images = read_event(body)
        except BadEvent as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self.server.history.add(event, images)
        self._answer(HTTPStatus.NO_CONTENT)

    def _is_for_us(self) -> bool:
        """Whether the request was meant for this server; answers it where it was not."""
        host = self.headers.get("Host", "")
        try:
            name = (urlsplit(f"//{host}").hostname or "") if host.isprintable() else ""
        except ValueError:
            self._refuse(HTTPStatus.BAD_REQUEST, "Host is not a host name")
            return False
        if self.server.checks_host and name.lower() not in self.server.names:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this is not the host that you asked for")
            return False
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            # A link on another site may open the page; nothing else of it comes through.
            is_link = self.command == "GET" and self.headers.get("Sec-Fetch-Mode") == "navigate"
            if not is_link:
                self._refuse(HTTPStatus.FORBIDDEN, "another site asked for this")
            return is_link
        return True

    def _shows_token(self) -> bool:
        if self.server.token is None:
            return True
        shown = [self.headers.get("X-API-Key", ""), self._cookie()]
        return any(hmac.compare_digest(text.encode(), self.server.token.encode()) for text in shown)

    def _cookie(self) -> str:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return ""
        return cookie[_COOKIE].value if _COOKIE in cookie else ""

    def _remember(self, token: str) -> None:
        """Move a token from the address into a cookie, so that it stands in no history and no screenshot."""
        if self.server.token is not None and not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.UNAUTHORIZED, "this is not the monitor's token")
            return
        cookie = {"Set-Cookie": f"{_COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"} if self.server.token else {}
        self._answer(HTTPStatus.SEE_OTHER, headers={"Location": "/", **cookie})

    def _file(self, name: str) -> None:
        data = (resources.files("simpletuner.reporting.monitor") / "static" / name).read_bytes()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        kind = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
        self._answer(HTTPStatus.OK, data, kind, {"Cache-Control": "no-cache"})

    def _image(self, digest: str) -> None:
        image = self.server.history.image(digest)
        if image is None:
            self._refuse(HTTPStatus.NOT_FOUND, "this image is no longer kept")
        else:
            self._answer(HTTPStatus.OK, image.data, image.media_type, {"Cache-Control": "private, max-age=86400"})

    def _chart(self, question: dict[str, list[str]]) -> None:
        """The loss chart of a run as SVG; empty where it has no points."""
        given = {key: values[0] for key, values in question.items()}
        sides = [given.get("width", ""), given.get("height", "")]
        if not all(re.fullmatch("[0-9]{3,4}", side) and MIN_SIDE <= int(side) <= MAX_SIDE for side in sides):
            self._refuse(HTTPStatus.BAD_REQUEST, f"width and height are {MIN_SIDE} to {MAX_SIDE} pixels")
            return
        series = loss_series(*self.server.history.losses(given.get("run", "")))
        svg = chart("loss", series, size=(int(sides[0]), int(sides[1])), is_log=given.get("log") == "1")
        self._answer(HTTPStatus.OK, svg.encode(), "image/svg+xml; charset=utf-8", {"Cache-Control": "no-store"})

    def _stream(self) -> None:
        """Server-sent events: the whole state first, then what changes."""
        if not self.server.pages.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_PAGES} pages are open already")
            return
        try:
            self.send_response(HTTPStatus.OK)
            self._send_headers("text/event-stream; charset=utf-8", {"Cache-Control": "no-store", "Connection": "close"})
            self.close_connection = True
            self._send_changes()
        finally:
            self.server.pages.release()

    def _send_changes(self) -> None:
        snapshots, position = self.server.history.snapshots()
        self._send_patches([{"runs": len(snapshots), "reset": True}, *snapshots])
        while not self.server.is_over.is_set():
            news = self.server.history.wait(position, _HEARTBEAT_SECONDS)
            if news is None:  # too slow: the page comes back, and begins with the whole state
                return
            patches, position = news
            if patches:
                self._send_patches(patches)
            else:
                self.wfile.write(b": still here\n\n")
            self.wfile.flush()

    def _send_patches(self, patches: list[Patch]) -> None:
        self.wfile.write(f"data: {json.dumps(patches)}\n\n".encode())
        self.wfile.flush()

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # a body may stand in the way of the next request
        self._answer(status, f"{text}\n".encode(), "text/plain; charset=utf-8", {"Connection": "close"})

    def _answer(
        self, status: HTTPStatus, body: bytes = b"", kind: str = "", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self._send_headers(kind, {**(headers or {}), "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _send_headers(self, kind: str, headers: dict[str, str]) -> None:
        fixed = {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
        }
        for name, value in {**fixed, **({"Content-Type": kind} if kind else {}), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: addresses may hold a token."""
