"""A hub for data sets on loopback: the part of the Hugging Face interface that fetching needs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve an empty hub on 127.0.0.1."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class FakeHub(ThreadingHTTPServer):
    """`repos` is (id, revision) -> name -> content; `fetched` the names of the files that were."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[tuple[str, str], dict[str, bytes]] = {}
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that takes this for the hub: huggingface_hub reads its environment once."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "x"}


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, is_head: bool) -> None:
        parts = urlsplit(self.path).path.strip("/").split("/")
        parts = parts[1:] if parts[0] == "api" else parts
        repo = "/".join(parts[1:3])
        verb, revision, rest = (
            (parts[3], unquote(parts[4]), "/".join(parts[5:])) if len(parts) > 4 else ("", "main", "")
        )
        commit = next((key[1] for key in self.server.repos if key[0] == repo and sha(key[1]) == revision), revision)
        files = self.server.repos.get((repo, commit))
        if files is None:
            is_known = any(key[0] == repo for key in self.server.repos)
            code = "RevisionNotFound" if is_known else "RepoNotFound"
            return self._send(404, b"{}", {"X-Error-Code": code}, is_head)
        if verb == "tree":
            tree = [{"type": "file", "path": name, "size": len(data), "oid": sha(name)} for name, data in files.items()]
            return self._send(200, json.dumps(tree).encode(), {}, is_head)
        if verb == "resolve":
            if not is_head:
                self.server.fetched.append(rest)
            headers = {"ETag": f'"{hashlib.sha256(files[rest]).hexdigest()}"', "X-Repo-Commit": sha(commit)}
            return self._send(200, files[rest], headers, is_head)
        info = {"id": repo, "sha": sha(commit), "siblings": [{"rfilename": name} for name in files]}
        return self._send(200, json.dumps(info).encode(), {}, is_head)

    def _send(self, status: int, body: bytes, headers: dict[str, str], is_head: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not is_head:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def sha(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()
