"""Real servers on loopback, and a proxy that breaks their responses on purpose."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "leaves"


@contextmanager
def s3_server(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Run an S3 server (moto) with every file below a folder, and yield its host and port."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        set_credentials(patch, f"http://127.0.0.1:{port}")
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=BUCKET)
        upload(f"http://127.0.0.1:{port}", folder, prefix)
    yield "127.0.0.1", port
    server.stop()


def set_credentials(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set the environment variables that a user would set."""
    patch.setenv("AWS_ACCESS_KEY_ID", "a scientist")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_REGION", "us-east-1")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_ENDPOINT_URL", endpoint)


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    """Upload every file below a folder as one object."""
    client = boto3.client("s3", endpoint_url=endpoint)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())


class Fault:
    """Fault to inject: `kind` for the next `times` requests for tars, or for any request whose path contains `path`.

    Kinds: "500" (an error response), "stall" (no response), "short" (fewer bytes than asked for), "cut" (the
    connection closes in the middle of the body), "" (none). `num_requests` counts the requests that matched.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.set("", 0)

    def set(self, kind: str, times: int, path: str | None = None) -> None:
        self.kind, self.times, self.path, self.num_requests = kind, times, path, 0

    def next(self, method: str, path: str) -> str:
        with self._lock:
            if not (method == "GET" and path.endswith(".tar") if self.path is None else self.path in path):
                return ""
            self.num_requests += 1
            self.times -= 1
            return self.kind if self.times >= 0 else ""


@contextmanager
def breaking_proxy(host: str, port: int) -> Iterator[tuple[str, Fault]]:
    """Run a proxy in front of a web server, and yield its URL and the fault to set."""
    fault, closing = Fault(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond()

        def do_HEAD(self) -> None:
            self._respond()

        def _respond(self) -> None:
            kind = fault.next(self.command, self.path)
            if kind == "500":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if kind == "stall":
                closing.wait(20)
                self.close_connection = True
                return
            headers = dict(self.headers.items())
            if kind == "short":
                first, last = headers["range"].removeprefix("bytes=").split("-")
                headers["range"] = f"bytes={first}-{(int(first) + int(last)) // 2}"
            upstream = http.client.HTTPConnection(host, port)
            upstream.request(self.command, self.path, headers=headers)
            response = upstream.getresponse()
            body = response.read()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", response.getheader("Content-Length") or str(len(body)))
            self.end_headers()
            if kind == "cut":
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)
            upstream.close()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", fault
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
