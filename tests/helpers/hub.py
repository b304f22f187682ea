"""A hub of this machine: enough of the Hugging Face hub's API for its own client."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """files: of each repository by name. requests: what was asked, such as GET /..."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        for name, files in self.server.files.items():
            if path.startswith(f"/api/models/{name}/revision/") or path == f"/api/models/{name}":
                siblings = [{"rfilename": file} for file in files]
                return self._json({"id": name, "sha": COMMIT, "siblings": siblings})
            if path.startswith(f"/api/models/{name}/tree/"):
                return self._json([self._entry(file, files[file]) for file in files])
            for revision in (COMMIT, "main"):
                where = f"/{name}/resolve/{revision}/"
                if path.startswith(where) and path.removeprefix(where) in files:
                    return self._file(files[path.removeprefix(where)])
        return self._json({"error": "Repository not found"}, 404, "RepoNotFound")

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        body = self._body()
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            self.server.files.setdefault(name, {})
            self.server.private[name] = wanted.get("visibility") == "private" or bool(
                wanted.get("private")
            )
            return self._json({"url": f"{self.server.address}/{name}", "id": name})
        if path == "/api/validate-yaml":  # of the model card
            return self._json({"errors": [], "warnings": []})
        name = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        for line in body.splitlines():  # of the commit
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.files[name][entry["value"]["path"]] = content
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        return self._json({"commitUrl": url, "commitOid": COMMIT, "pullRequestUrl": None})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _entry(self, file: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": file, "size": len(content), "oid": oid}

    def _json(self, value: Any, status: int = 200, error: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self._send(content)

    def _file(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self._send(content)

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass
