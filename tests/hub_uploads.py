"""A hub on loopback that takes uploads: the part of the Hugging Face interface that `HfApi.upload_folder` uses."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

TOKEN = "hf_canaryTokenThatNobodyMaySee"


@dataclass
class FakeRepo:
    """What was committed: files of the newest state, the commits in order, tags, and the number of commits at each."""

    is_private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    tagged: dict[str, int] = field(default_factory=dict)


class UploadHub(ThreadingHTTPServer):
    """`answers` are statuses that the next commits get in place of success; `delay` seconds before each commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, FakeRepo] = {}
        self.blobs: dict[str, bytes] = {}
        self.answers: list[int] = []
        self.role = "write"
        self.accepts_token = True
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def upload_hub() -> Iterator[UploadHub]:
    """Serve an empty hub on 127.0.0.1."""
    server = UploadHub()
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # seconds until it sees the end
    thread.start()
    try:
        yield server
    finally:
        server.gate.set()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: UploadHub

    def do_GET(self) -> None:
        self._read()
        if self._path == "/api/whoami-v2":
            self._whoami()
        elif self._path.endswith("/tree/main"):
            files = self.server.repos[self._path[12 : -len("/tree/main")]].files
            listed = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            self._send(200, listed)
        elif self._path.startswith("/api/models/") and (repo := self.server.repos.get(self._path[12:])):
            self._send(200, {"id": self._path[12:], "private": repo.is_private, "tags": [], "siblings": []})
        else:
            self._send(404, {"error": "not found"})

    def do_PUT(self) -> None:
        body = self._read()
        self.server.blobs[self._path.removeprefix("/blob/")] = body
        self._send(200, {})

    def do_POST(self) -> None:
        body = self._read()
        parts = self._path.strip("/").split("/")
        if self._path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif self._path == "/api/repos/create":
            self._create(json.loads(body))
        elif self._path.endswith("/info/lfs/objects/batch"):
            self._lfs(json.loads(body))
        elif "preupload" in parts:
            self._preupload(json.loads(body))
        elif "commit" in parts:
            self._commit("/".join(parts[2:4]), body)
        elif "tag" in parts:
            self._tag(self.server.repos["/".join(parts[2:4])], json.loads(body)["tag"])
        else:
            self._send(404, {"error": f"unknown: {self._path}"})

    def do_DELETE(self) -> None:
        self._read()
        parts = self._path.strip("/").split("/")
        repo = self.server.repos["/".join(parts[2:4])]
        if "tag" in parts and parts[-1] in repo.tagged:
            repo.tags.remove(parts[-1])
            del repo.tagged[parts[-1]]
            self._send(200, {})
        else:
            self._send(404, {"error": f"unknown: {self._path}"})

    def _tag(self, repo: FakeRepo, tag: str) -> None:
        """As the real Hub: a tag that is there is not moved."""
        if tag in repo.tagged:
            self._send(409, {"error": "Tag reference exists already"})
            return
        repo.tags.append(tag)
        repo.tagged[tag] = len(repo.commits)
        self._send(200, {})

    @property
    def _path(self) -> str:
        return urlsplit(self.path).path

    def _read(self) -> bytes:
        self.server.asked.append(f"{self.command} {self._path}")
        length = self.headers.get("Content-Length")
        if length is not None:
            return self.rfile.read(int(length))
        body = b""
        while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def _whoami(self) -> None:
        if not self.server.accepts_token or self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid user token."})
            return
        token = {"displayName": "test", "role": self.server.role}
        orgs = [{"name": "house", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        self._send(200, {"type": "user", "name": "me", "orgs": orgs, "auth": {"accessToken": token}})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        is_known = name in self.server.repos
        is_private = request.get("private") or request.get("visibility") == "private"
        self.server.repos.setdefault(name, FakeRepo(bool(is_private)))
        self._send(409 if is_known else 200, {"url": f"{self.server.url}/{name}"})

    def _preupload(self, request: dict[str, Any]) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in request["files"]
        ]
        self._send(200, {"files": modes})

    def _lfs(self, request: dict[str, Any]) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "authenticated": True,
                "actions": {"upload": {"href": f"{self.server.url}/blob/{each['oid']}"}},
            }
            for each in request["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repo_id: str, body: bytes) -> None:
        self.server.gate.wait(30)
        if self.server.answers and (status := self.server.answers.pop(0)) != 200:
            self._send(status, {"error": "no"})
            return
        repo, names, summary = self.server.repos[repo_id], [], ""
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
                names.append(value["path"])
            elif entry["key"] == "deletedFile":
                del repo.files[value["path"]]
            elif entry["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.blobs[value["oid"]]
                names.append(value["path"])
        repo.commits.append((summary, tuple(sorted(names))))
        url = f"{self.server.url}/{repo_id}/commit/abc"
        self._send(200, {"success": True, "commitOid": "abc", "commitUrl": url, "hookOutput": ""})

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass
