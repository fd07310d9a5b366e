"""`make report-check`: open the report in a real browser, on a wide screen and on a phone's, and check it.

    python tools/report_check.py build/report-check docs/results/head-cpu.json ...

This writes the report of the given files and a screenshot of each view. It fails if the page sends a request to the
network, if anything appears on the console, or if the page is wider than its screen. Without a Chromium on the machine
(Debian: `apt-get install chromium`) it says so and checks nothing.
"""

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_slimspec.measure.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SCREENS = {"wide": (1280, 900, 1), "phone": (375, 780, 2)}  # CSS pixels, and device pixels for each


class Page:
    """A browser tab that is controlled by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; events that arrive meanwhile are added to ``events``."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self.events.append(message)

    def wait_for(self, event: str) -> None:
        """Wait until an event is in ``events``, which holds those since it was last emptied."""
        while not any(e["method"] == event for e in self.events):
            self.events.append(json.loads(self._socket.recv(timeout=60)))


@contextmanager
def tab(browser: str) -> Iterator[Page]:
    """Give a new tab of a new browser, which is closed at the end of the context."""
    import httpx
    from websockets.sync.client import connect

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--hide-scrollbars"]
        flags += ["--disable-gpu", "--no-first-run", "--disable-background-networking"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # which it cannot set up as root
        process = subprocess.Popen([browser, *flags, "about:blank"], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "DevTools listening on" in line)
            address = line.split("ws://")[1].split("/")[0]
            pages = httpx.get(f"http://{address}/json", timeout=30).json()
            url = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(url, max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()


def look(page: Page, file: Path, screen: str, picture: Path) -> list[str]:
    """Take a screenshot of the whole page, and return what is wrong with it."""
    width, height, scale = SCREENS[screen]
    for domain in ("Page", "Network", "Log", "Runtime"):
        page.call(f"{domain}.enable")
    size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": screen == "phone"}
    page.call("Emulation.setDeviceMetricsOverride", **size)
    page.events.clear()
    url = file.resolve().as_uri()
    page.call("Page.navigate", url=url)
    page.wait_for("Page.loadEventFired")
    found = page.call("Runtime.evaluate", expression="document.documentElement.scrollWidth", returnByValue=True)
    broken = "[...document.images].filter(image => !image.naturalWidth).length"
    images = page.call("Runtime.evaluate", expression=broken, returnByValue=True)
    content = page.call("Page.getLayoutMetrics")["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": width, "height": content["height"], "scale": 1}
    shot = page.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
    picture.write_bytes(base64.b64decode(shot["data"]))
    problems = []
    if found["result"]["value"] > width:
        problems.append(f"the page is {found['result']['value']} pixels wide")
    if images["result"]["value"]:
        problems.append(f"{images['result']['value']} charts are not shown")
    for event in page.events:
        parameters = event.get("params", {})
        asked = parameters["request"]["url"] if event["method"] == "Network.requestWillBeSent" else url
        if asked != url and not asked.startswith("data:"):  # whose bytes are in the page
            problems.append(f"the page asks for {asked}")
        if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            problems.append(f"the console says {json.dumps(parameters)[:300]}")
    return [f"{screen}: {problem}" for problem in problems]


def main() -> None:
    output, results = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"report-check: no browser here ({', '.join(BROWSERS)}), so nothing was checked")
        return
    report = output / "report"
    for path, kind in write_report(results, report, mixed_devices=True):
        print(f"left out: {path} ({kind})")
    problems = []
    with tab(browser) as page:
        for screen in SCREENS:
            picture = output / f"{screen}.png"
            problems += look(page, report / "index.html", screen, picture)
            print(f"screenshot: {picture}")
    if problems:
        sys.exit("report-check: " + "\n".join(problems))
    print("report-check: nothing asked of the network, nothing on the console, no page wider than its screen")


if __name__ == "__main__":
    main()
