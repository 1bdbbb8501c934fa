"""Whether the Hugging Face hub can be reached, asked before something has to be fetched.

The hub's own library tries six times within half a minute and prints a line for each; without a network that is half a
minute before the first word of use. What was fetched before needs no network and is not asked about.
"""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

CONNECT_SECONDS = 5.0
# A name server may be asleep for a moment: whoever does not answer is asked once more.
PAUSE_SECONDS = 1.0


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub's library raises where network or hub are at fault.

    Its HTTP library is httpx up to version 1 and httpx2 from version 2; errors of a connection are that library's own.
    """
    from huggingface_hub.errors import HfHubHTTPError

    of_connection = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return (HfHubHTTPError, of_connection, OSError)


def why_missing(repository: str, name: str, revision: str | None = None) -> str | None:
    """Why a file is not available now; None where it was fetched before, or the hub answers."""
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repository, name, revision=revision), str):
        return None
    return why_unreachable()


def why_unreachable() -> str | None:
    """Why the hub cannot be reached now; None where it can.

    Where a proxy stands between, only the proxy can know, and None is returned.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    host = address.hostname or ""
    proxies = getproxies()
    if (proxies.get(address.scheme) or proxies.get("all")) and not proxy_bypass(host):
        return None
    port = address.port or (80 if address.scheme == "http" else 443)
    reason = _failure_to_connect(host, port)
    if reason is not None:
        time.sleep(PAUSE_SECONDS)
        reason = _failure_to_connect(host, port)
    return None if reason is None else f"{host} cannot be reached ({reason})"


def _failure_to_connect(host: str, port: int) -> str | None:
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS):
            return None
    except OSError as error:
        return error.strerror or str(error)
