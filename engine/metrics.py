"""A stage's figures as Prometheus reads them: scraped while the job runs, or from a file when it is over."""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from numbers import Real
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from alure.engine.errors import InputError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCRAPE_TIMEOUT_S = 10.0


def exposition(stage: str, figures: Mapping[str, Any], explained: Mapping[str, str]) -> str:
    """Prometheus text format 0.0.4, a metric alure_<stage>_<figure> each; a group of figures becomes labels.

    What is no number is left out. A name that ends in _total is a counter, every other a gauge. explained: name → HELP.
    """
    lines = []
    for name, value in figures.items():
        samples = (
            {f'{{of="{_escaped(part)}"}}': found for part, found in value.items()}
            if isinstance(value, Mapping)
            else {"": value}
        )
        numbers = {labels: float(found) for labels, found in samples.items() if isinstance(found, Real)}
        if numbers:
            metric = f"alure_{stage}_{name}"
            lines.append(f"# HELP {metric} {explained[name]}")
            lines.append(f"# TYPE {metric} {'counter' if name.endswith('_total') else 'gauge'}")
            lines += [f"{metric}{labels} {_number(number)}" for labels, number in numbers.items()]
    return "".join(f"{line}\n" for line in lines)


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")


def write_metrics(path: Path, text: str) -> None:
    """Replace `path`, for the node exporter's textfile collector, which may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


class _Server(ThreadingTCPServer):
    """http.server's own asks the name service for its host's full name first, which may take seconds."""

    allow_reuse_address = daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up is no news."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serve_metrics(host: str, port: int, text: Callable[[], str]) -> Iterator[str]:
    """GET /metrics answers `text()`, called in a thread of its own, until the block ends; yields the address.

    port: 0 takes a free one. Raises InputError where the address cannot be had, before anything else happens.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = SCRAPE_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, explain="the figures are at /metrics")
                return
            body = text().encode()
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass  # a line for every scrape says nothing

    try:
        server = _Server((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"--metrics-port: cannot listen on {host}:{port}: {error}; give another port, or 0 for a free one"
        ) from None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
