"""A real TensorBoard server and a real browser that opens its pages."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

PATIENCE_S = 240
WIDTH_PX, HEIGHT_PX = 1600, 1250
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
MARK = "MEASURED"
MEASURE = """<script>onload = () => parent.postMessage(JSON.stringify({
  width: innerWidth, scroll_width: document.documentElement.scrollWidth, pictures: document.images.length,
  broken_pictures: [...document.images].filter(image => !image.naturalWidth).length,
  requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !/^data:/.test(name)),
}), "*")</script>"""
"""Script at the end of a page that reports to the surrounding page how the browser shows it."""
FRAME = """<iframe src="{file}" style="border: 0; width: {width_px}px; height: 900px"></iframe>
<script>onmessage = message => document.body.append("{mark}" + message.data + "{mark}")</script>"""
"""Page with a narrow frame, because a window cannot be as narrow as a phone."""
PATIENT_MS = 60_000
"""Time on the clock of the page, which stops while the page waits for the server."""


class Server:
    """A TensorBoard server that answers requests."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self._log = address, log

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        data = None if question is None else json.dumps(question).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        with urlopen(Request(self.address + path, data, headers), timeout=PATIENCE_S) as answer:
            return json.loads(answer.read())

    def complaints(self) -> list[str]:
        return [line for line in self._log.read_text().splitlines() if "Traceback" in line or "rror" in line]


@contextmanager
def tensorboard(folder: Path, log: Path) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        folder,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
    ]
    with log.open("w") as screen, subprocess.Popen(command, stdout=screen, stderr=screen) as process:
        server, deadline = Server(f"http://127.0.0.1:{port}/", log), time.monotonic() + PATIENCE_S
        try:
            while not loaded(server):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield server
        finally:
            process.terminate()


def loaded(server: Server) -> bool:
    try:
        return bool(server.ask("data/plugin/scalars/tags"))
    except (URLError, ConnectionError):
        return False


def browser() -> str:
    """Return the path of Chromium, or skip the test if it is not installed."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    return found


def look(address: str, folder: Path, words: Sequence[str] = ()) -> tuple[Path, str, str]:
    """Return a screenshot, the page after its scripts ran and some words appeared, and its console output."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        page = _browse("--dump-dom", address, folder)
        if all(word in page.stdout for word in words):
            break
        assert time.monotonic() < deadline, [word for word in words if word not in page.stdout]
    picture = folder / "page.png"
    seen = _browse(f"--screenshot={picture}", address, folder)
    console = "\n".join(line for done in (page, seen) for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return picture, page.stdout, console


def _browse(what: str, address: str, folder: Path) -> subprocess.CompletedProcess[str]:
    # without WebGL, curves are SVG, which a screenshot shows
    flags = [
        "--disable-3d-apis", "--enable-logging=stderr", "--log-level=0", f"--window-size={WIDTH_PX},{HEIGHT_PX}",
        f"--virtual-time-budget={PATIENT_MS}",
    ]  # fmt: skip
    return _headless(what, address, folder, flags)


def _headless(what: str, address: str, folder: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    always = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    return subprocess.run(
        [browser(), *always, *flags, what, address], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )


def layout(page: Path, folder: Path, width_px: int) -> dict[str, Any]:
    """Return `width`, `scroll_width`, `pictures`, `broken_pictures` and `requests` of a file in a window."""
    (folder / "measured.html").write_text(page.read_text() + MEASURE)
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(file="measured.html", width_px=width_px, mark=MARK))
    dom = _headless("--dump-dom", f"file://{frame}", folder, ["--virtual-time-budget=10000"]).stdout
    return dict(json.loads(dom.split(MARK)[-2]))


def print_pages(page: Path, folder: Path) -> int:
    """Print a file to `page.pdf`, and return the number of sheets."""
    pdf = folder / "page.pdf"
    _headless(f"--print-to-pdf={pdf}", f"file://{page}", folder, ["--no-pdf-header-footer"])
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
