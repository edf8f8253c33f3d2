"""The frame of a program that drives one client: it runs scenarios, and writes what each saw as JSON.

    python PROGRAM URL KEYED_URL WYOMING_URL FOLDER
URL: a server that anybody may use. WYOMING_URL: the same, in Wyoming's protocol.
KEYED_URL: a server whose key is "secret"; it speaks one request at a time, and none may wait.
FOLDER: it has a text, and a recording with its words; the sound that a client receives and report.json go there.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

URL, KEYED_URL, WYOMING_URL, FOLDER = *sys.argv[1:4], Path(sys.argv[4])
TEXT = (FOLDER / "text.txt").read_text(encoding="utf-8")
"""What is spoken to be understood."""
SAMPLE_TEXT = (FOLDER / "sample.txt").read_text(encoding="utf-8")
SAMPLE = (FOLDER / "sample.wav").read_bytes()
"""A recording, and what is said in it."""
LONG = f"{TEXT} " * 40
"""A text that is spoken for minutes."""

Scenario = Callable[[], Any]
_scenarios: list[Scenario] = []


def scenario(function: Scenario) -> Scenario:
    """Register a scenario: a function, or a coroutine function, whose result is JSON."""
    _scenarios.append(function)
    return function


def refusal(kind: type[Exception], call: Callable[[], Any]) -> Exception:
    """Return the error of a call, which must be of this class."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def run() -> None:
    """Run all scenarios, one after another."""
    report = {}
    for function in _scenarios:
        try:
            found = function()
            result = asyncio.run(found) if inspect.iscoroutine(found) else found
            report[function.__name__] = {"result": result}
        except Exception:
            report[function.__name__] = {"traceback": traceback.format_exc()}
    (FOLDER / "report.json").write_text(json.dumps(report))
