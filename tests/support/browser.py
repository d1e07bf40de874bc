"""A real browser for the tests: headless Chromium loads a page and gives back the DOM that its scripts made of it."""

import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
TIMEOUT_S = 60


def chromium() -> str:
    """Path of a Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("chromium is not installed: make browser")
    return found


def dump_dom(page: Path, profile: Path, *, dark: bool = False) -> str:
    """The document after loading `page` and running its scripts. `profile`: an empty folder for the browser."""
    return _run(page, profile, ["--dump-dom", *(["--force-dark-mode"] if dark else [])])


def screenshot(page: Path, profile: Path, out: Path, width: int = 1200, height: int = 2000) -> Path:
    """A PNG of the top `height` pixels of `page`."""
    _run(page, profile, [f"--screenshot={out}", f"--window-size={width},{height}"])
    return out


def _run(page: Path, profile: Path, options: list[str]) -> str:
    command = [chromium(), *FLAGS, f"--user-data-dir={profile}", "--window-size=1200,2000", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2_000:]
    return done.stdout


def with_probe(page: Path, probe: str, out: Path) -> Path:
    """A copy of `page` that gathers script errors from the start and puts what `probe` returns into the DOM.

    probe: JavaScript, the body of a function returning something JSON-able; it runs when the page is loaded.
    """
    catcher = "<script>window.__errors = []; window.onerror = (message) => { window.__errors.push(String(message)); };"
    reporter = (
        "<script>window.addEventListener('load', () => { const out = document.createElement('pre'); out.id = 'probe'; "
        f"const found = (() => {{ {probe} }})(); "
        "out.textContent = JSON.stringify({found, errors: window.__errors}); document.body.append(out); });</script>"
    )
    html = page.read_text()
    assert "<head>" in html
    out.write_text(html.replace("<head>", f"<head>{catcher}</script>", 1) + reporter)
    return out


def probed(dom: str) -> str:
    """The JSON that a probe left in a dumped DOM."""
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)
    assert found, "the page's scripts did not finish"
    return unescape(found[1])
