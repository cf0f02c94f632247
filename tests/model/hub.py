"""A model hub in memory that serves over HTTP the endpoints of huggingface.co for pushing and loading models."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

Files = dict[str, bytes]


@contextmanager
def serve(repos: dict[str, Files]) -> Iterator[str]:
    """Serve `repos`, {hub id or hub id@revision: {path: content}}, and yield the URL. Pushes change `repos`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Hub,), {"repos": repos}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[str, Files]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        owner, name, *rest = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        revision = rest[1] if rest else "main"
        for location, files in self.repos.items():
            repo, _, branch = location.partition("@")
            commit = _sha1(location.encode())
            if repo == f"{owner}/{name}" and revision in (branch or "main", commit):
                return self._answer_about(repo, files, commit, rest)
        self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})

    def _answer_about(self, repo: str, files: Files, commit: str, rest: list[str]) -> None:
        if rest[:1] == ["resolve"]:
            content = files.get("/".join(rest[2:]))
            if content is None:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                self._answer(200, content, {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": commit})
        elif rest[:1] == ["tree"]:
            sizes = {path: len(content) for path, content in files.items()}
            self._answer_json([{"type": "file", "path": p, "size": s, "oid": commit} for p, s in sizes.items()])
        else:
            self._answer_json({"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.strip("/").split("/")
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.repos.setdefault(repo, {})
            self._answer_json({"url": f"http://{self.headers['Host']}/{repo}"})
        elif path == ["api", "validate-yaml"]:
            self._answer_json({"errors": [], "warnings": []})
        elif path[4] == "preupload":
            files = json.loads(body)["files"]
            self._answer_json({"files": [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in files]})
        elif path[4] == "commit":
            repo = f"{path[2]}/{path[3]}"
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer_json({"commitUrl": f"http://{self.headers['Host']}/{repo}/commit/0", "commitOid": "0"})

    def _answer_json(self, answer: object) -> None:
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
