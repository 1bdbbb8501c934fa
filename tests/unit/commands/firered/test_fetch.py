"""Fetching images: public addresses only, however they are written, bounded in size and time."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from simpletuner.commands.firered import fetch as fetching
from simpletuner.commands.firered.fetch import FetchError, fetch, is_url, public_address


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1"),
        *("::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "224.0.0.1", "2130706433", "0x7f.1"),
    ],
)
def test_addresses_inside_of_a_network_are_refused(host: str) -> None:
    with pytest.raises((FetchError, OSError)) as caught:
        public_address(host, 80)
    assert isinstance(caught.value, socket.gaierror) or "not a public address" in str(caught.value)


def test_a_public_address_is_taken_and_one_of_several_that_is_not_refuses_all(monkeypatch) -> None:
    answers = {"good": ["93.184.216.34"], "mixed": ["93.184.216.34", "10.0.0.7"]}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, type: [(2, 1, 6, "", (each, port)) for each in answers[host]]
    )
    assert public_address("good", 80) == "93.184.216.34"
    with pytest.raises(FetchError, match=r"10\.0\.0\.7"):
        public_address("mixed", 80)


def test_what_an_address_is() -> None:
    assert is_url("https://example.org/a.png")
    assert is_url("HTTP://example.org/a.png")
    assert not any(map(is_url, ("/data/a.png", "http.png", "file:///etc/passwd", "https:/a")))


class Handler(BaseHTTPRequestHandler):
    release = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", self.server.where)  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200 if self.path != "/gone" else 404)
        if self.path == "/short":
            self.send_header("Content-Length", "100")
        self.end_headers()
        if self.path == "/large":
            self.wfile.write(b"x" * 5000)
        elif self.path == "/slow":
            self.wfile.write(b"x")
            self.wfile.flush()
            self.release.wait(10)
        else:
            self.wfile.write(b"image")

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as started:
        threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        monkeypatch.setattr(fetching, "public_address", lambda host, port: "127.0.0.1")
        started.where = "http://example.org/image.png"
        Handler.release.clear()
        yield started
        Handler.release.set()
        started.shutdown()


def address(server, path: str) -> str:
    return f"http://example.org:{server.server_port}{path}"


def test_an_image_is_written_whole(server, tmp_path: Path) -> None:
    fetch(address(server, "/image.png"), tmp_path / "images/a.png")
    assert (tmp_path / "images/a.png").read_bytes() == b"image"


@pytest.mark.parametrize(
    ("path", "limits", "words"),
    [
        ("/gone", {}, "answers 404"),
        ("/large", {"MAX_BYTES": 1000}, "more than 0 MiB"),
        ("/slow", {"MAX_SECONDS": 0.3}, "takes more than 0.3 seconds"),
        ("/short", {}, "ends 95 bytes too soon"),
    ],
)
def test_what_is_no_image_leaves_nothing(server, tmp_path: Path, monkeypatch, path, limits, words) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(fetching, name, value)
    with pytest.raises(FetchError, match=words):
        fetch(address(server, path), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://example.org/a", "http://10.0.0.1/a"])
def test_a_redirection_is_held_to_the_same_rules(server, tmp_path: Path, monkeypatch, where: str) -> None:
    known = {"example.org": "127.0.0.1"}
    monkeypatch.setattr(fetching, "public_address", lambda host, port: known.get(host) or public_address(host, port))
    server.where = where
    with pytest.raises(FetchError, match=r"not an http or https URL|not a public address"):
        fetch(address(server, "/moved"), tmp_path / "a.png")


def test_redirections_end(server, tmp_path: Path) -> None:
    server.where = address(server, "/moved")
    with pytest.raises(FetchError, match="redirects more than 3 times"):
        fetch(address(server, "/moved"), tmp_path / "a.png")


def test_a_login_in_an_address_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"ftp://example\.org/a\.png: it is not") as caught:
        fetch("ftp://me:secret@example.org/a.png", tmp_path / "a.png")
    assert "secret" not in str(caught.value)
