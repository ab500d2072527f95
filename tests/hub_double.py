"""A double of the hub's HTTP API on this machine, which counts what is asked of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".onnx")  # kept as LFS objects


@dataclass
class DoubleRepo:
    """One model repo: its files at each commit, its branches, and what stands in the way."""

    files: dict[str, bytes]
    commit: str = "a" * 40
    refs: dict[str, str] = field(default_factory=dict)
    refuse: tuple[int, str] | None = None  # status and X-Error-Code of every answer
    gate: bool = False  # the listing is public, the files are not
    token: str | None = None  # with which refusals and the gate are passed
    private: bool = False
    objects: dict[str, bytes] = field(default_factory=dict)  # large files, committed or not
    commits: list[list[str]] = field(default_factory=list)  # what each changed


@dataclass
class Double:
    """The double's state, and a record of what was asked."""

    repos: dict[str, DoubleRepo] = field(default_factory=dict)
    endpoint: str = ""
    sent: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # body bytes a file
    ranges: dict[str, list[str | None]] = field(default_factory=lambda: defaultdict(list))
    calls: list[str] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which it hangs up
    ignore_ranges: bool = False
    writer: str | None = None  # the token that may write
    refuse_writes: tuple[str, int, str] | None = None  # part of a path, status, message
    received: dict[str, int] = field(default_factory=lambda: defaultdict(int))  # bytes an object
    bodies: list[bytes] = field(default_factory=list)  # of every request but objects
    hang: float = 0  # seconds before each answer

    def add(self, name: str, folder: Path, **kind: object) -> DoubleRepo:
        """Add a repo with the files of a folder."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = DoubleRepo(files, **kind)  # type: ignore[arg-type]
        repo.refs.setdefault("main", repo.commit)
        self.repos[name] = repo
        return repo


@contextmanager
def serve() -> Iterator[Double]:
    """Run a double on a free port."""
    double = Double()
    handler = type("Handler", (_Handler,), {"double": double})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    double.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    double: Double
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._take()

    def do_PUT(self) -> None:
        self._take()

    def _take(self) -> None:
        """Answer a request that writes."""
        path = unquote(urlsplit(self.path).path)
        self.double.calls.append(f"{self.command} {path}")
        body = self._body()
        if self.command == "POST":
            self.double.bodies.append(body)
        if self.double.refuse_writes and self.double.refuse_writes[0] in path:
            _, status, message = self.double.refuse_writes
            return self._answer_error(status, message)
        if self.command == "PUT":  # an object goes to a signed address, without a login
            return self._object(path, body)
        if not self._may_write():
            return self._answer_error(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        return self._write(path, body)

    def _may_write(self) -> bool:
        token = self.double.writer
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _answer_error(self, status: int, message: str) -> None:
        self._send(status, {"X-Error-Message": message}, json.dumps({"error": message}).encode())

    def _create(self, asked: dict[str, str]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.double.endpoint}/{name}", "name": name}
        if name in self.double.repos:
            return self._send(409, {}, json.dumps({"error": "exists", **url}).encode())
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.double.repos[name] = DoubleRepo({}, refs={"main": "a" * 40}, private=private)
        return self._json(url)

    def _write(self, path: str, body: bytes) -> None:
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/.]+)(?:\.git/info/lfs)?/(.+)", path)
        repo = self.double.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._refuse(404, "RepoNotFound")
        if match[2].startswith("preupload"):
            files = [
                {
                    "path": f["path"],
                    "uploadMode": _mode(f["path"]),
                    "shouldIgnore": _ignored(f["path"]),
                }
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if match[2] == "objects/batch":
            return self._batch(match[1], repo, json.loads(body))
        if match[2].startswith("commit/"):
            return self._commit(match[1], repo, [json.loads(line) for line in body.splitlines()])
        return self._refuse(404, "EntryNotFound")

    def _batch(self, name: str, repo: DoubleRepo, asked: dict[str, Any]) -> None:
        found = []
        for entry in asked["objects"]:
            there = entry["oid"] in repo.objects
            href = f"{self.double.endpoint}/objects/{name}/{entry['oid']}"
            actions = {} if there else {"actions": {"upload": {"href": href}}}
            found.append({"oid": entry["oid"], "size": entry["size"], **actions})
        self._json({"transfer": "basic", "objects": found})

    def _object(self, path: str, body: bytes) -> None:
        name, _, oid = path.removeprefix("/objects/").rpartition("/")
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer_error(400, "another content")
        self.double.received[oid] += len(body)
        self.double.repos[name].objects[oid] = body
        return self._json({})

    def _commit(self, name: str, repo: DoubleRepo, lines: list[dict[str, Any]]) -> None:
        changed = []
        for line in lines[1:]:
            what, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                repo.files[path] = base64.b64decode(what["content"])
            elif line["key"] == "lfsFile":
                repo.files[path] = repo.objects[what["oid"]]
            else:
                del repo.files[path]
            changed.append(path)
        repo.commits.append(changed)
        repo.commit = repo.refs["main"] = hashlib.sha1(repr(repo.commits).encode()).hexdigest()
        url = f"{self.double.endpoint}/{name}/commit/{repo.commit}"
        self._json({"commitUrl": url, "commitOid": repo.commit, "success": True})

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.double.calls.append(f"{self.command} {path}")
        time.sleep(self.double.hang)
        if path == "/api/whoami-v2":
            known = self._may_write()
            return self._json({"name": "me"}) if known else self._answer_error(401, "Invalid")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.double.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self._refuse(404, "RepoNotFound")
        allowed = repo.token and self.headers.get("Authorization") == f"Bearer {repo.token}"
        if repo.refuse and not allowed:
            return self._refuse(*repo.refuse)
        revision = match[3] if api else match[2]
        if revision not in (None, repo.commit) and revision not in repo.refs:
            return self._refuse(404, "RevisionNotFound")
        if api:
            return self._json(_tree(repo) if match[2] == "tree" else _info(match[1], repo))
        if repo.gate and not allowed:
            return self._refuse(403, "GatedRepo")
        return self._file(repo, match[3])

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}")

    def _json(self, content: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _file(self, repo: DoubleRepo, name: str) -> None:
        if name not in repo.files:
            return self._refuse(404, "EntryNotFound")
        data, status = repo.files[name], 200
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(len(data)),
            "X-Linked-Etag": f'"{_etag(name, data)}"',
            "ETag": f'"{_etag(name, data)}"',
            "Accept-Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not self.double.ignore_ranges:
            begin, end = int(asked[1]), int(asked[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data)) - 1}/{len(data)}"
            data, status = data[begin:end], 206
        if self.command == "GET":
            self.double.ranges[name].append(self.headers.get("Range"))
        self._send(status, headers, data, name)

    def _send(
        self, status: int, headers: Mapping[str, str], data: bytes, name: str | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        keep = self.double.cut.get(name or "", len(data))
        try:
            self.wfile.write(data[:keep])
        except OSError:  # the client has hung up
            self.close_connection = True
            return
        if name:
            self.double.sent[name] += len(data[:keep])
        if keep < len(data):
            self.close_connection = True


def _ignored(name: str) -> bool:
    return False


def _mode(name: str) -> str:
    return "lfs" if name.endswith(LARGE) else "regular"


def _etag(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return _git(data)


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _info(name: str, repo: DoubleRepo) -> dict[str, object]:
    siblings = []
    for path, data in repo.files.items():
        entry: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": _git(data)}
        if path.endswith(LARGE):
            entry["lfs"] = {"sha256": _etag(path, data), "size": len(data), "pointerSize": 134}
        siblings.append(entry)
    about = {"id": name, "modelId": name, "sha": repo.commit, "private": repo.private}
    return {**about, "siblings": siblings, "tags": []}


def _tree(repo: DoubleRepo) -> list[dict[str, object]]:
    found = []
    for path, data in repo.files.items():
        entry: dict[str, object] = {
            "type": "file",
            "path": path,
            "size": len(data),
            "oid": _git(data),
        }
        if path.endswith(LARGE):
            entry["lfs"] = {"oid": _etag(path, data), "size": len(data), "pointerSize": 134}
        found.append(entry)
    return found
