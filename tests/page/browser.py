"""A headless Chromium driven over the WebDriver protocol, and a TensorBoard for it to look at."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megawan.dist import free_port

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1500,1400",
)  # fmt: skip

# Everything that a person sees as text, and every picture, through the shadow roots of TensorBoard's widgets.
SEEN = """
const texts = [], pictures = [];
function walk(node) {
    if (node.nodeType === Node.TEXT_NODE && node.textContent.trim()) texts.push(node.textContent.trim());
    if (node.tagName === "STYLE" || node.tagName === "SCRIPT" || node.tagName === "TEMPLATE") return;
    if (node.tagName === "IMG") pictures.push([node.naturalWidth, node.naturalHeight]);
    if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
    node.childNodes.forEach(walk);
}
walk(document.body);
return [texts.join(" "), pictures, document.querySelectorAll("line-chart").length];
"""


@contextmanager
def served(*words: object, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process group of its own, output to `log`; nothing of it outlives the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return the JSON answer to a GET, or with `body` to a POST."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read() or b"null")


def until(right: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the first true answer of `right`, asked again until `seconds` are over."""
    end, last = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            last = right()
        except (urllib.error.URLError, ConnectionError) as error:
            last = error
        else:
            if last:
                return last
        time.sleep(0.3)
    raise TimeoutError(f"{what} did not come in {seconds:g} s; last: {str(last)[:2000]}")


class Browser:
    """One window."""

    def __init__(self, driver: str, profile: Path) -> None:
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        self._session = f"{driver}/session/{ask(f'{driver}/session', wanted)['value']['sessionId']}"

    def open(self, url: str) -> None:
        """Load a page."""
        ask(f"{self._session}/url", {"url": url})

    def seen(self) -> tuple[str, list[tuple[int, int]], int]:
        """Return the page's text, the sizes of its loaded pictures, and how many line charts it draws."""
        text, pictures, charts = ask(f"{self._session}/execute/sync", {"script": SEEN, "args": []})["value"]
        return text, [(width, height) for width, height in pictures], charts

    def screenshot(self, file: Path) -> None:
        """Write a PNG of the window."""
        file.write_bytes(base64.b64decode(ask(f"{self._session}/screenshot")["value"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium's driver and a window of it."""
    port = free_port()
    with served(DRIVER, f"--port={port}", log=folder / "driver.log"):
        base = f"http://127.0.0.1:{port}"
        until(lambda: ask(f"{base}/status")["value"]["ready"], 30, "chromedriver")
        yield Browser(base, folder / "profile")


@contextmanager
def tensorboard(logdir: Path, folder: Path) -> Iterator[str]:
    """Start TensorBoard on a run and return its address."""
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        logdir,
        "--port",
        port,
        "--host",
        "127.0.0.1",
    ]
    with served(*words, "--load_fast=false", log=folder / "tensorboard.log"):
        base = f"http://127.0.0.1:{port}"
        until(lambda: ask(f"{base}/data/runs"), 60, "TensorBoard")
        yield base
