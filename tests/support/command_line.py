"""Runs `alure …` in this process, as the console script would."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from alure.engine.cli import main


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.strip().splitlines()[-1])


class CommandLine:
    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capfd, self.monkeypatch = capfd, monkeypatch

    def __call__(self, *words: object) -> Outcome:
        self.capfd.readouterr()
        self.monkeypatch.setattr(sys, "argv", ["alure", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        out, err = self.capfd.readouterr()
        return Outcome(code, out, err)
