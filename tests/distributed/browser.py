"""A real TensorBoard and a real browser that looks at it."""

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
"""At the end of a page it tells the page around what the browser made of it."""
FRAME = """<iframe src="{file}" style="border: 0; width: {width_px}px; height: 900px"></iframe>
<script>onmessage = message => document.body.append("{mark}" + message.data + "{mark}")</script>"""
"""A window cannot be as narrow as a phone."""
PATIENT_MS = 60_000
"""Of the page's own clock, which stands still while it waits for the server."""


class Server:
    """A TensorBoard that answers."""

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
    """Debian's Chromium or its like; a test that needs it is passed over without."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed (apt-get install chromium)")
    return found


def look(address: str, place: Path, words: Sequence[str] = ()) -> tuple[Path, str, str]:
    """A screenshot, the page once its scripts have run and some words stand on it, and what its console said."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        page = _browse("--dump-dom", address, place)
        if all(word in page.stdout for word in words):
            break
        assert time.monotonic() < deadline, [word for word in words if word not in page.stdout]
    picture = place / "page.png"
    seen = _browse(f"--screenshot={picture}", address, place)
    console = "\n".join(line for done in (page, seen) for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return picture, page.stdout, console


def _browse(what: str, address: str, place: Path) -> subprocess.CompletedProcess[str]:
    # without WebGL curves are SVG, which a screenshot sees
    flags = [
        "--disable-3d-apis", "--enable-logging=stderr", "--log-level=0", f"--window-size={WIDTH_PX},{HEIGHT_PX}",
        f"--virtual-time-budget={PATIENT_MS}",
    ]  # fmt: skip
    return _headless(what, address, place, flags)


def _headless(what: str, address: str, place: Path, flags: Sequence[str]) -> subprocess.CompletedProcess[str]:
    always = [
        "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={place / 'profile'}",
    ]  # fmt: skip
    return subprocess.run(
        [browser(), *always, *flags, what, address], capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )


def layout(page: Path, place: Path, width_px: int) -> dict[str, Any]:
    """How a file looks in a window that wide: `width`, `scroll_width`, `pictures`, `broken_pictures`, `requests`."""
    (place / "measured.html").write_text(page.read_text() + MEASURE)
    frame = place / "frame.html"
    frame.write_text(FRAME.format(file="measured.html", width_px=width_px, mark=MARK))
    dom = _headless("--dump-dom", f"file://{frame}", place, ["--virtual-time-budget=10000"]).stdout
    return dict(json.loads(dom.split(MARK)[-2]))


def print_pages(page: Path, place: Path) -> int:
    """Print a file to `page.pdf`; how many sheets it takes."""
    pdf = place / "page.pdf"
    _headless(f"--print-to-pdf={pdf}", f"file://{page}", place, ["--no-pdf-header-footer"])
    return len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
