"""A hub of one process: as much of the Hugging Face hub's HTTP API as uploading and loading a model needs."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Repositories in memory: name → branch → path → bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[str] = []
        self.messages: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _missing(self, what: str) -> None:
        self._send(b"{}", 404, {"X-Error-Code": what, "X-Error-Message": what})

    def do_POST(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"POST {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            if name in hub.repositories:
                return self._json({"error": "exists", "url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = {"main": {}}
            return self._json({"url": f"{hub.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        parts = path.removeprefix("/api/models/").split("/")
        name, action, branch = "/".join(parts[:2]), parts[2], "/".join(parts[3:])
        if name not in hub.repositories:
            return self._missing("RepoNotFound")
        if action == "branch":
            if branch in hub.repositories[name]:
                return self._json({"error": "exists"}, 409)
            hub.repositories[name][branch] = {}
            return self._json({})
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    hub.messages.append(entry["value"]["summary"])
                else:
                    content = base64.b64decode(entry["value"]["content"])
                    hub.repositories[name][branch][entry["value"]["path"]] = content
            commit = _commit(hub.repositories[name][branch])
            return self._json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})
        return self._missing("EntryNotFound")

    def do_GET(self) -> None:
        hub, path = self.server, unquote(urlsplit(self.path).path)
        hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            files = _files(hub, "/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
            if files is None:
                return self._missing("RepoNotFound")
            if "tree" in parts:
                entries = [{"type": "file", "path": n, "size": len(c), "oid": _etag(c)} for n, c in files.items()]
                return self._json(entries)
            siblings = [{"rfilename": name} for name in files]
            name = "/".join(parts[2:4])
            return self._json({"id": name, "modelId": name, "sha": _commit(files), "siblings": siblings})
        name, branch, entry = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main", "/".join(parts[4:])
        files = _files(hub, name, branch)
        if files is None:
            return self._missing("RepoNotFound")
        if entry not in files:
            return self._missing("EntryNotFound")
        headers = {"ETag": f'"{_etag(files[entry])}"', "X-Repo-Commit": _commit(files)}
        self._send(files[entry], headers=headers)

    do_HEAD = do_GET


def _files(hub: Hub, name: str, revision: str) -> dict[str, bytes] | None:
    """Of a repository at a branch or commit."""
    branches = hub.repositories.get(name, {})
    return branches.get(revision) or next((f for f in branches.values() if _commit(f) == revision), None)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + content for name, content in sorted(files.items()))).hexdigest()
