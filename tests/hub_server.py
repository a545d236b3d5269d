"""A local Hub: folders as repositories, with the part of the HTTP API that its client uses here."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of every repository; main is the only branch


class HubServer(ThreadingHTTPServer):
    """Serves `root`/owner/name as the repository owner/name.

    Attributes:
        gated: Repositories that refuse access to their files.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.gated = root, set[str]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(root: Path) -> Iterator[HubServer]:
    """A server that runs until the end of the block."""
    with HubServer(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._find()

    def do_GET(self) -> None:
        self._find()

    def do_POST(self) -> None:
        content, path = self._content(), self._path()
        if path == "api/repos/create":
            request = json.loads(content)
            repository = f"{request['organization']}/{request['name']}"
            (self.server.root / repository).mkdir(parents=True, exist_ok=True)
            return self._send_json({"url": f"{self.server.url}/{repository}"})
        if path == "api/validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        _, _, owner, name, verb, *_ = path.split("/")
        if verb == "preupload":
            files = json.loads(content)["files"]
            entries = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            return self._send_json({"files": entries})
        for value in (line["value"] for line in map(json.loads, content.splitlines()) if line["key"] == "file"):
            file = self.server.root / owner / name / value["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(value["content"]))
        return self._send_json({"commitOid": COMMIT, "commitUrl": f"{self.server.url}/{owner}/{name}/commit/{COMMIT}"})

    def _find(self) -> None:
        path = self._path()
        is_api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        repository, folder = f"{owner}/{name}", self.server.root / owner / name
        revision = rest[1] if len(rest) > 1 else "main"
        if not folder.is_dir():
            return self._refuse(401, "RepoNotFound")
        if repository in self.server.gated:
            return self._refuse(403, "GatedRepo")
        if revision not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        if is_api and rest[:1] == ["tree"]:
            entries = [(str(file.relative_to(folder)), file.stat().st_size) for file in files]
            return self._send_json(
                [{"type": "file", "path": path, "size": size, "oid": COMMIT} for path, size in entries]
            )
        if is_api:
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return self._send_json({"id": repository, "sha": COMMIT, "siblings": siblings})
        file = folder.joinpath(*rest[2:])
        if file not in files:
            return self._refuse(404, "EntryNotFound")
        content = file.read_bytes()
        return self._send(200, content, **{"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", **{"X-Error-Code": code, "X-Error-Message": code})

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
