"""`simpletuner monitor`: a page on this machine that shows runs live."""

from __future__ import annotations

import re
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner.errors import ConfigError, Problem
from simpletuner.reporting.monitor.following import Follower
from simpletuner.reporting.monitor.history import History
from simpletuner.reporting.monitor.server import LOOPBACK, MonitorServer
from simpletuner.reporting.sinks.jsonl import METRICS_FILE

DEFAULT_PORT = 8642


def monitor(
    output_dir: Path | None,
    host: str,
    port: int,
    token: str | None,
    say: Callable[[str], None],
    until_eof: bool = False,
) -> None:
    """Serve until Ctrl-C.

    Args:
        output_dir: follow this run's `metrics.jsonl`, for a run that has no webhook.
        until_eof: end when stdin does, too: the program that started this one is gone then.
        token: what senders and pages must show; made where others can reach the server and none is given.

    Raises:
        ConfigError: there is no such run, the port is taken, or the token cannot stand in a header.
    """
    server = make_server(output_dir, host, port, token, say)
    if until_eof:
        threading.Thread(target=_end_with_stdin, args=(server,), name="stdin", daemon=True).start()
    else:
        say("Ctrl-C ends it")
    try:
        server.serve_forever(poll_interval=0.2)
    except KeyboardInterrupt:
        say("")
    finally:
        server.is_over.set()
        server.server_close()


@contextmanager
def monitor_beside(output_dir: Path, port: int = DEFAULT_PORT) -> Iterator[None]:
    """A monitor of a run in a process of its own, which says its address and ends with the context.

    It follows the files of `output_dir`, so it costs training nothing, and it ends when its stdin does: with this
    process, however that ends.

    Args:
        port: any free one is taken where this one is in use.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    free = port if _is_free(port) else 0
    command = [
        sys.executable,
        "-P",
        "-m",
        "simpletuner",
        "monitor",
        str(output_dir),
        "--port",
        str(free),
        "--until-eof",
    ]
    # A session of its own: Ctrl-C in the terminal is for the run, whose last images and numbers it still shows.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def make_server(
    output_dir: Path | None, host: str, port: int, token: str | None, say: Callable[[str], None]
) -> MonitorServer:
    """A server that listens, and whose address has been said."""
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]{1,200}", token):
        raise ConfigError(
            Problem("contains characters that a URL cannot contain", "--token", allowed="A-Z a-z 0-9 . _ ~ -")
        )
    if output_dir is not None and not output_dir.is_dir():
        raise ConfigError(Problem(f'"{output_dir}": there is no folder of this name', "OUTPUT_DIR"))
    if token is None and host not in LOOPBACK:
        token = secrets.token_urlsafe(16)
    history = History()
    try:
        server = MonitorServer(host, port, history, token)
    except OSError as error:
        fix = "choose another with --port, or --port 0 for any that is free"
        raise ConfigError(Problem(f"cannot listen on {host}:{port}: {error.strerror}", "--port", fix=fix)) from None
    shown = f"http://{shown_host(host)}:{server.server_port}/"
    say(f"open {shown}{f'?token={token}' if token else ''}")
    if output_dir is None:
        key = f', "auth_token": "{token}"' if token else ""
        say(f'in config.json: "webhook_config": {{"webhook_type": "raw", "callback_url": "{shown}"{key}}}')
    else:
        say(f"following {output_dir / METRICS_FILE}")
        follower = Follower(output_dir.absolute(), history)
        threading.Thread(target=follower.follow, args=(server.is_over,), name="follower", daemon=True).start()
    return server


def _end_with_stdin(server: MonitorServer) -> None:
    sys.stdin.buffer.read()
    server.shutdown()


def shown_host(host: str) -> str:
    """What other machines call this one, where it listens on all of its addresses: 0.0.0.0 is no address to open."""
    if host in LOOPBACK:
        return "localhost"
    if host not in ("0.0.0.0", "::", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: the system only chooses the way (an address of RFC 5737)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
