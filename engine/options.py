"""What the commands share: options of one meaning, and how a result is shown."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from typer.models import CommandFunctionType

from alure.engine.config import Config, describe
from alure.engine.errors import InputError, refuse_s3
from alure.engine.results import to_dict

MOST_LINES = 20  # a longer list is only counted for a person

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with what was done as the last line.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same bits.")]
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.")]
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="The store: a folder, or s3://bucket/prefix.")]
AsOf = Annotated[
    str | None, typer.Option("--as-of", help="Snapshot time: unix seconds or 2026-11-22T03:00 (UTC). Default: newest.")
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML with the sections of `alure run`; options given here win.")
]


class Commands(typer.Typer):
    """Commands whose paths are local: one that begins with s3:// is refused, not taken for a folder of that name."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[CommandFunctionType], CommandFunctionType]:
        register = super().command(name, **options)

        def add(function: CommandFunctionType) -> CommandFunctionType:
            @wraps(function)
            def checked(**given: Any) -> Any:
                for name, value in given.items():
                    for path in value if isinstance(value, list) else [value]:
                        if isinstance(path, Path):
                            refuse_s3(path, name)
                return function(**given)

            register(checked)
            return function

        return add


def finish(result: Any, as_json: bool) -> None:
    """The command's result: readable lines to whoever watches, or one JSON object on stdout."""
    data = to_dict(result)
    if as_json:
        print(json.dumps(data))  # noqa: T201
    else:
        for name, value in data.items():
            lines = value if isinstance(value, list) else groups(name, value) or [value]
            if len(lines) > MOST_LINES or (lines and isinstance(lines[0], list)):
                lines = [f"{len(lines):,} entries; --json shows them"]
            for number, line in enumerate(lines):
                label = "" if number else name.replace("_", " ")
                print(f"{label:>28}  {inline(name, line)}")  # noqa: T201


def groups(name: str, value: Any) -> list[str]:
    """A line a group, where `value` is nothing but groups of figures."""
    if not isinstance(value, dict) or not all(isinstance(found, dict) for found in value.values()):
        return []
    return [f"{part}: {inline(name, found)}" for part, found in value.items()]


def inline(name: str, value: Any) -> str:
    """A figure, or the plain figures of a group on one line."""
    if not isinstance(value, dict):
        return shown(name, value)
    plain = {
        part: found for part, found in value.items() if found not in ("", None) and not isinstance(found, (dict, list))
    }
    return " · ".join(f"{part.replace('_', ' ')} {shown(part, found)}" for part, found in plain.items()) or "none"


def shown(name: str, value: Any) -> str:
    """A figure for a person: grouped digits, and dates for unix seconds."""
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, float):
            return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:,.2f}"
        return str(value)
    if name == "as_of" or name.endswith("timestamp"):
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M:%S} UTC ({value})"
    return f"{value:,}"


def parse_time(text: str | None, option: str = "--as-of") -> int | None:
    if text is None:
        return None
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{option}: expected unix seconds or an ISO date such as 2026-11-22T03:00, got {text!r}"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def load_config(path: Path | None) -> Config:
    return Config.load(path) if path else Config()


def override(section: Any, **given: Any) -> Any:
    """`section` with the options that were given on the command line, validated like the file."""
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return type(section).model_validate({**section.model_dump(exclude_unset=True), **changes})
    except ValidationError as error:
        raise InputError(describe(error, "options")) from None
