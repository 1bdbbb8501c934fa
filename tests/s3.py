"""A real S3 server on loopback, in this process, for tests of buckets."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LOGIN = {"aws_access_key_id": "someone", "aws_secret_access_key": "very-secret-words"}


class S3(NamedTuple):
    """An address, and a client of another library than the one under test."""

    url: str
    client: Any
    requests: list[tuple[str, str]]

    def upload(self, folder: Path, bucket: str, prefix: str = "") -> None:
        """Every file below `folder`, by relative path."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.put_object(
                    Bucket=bucket, Key=prefix + str(path.relative_to(folder)), Body=path.read_bytes()
                )

    def fetched(self) -> list[str]:
        """Paths of the objects that were read, and forget them."""
        paths = [path for method, path in self.requests if method == "GET" and "?" not in path]
        self.requests.clear()
        return paths


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[S3]:
    """Serve empty buckets on 127.0.0.1; remembers (method, path with query) of each request."""
    import boto3
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    requests: list[tuple[str, str]] = []
    log = WSGIRequestHandler.log_request
    WSGIRequestHandler.log_request = lambda self, *_: requests.append((self.command, self.path))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        url = f"http://{host}:{port}"
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **LOGIN)
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        requests.clear()
        yield S3(url, client, requests)
    finally:
        server.stop()
        WSGIRequestHandler.log_request = log
