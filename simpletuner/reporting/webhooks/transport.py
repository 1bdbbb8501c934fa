"""One request to a service, with a deadline for the whole of it, and what its answer means.

A timeout per read is no deadline: a service that drips a byte a second never lets it run out. Redirects are not
followed, since token and images would go where nobody meant them to. No text here holds an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

from simpletuner import __version__
from simpletuner.config.webhooks import Webhook
from simpletuner.reporting.webhooks.encoding import Body

if TYPE_CHECKING:
    import httpx

Outcome = Literal["delivered", "retry", "too large", "too slow", "refused"]

_MAX_ANSWER_BYTES = 64 << 10
_MAX_RETRY_AFTER = 900.0
# Statuses that say that this message will never be taken; others may be fixed by the service or its owner.
_NEVER = (400, 406, 411, 414, 415, 422, 431)


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Args:
        outcome: `retry`: the service is at fault, not the message.
        reason: words for people, without the address.
        retry_after: seconds that the service asks for.
    """

    outcome: Outcome
    reason: str = ""
    retry_after: float | None = None


@dataclass(frozen=True)
class Deadlines:
    """Seconds: to connect, between two bytes, and for a whole request (a second more for each 256 KiB of it)."""

    connect: float = 5.0
    read: float = 10.0
    total: float = 15.0

    def of(self, body: Body) -> float:
        num_bytes = len(body.content) + sum(len(file.data) for file in body.files)
        return self.total + num_bytes / (256 << 10)


class Transport:
    """A connection to one service; used inside an event loop."""

    def __init__(self, target: Webhook, deadlines: Deadlines):
        import httpx

        self._url = target.url
        self._deadlines = deadlines
        headers = {"User-Agent": f"simpletuner/{__version__}"}
        if target.auth_token:
            headers["X-API-Key"] = target.auth_token.get_secret_value()
        self._client = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,
            # Reading the certificates of the world takes a while, and http:// needs none.
            verify=not target.ssl_no_verify and self._url.startswith("https"),
            timeout=httpx.Timeout(deadlines.read, connect=deadlines.connect),
            limits=httpx.Limits(max_connections=1),
        )
        addresses = [self._url]
        with contextlib.suppress(httpx.InvalidURL):  # `post` tells of it
            addresses.append(str(httpx.URL(self._url)))
        self._log_filter = _HidesAddresses(*addresses)
        logging.getLogger("httpx").addFilter(self._log_filter)

    async def post(self, body: Body, message_id: str) -> Reply:
        """Send a body. Never raises for what a network or a service can do."""
        import httpx

        headers = {"X-Event-Id": message_id}
        content: dict[str, Any] = {"content": body.content}
        if body.files:
            files = [
                (f"files[{index}]", (file.name, file.data, file.media_type)) for index, file in enumerate(body.files)
            ]
            content = {"data": {"payload_json": body.content.decode()}, "files": files}
        else:
            headers["Content-Type"] = "application/json"
        deadline = self._deadlines.of(body)
        try:
            async with (
                asyncio.timeout(deadline),
                self._client.stream("POST", self._url, headers=headers, **content) as response,
            ):
                await _read_some(response)
                return reply_to(response)
        except TimeoutError:
            return Reply("too slow", f"no whole answer within {deadline:.0f} s")
        except httpx.ConnectTimeout:
            return Reply("retry", f"no connection within {self._deadlines.connect:g} s")
        except httpx.TimeoutException:
            return Reply("too slow", f"no answer for {self._deadlines.read:g} s")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return Reply("retry", _words(error))

    async def close(self) -> None:
        logging.getLogger("httpx").removeFilter(self._log_filter)
        await self._client.aclose()


async def _read_some(response: httpx.Response) -> None:
    """Read the answer, so that the connection can be used again; an answer without end costs the connection."""
    num_bytes = 0
    async for chunk in response.aiter_raw():
        num_bytes += len(chunk)
        if num_bytes > _MAX_ANSWER_BYTES:
            return


def reply_to(response: httpx.Response) -> Reply:
    """What a status means."""
    status = response.status_code
    if response.is_success:
        return Reply("delivered")
    if status == 413:
        return Reply("too large", "it takes no message of this size (413)")
    if response.is_redirect or 300 <= status < 400:
        return Reply("retry", f"it redirects ({status}), which is not followed: write the new address")
    if status in _NEVER:
        return Reply("refused", f"it does not accept this message ({status})")
    return Reply("retry", f"it answers {status}", retry_after(response.headers.get("Retry-After")))


def retry_after(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number, or a date; at most a quarter of an hour."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _MAX_RETRY_AFTER)  # NaN becomes 0


def _words(error: Exception) -> str:
    """A failure in words; the exception's own text may hold the address."""
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its certificate is not trusted (ssl_no_verify accepts any)"
    known = {
        "ConnectError": "no connection",
        "RemoteProtocolError": "it broke off",
        "ReadError": "it broke off",
        "WriteError": "it broke off",
        "ProxyError": "the proxy refuses",
        "InvalidURL": "its address is no URL",
    }
    return known.get(type(error).__name__, type(error).__name__)


class _HidesAddresses(logging.Filter):
    """httpx logs each request with its URL, which for a webhook is a secret."""

    def __init__(self, *addresses: str):
        super().__init__()
        self._addresses = addresses

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(address in record.getMessage() for address in self._addresses)
