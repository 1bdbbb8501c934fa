"""Fetching an image from an address, for tables that name images so: public addresses only, bounded in size and time.

A table may come from a stranger, and what it names is asked for by this machine: an address inside of its network must
not be. So the name is resolved here, every address of it has to be public, and the connection goes to that address.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from pathlib import Path
from urllib.parse import urljoin, urlsplit

from simpletuner import storage
from simpletuner.errors import bytes_text
from simpletuner.text import without_login

SCHEMES = ("http", "https")
MAX_BYTES = 64 * 2**20
MAX_SECONDS = 60.0
MAX_REDIRECTS = 3
_CHUNK = 2**16


class FetchError(Exception):
    """Why an image cannot be fetched; a login in its address is not shown."""

    def __init__(self, reason: str):
        super().__init__(without_login(reason))


def is_url(text: str) -> bool:
    """Whether a text is an address of the web."""
    return text.partition("://")[0].lower() in SCHEMES and "://" in text


def fetch(url: str, path: Path) -> None:
    """Write what an address gives to `path`, whole or not at all.

    Raises:
        FetchError: it is not public, answers with something else than a file, is too large or takes too long.
        DataError: the disk cannot take it.
    """
    deadline = time.monotonic() + MAX_SECONDS
    for _ in range(1 + MAX_REDIRECTS):
        try:
            data, moved_to = _get(url, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise FetchError(f"{url}: {str(error) or type(error).__name__}") from error
        if moved_to is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(path, data)
            return
        url = urljoin(url, moved_to)
    raise FetchError(f"{url}: it redirects more than {MAX_REDIRECTS} times")


def _get(url: str, deadline: float) -> tuple[bytes, str | None]:
    """(content, None), or (nothing, where it is instead)."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        raise FetchError(f"{url}: it is not an http or https URL")
    connection = _connection(parts.scheme, parts.hostname, parts.port, deadline)
    opened = connection.sock
    # A server that sends a byte now and then would otherwise hold this program as long as it likes.
    alarm = threading.Timer(max(deadline - time.monotonic(), 0), _shut, [opened])
    alarm.start()
    try:
        query = f"?{parts.query}" if parts.query else ""
        connection.request("GET", (parts.path or "/") + query, headers={"User-Agent": "simpletuner"})
        answer = connection.getresponse()
        if answer.status in (301, 302, 303, 307, 308) and answer.headers.get("Location"):
            return b"", answer.headers["Location"]
        if answer.status != 200:
            raise FetchError(f"{url}: the server answers {answer.status} {answer.reason}")
        return _read(url, answer, deadline), None
    finally:
        alarm.cancel()
        connection.close()
        if time.monotonic() > deadline:
            raise FetchError(f"{url}: it takes more than {MAX_SECONDS:g} seconds")


def _read(url: str, answer: http.client.HTTPResponse, deadline: float) -> bytes:
    content = bytearray()
    while chunk := answer.read1(_CHUNK):
        content += chunk
        if len(content) > MAX_BYTES:
            raise FetchError(f"{url}: it has more than {MAX_BYTES >> 20} MiB")
    if answer.length:
        raise FetchError(f"{url}: it ends {bytes_text(answer.length)} too soon")
    return bytes(content)


def _shut(opened: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        opened.shutdown(socket.SHUT_RDWR)


def _connection(scheme: str, host: str, port: int | None, deadline: float) -> http.client.HTTPConnection:
    """A connection to a public address of `host`."""
    port = port or (443 if scheme == "https" else 80)
    address = public_address(host, port)
    left = max(deadline - time.monotonic(), 0.001)
    opened = socket.create_connection((address, port), timeout=left)
    if scheme == "https":
        opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host)
    connection = http.client.HTTPConnection(host, port, timeout=left)
    connection.sock = opened
    return connection


def public_address(host: str, port: int) -> str:
    """The address that `host` has.

    Raises:
        FetchError: one of its addresses is not public, or it has none.
    """
    found = list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        inner = getattr(address, "ipv4_mapped", None) or address
        if not inner.is_global or inner.is_multicast:
            raise FetchError(f"{host} is {text}, which is not a public address")
    if not found:
        raise FetchError(f"{host} has no address")
    return found[0]
