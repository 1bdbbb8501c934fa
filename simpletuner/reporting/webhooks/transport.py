"""One request to a service, with a deadline for the whole of it, and what its answer means.

A timeout per read is no deadline: a service that sends a byte a second never exceeds it. Redirects are not followed,
since the token and the images would go to an address that nobody wrote. No text here contains an address.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from simpletuner import __version__
from simpletuner.config.webhooks import Webhook
from simpletuner.reporting.webhooks.encoding import Body

if TYPE_CHECKING:
    import httpx

_MAX_ANSWER_BYTES = 64 << 10
_MAX_RETRY_AFTER = 900.0
# Statuses that say that this message will never be accepted; others may change once somebody fixes the service.
_FINAL = (400, 406, 411, 414, 415, 422, 431)
_REASONS = {
    "ConnectError": "no connection",
    "RemoteProtocolError": "it closed the connection",
    "ReadError": "it closed the connection",
    "WriteError": "it closed the connection",
    "ProxyError": "the proxy refuses",
    "InvalidURL": "its address is no URL",
}


class DeliveryFailed(Exception):
    """The service did not take a message now, and may take it later. The text says why.

    Args:
        retry_after: seconds that the service asks for.
    """

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


class TooLarge(DeliveryFailed):
    """The service takes no message of this size."""


class TooSlow(DeliveryFailed):
    """The answer did not come in time."""


class Refused(Exception):
    """The service will never take this message."""


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
    """A connection to one service; used inside an event loop, as a context manager."""

    def __init__(self, target: Webhook, deadlines: Deadlines):
        import httpx

        self._url, self._deadlines = target.url, deadlines
        token = {"X-API-Key": target.auth_token.get_secret_value()} if target.auth_token else {}
        self._client = httpx.AsyncClient(
            headers={"User-Agent": f"simpletuner/{__version__}", **token},
            # Loading the certificate store takes a while, and http:// needs none.
            verify=not target.ssl_no_verify and self._url.lower().startswith("https"),
            timeout=httpx.Timeout(deadlines.read, connect=deadlines.connect),
            limits=httpx.Limits(max_connections=1),
        )
        addresses = [self._url]
        with contextlib.suppress(httpx.InvalidURL):  # `post` reports it
            addresses.append(str(httpx.URL(self._url)))
        self._log_filter = _HidesAddresses(*addresses)

    async def __aenter__(self) -> Transport:
        logging.getLogger("httpx").addFilter(self._log_filter)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        logging.getLogger("httpx").removeFilter(self._log_filter)
        await self._client.aclose()

    async def post(self, body: Body, message_id: str) -> None:
        """Deliver a body.

        Raises:
            DeliveryFailed: for whatever a network or a service can do.
            Refused: the service will never take it.
        """
        import httpx

        request: dict[str, Any] = {"headers": {"X-Event-Id": message_id}, "content": body.content}
        if body.files:
            files = [(f"files[{i}]", (each.name, each.data, each.media_type)) for i, each in enumerate(body.files)]
            request |= {"content": None, "data": {"payload_json": body.content.decode()}, "files": files}
        else:
            request["headers"]["Content-Type"] = "application/json"
        deadline = self._deadlines.of(body)
        try:
            async with (
                asyncio.timeout(deadline),
                self._client.stream("POST", self._url, **request) as response,
            ):
                # Read the answer, so that the connection can be used again; an endless answer costs the connection.
                num_bytes = 0
                async for chunk in response.aiter_raw():
                    num_bytes += len(chunk)
                    if num_bytes > _MAX_ANSWER_BYTES:
                        break
        except TimeoutError:
            raise TooSlow(f"no complete answer within {deadline:.0f} s") from None
        except httpx.ConnectTimeout:
            raise DeliveryFailed(f"no connection within {self._deadlines.connect:g} s") from None
        except httpx.TimeoutException:
            raise TooSlow(f"no answer for {self._deadlines.read:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise DeliveryFailed(_reason_of(error)) from None
        require_delivered(response)


def require_delivered(response: httpx.Response) -> None:
    """Raise what a status means; nothing for a success."""
    status = response.status_code
    if response.is_success:
        return
    if status == 413:
        raise TooLarge("it takes no message of this size (413)")
    if 300 <= status < 400:
        raise DeliveryFailed(f"it redirects ({status}), which is not followed: configure the new address")
    if status in _FINAL:
        raise Refused(f"it does not accept this message ({status})")
    raise DeliveryFailed(f"it answers {status}", retry_after(response.headers.get("Retry-After")))


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
    return min(max(0.0, seconds), _MAX_RETRY_AFTER)  # in this order NaN becomes 0


def _reason_of(error: Exception) -> str:
    """The exception's own text may contain the address."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "its certificate is not trusted (ssl_no_verify accepts any)"
    return _REASONS.get(type(error).__name__, type(error).__name__)


class _HidesAddresses(logging.Filter):
    """httpx logs each request with its URL, which for a webhook is a secret."""

    def __init__(self, *addresses: str):
        super().__init__()
        self._addresses = addresses

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(address in record.getMessage() for address in self._addresses)
