"""Folders of an S3-compatible bucket, and the few requests that the store makes itself.

Tables are written by delta-rs and read by Arrow, each with a client of its own. What neither offers is here, signed by
AWS Signature Version 4: a look at the bucket that says at once what is wrong, a conditional write, and leases.
"""

import hashlib
import hmac
import http.client
import os
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from alure.engine.errors import AlureError, InputError

URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/((?:[\w.!=+@-]+/)*[\w.!=+@-]+)/?", re.ASCII)
ATTEMPTS, TIMEOUT_S = 3, 10.0
CONFLICT, ABSENT, FAILED = (409, 412), 404, 500


@dataclass(frozen=True)
class S3Settings:
    """Where the server is and who asks, from the environment variables that the AWS tools read."""

    access_key: str
    secret_key: str = field(repr=False)
    session_token: str | None = field(repr=False)
    region: str
    endpoint: str  # scheme://host[:port]

    @classmethod
    def from_environment(cls) -> "S3Settings":
        """Raises InputError where credentials are missing, or the endpoint is none that may be used."""
        known = {name: value for name, value in os.environ.items() if value}
        missing = [name for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if name not in known]
        if missing:
            raise InputError(
                f"store: {' and '.join(missing)} are not set, so there are no credentials for s3://; set them, of a "
                'profile or a role by `eval "$(aws configure export-credentials --format env)"`'
            )
        region = known.get("AWS_REGION") or known.get("AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = known.get("AWS_ENDPOINT_URL") or f"https://s3.{region}.amazonaws.com"
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise InputError(f"AWS_ENDPOINT_URL: expected http(s)://HOST[:PORT], got {endpoint!r}")
        if parts.scheme == "http" and known.get("AWS_ALLOW_HTTP", "").lower() not in ("1", "true", "yes", "on"):
            raise InputError(
                f"AWS_ENDPOINT_URL: {endpoint} is not encrypted; set AWS_ALLOW_HTTP=true to allow that, or give https"
            )
        keys = (known["AWS_ACCESS_KEY_ID"], known["AWS_SECRET_ACCESS_KEY"], known.get("AWS_SESSION_TOKEN"))
        return cls(*keys, region, f"{parts.scheme}://{parts.netloc}")

    def storage_options(self) -> dict[str, str]:
        """For delta-rs. A commit is a write of an object that must not be there, whatever the environment says."""
        options = {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": str(self.endpoint.startswith("http:")).lower(),
            "AWS_CONDITIONAL_PUT": "etag",
            "AWS_S3_ALLOW_UNSAFE_RENAME": "false",
        }
        return options | ({"AWS_SESSION_TOKEN": self.session_token} if self.session_token else {})


class Request(NamedTuple):
    method: str
    path: str  # /bucket/key, not quoted
    query: Mapping[str, str] = {}
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Response(NamedTuple):
    status: int
    headers: Message
    body: bytes


@dataclass(frozen=True)
class S3Location:
    """A folder or an object: what a store needs of `pathlib.Path`, and the requests. `key`: without slashes around."""

    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> "S3Location":
        found = URL.fullmatch(url)
        if found is None or {".", ".."} & set(found[2].split("/")):
            raise InputError(f"store: expected s3://BUCKET/PREFIX of letters, digits and -_.!=+@, got {url!r}")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "S3Location":
        return S3Location(self.bucket, f"{self.key}/{name}")

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> "S3Location":
        return S3Location(self.bucket, self.key.rpartition("/")[0])

    def resolve(self) -> "S3Location":
        return self

    def reach(self) -> None:
        """List the folder. Raises InputError where the bucket, the region or the credentials are wrong."""
        query = {"list-type": "2", "max-keys": "1", "prefix": f"{self.key}/"}
        self._ask(Request("GET", f"/{self.bucket}", query))

    def check_conditional_writes(self) -> None:
        """Raise InputError where the server takes a second write of an object that must not be there: of two commits
        at once one would be lost.
        """
        probe = self / f"exclusive-{uuid.uuid4().hex}"
        try:
            refuses = probe.write_once(b"") and not probe.write_once(b"")
        finally:
            probe.delete()
        if not refuses:
            raise InputError(
                f"{self}: the server at {S3Settings.from_environment().endpoint} ignores If-None-Match, so commits of "
                "two writers would overwrite each other; use a server with conditional writes (AWS S3 has them)"
            )

    def read(self) -> tuple[bytes, float] | None:
        """An object and its age in seconds by the server's clock; None where it is not there."""
        found = self._ask(Request("GET", self._path), (ABSENT,))
        if found.status == ABSENT:
            return None
        now, then = (parsedate_to_datetime(found.headers[name]) for name in ("Date", "Last-Modified"))
        return found.body, (now - then).total_seconds()

    def write(self, body: bytes) -> None:
        self._ask(Request("PUT", self._path, body=body))

    def write_once(self, body: bytes) -> bool:
        """False where the object is there already."""
        once = Request("PUT", self._path, headers={"If-None-Match": "*"}, body=body)
        return self._ask(once, CONFLICT).status not in CONFLICT

    def delete(self) -> None:
        self._ask(Request("DELETE", self._path), (ABSENT,))

    @property
    def _path(self) -> str:
        return f"/{self.bucket}/{self.key}"

    def _ask(self, request: Request, fine: tuple[int, ...] = ()) -> Response:
        settings = S3Settings.from_environment()
        answer = send(settings, request)
        if answer.status < 300 or answer.status in fine:
            return answer
        error = AlureError if answer.status >= FAILED else InputError
        region = answer.headers.get("x-amz-bucket-region", settings.region)
        hint = f"; the bucket is in the region {region}" if region != settings.region else ""
        raise error(
            f"{self}: {settings.endpoint} answered {answer.status} to {request.method}: "
            f"{without_xml(answer.body.decode('utf-8', 'replace')) or 'nothing more'}{hint}. Check the bucket's name, "
            "AWS_REGION, AWS_ENDPOINT_URL and the credentials"
        )


def send(settings: S3Settings, request: Request) -> Response:
    """The answer, whatever it says; AlureError where there is none after `ATTEMPTS`."""
    target = settings.endpoint + quote(request.path, safe="/-._~") + ("?" if request.query else "")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.25 * 4 ** (attempt - 1))
        headers = sign(settings, request, datetime.now(UTC)) | {"Content-Type": "application/octet-stream"}
        body = request.body if request.method == "PUT" else None
        call = urllib.request.Request(target + _query(request), body, headers, method=request.method)
        try:
            with urllib.request.urlopen(call, timeout=TIMEOUT_S) as found:
                return Response(found.status, found.headers, found.read())
        except urllib.error.HTTPError as error:
            with error:
                answer = Response(error.code, error.headers, error.read())
            if not (error.code in (429, 500, 502, 503, 504) and attempt + 1 < ATTEMPTS):
                return answer
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
    raise AlureError(
        f"store: {settings.endpoint} cannot be reached ({reason}), asked {ATTEMPTS} times; check AWS_ENDPOINT_URL, "
        "AWS_REGION and the network"
    )


def sign(settings: S3Settings, request: Request, moment: datetime) -> dict[str, str]:
    """The request's headers with its signature, as of the AWS guide "Authenticating Requests: Using the Authorization
    Header (AWS Signature Version 4)".
    """
    now, digest = f"{moment:%Y%m%dT%H%M%SZ}", hashlib.sha256(request.body).hexdigest()
    headers = {name.lower(): value for name, value in request.headers.items()}
    headers |= {"host": urlsplit(settings.endpoint).netloc, "x-amz-content-sha256": digest, "x-amz-date": now}
    if settings.session_token:
        headers["x-amz-security-token"] = settings.session_token
    names = ";".join(sorted(headers))
    lines = [request.method, quote(request.path, safe="/-._~"), _query(request)]
    lines += [*(f"{name}:{headers[name].strip()}" for name in sorted(headers)), "", names, digest]
    scope = f"{now[:8]}/{settings.region}/s3/aws4_request"
    asked = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    key = f"AWS4{settings.secret_key}".encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{asked}"):
        key = hmac.digest(key, part.encode(), "sha256")
    credential = f"AWS4-HMAC-SHA256 Credential={settings.access_key}/{scope}"
    return headers | {"authorization": f"{credential},SignedHeaders={names},Signature={key.hex()}"}


def without_xml(text: str) -> str:
    """What a server says in XML, as `Code: message`."""
    said = re.sub(r"(?s)<\?xml.*?<Code>(.*?)</Code>.*?<Message>(.*?)</Message>.*?(</Error>|$)", r"\1: \2", text)
    return " ".join(re.sub(r"<[^>]*>", " ", said).split())


def _query(request: Request) -> str:
    return "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in sorted(request.query.items()))
