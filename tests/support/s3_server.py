"""moto_server on a free port of this machine, whose conditional writes are one step, as S3's are.

python s3_server.py: serves until it is killed; the first line on stderr that has an address says where.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

BUCKET = "bucket"
STARTS_IN_S = 60
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Starts it; gives the environment variables of its clients. Skips where moto is missing."""
    if find_spec("moto") is None or find_spec("flask_cors") is None:
        pytest.skip('needs moto: pip install "moto[s3]" flask-cors')
    log = folder / "s3_server.log"
    with log.open("w") as said:
        server = subprocess.Popen([sys.executable, __file__], stderr=said, stdout=said, cwd=folder)
    try:
        yield KEYS | {"AWS_ENDPOINT_URL": _address(server, log), "AWS_ALLOW_HTTP": "true"}
    finally:
        server.kill()
        server.wait()


def _address(server: "subprocess.Popen[bytes]", log: Path) -> str:
    started = time.monotonic()
    while time.monotonic() - started < STARTS_IN_S and server.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise RuntimeError(log.read_text())


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """No AWS variables but these."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def serve() -> None:
    from moto.s3.responses import S3Response
    from moto.server import main

    lock, put = threading.Lock(), S3Response.put_object

    def put_alone(response: S3Response) -> object:
        """moto looks first and writes then."""
        with lock:
            return put(response)

    S3Response.put_object = put_alone
    main(["-H", "127.0.0.1", "-p", "0"])


if __name__ == "__main__":
    serve()
