"""Workers for rows on Ray, with the fake voice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fake_render import FakeVoice
from fishrt.bulk.render import Speakable
from fishrt.errors import BundleError
from fishrt.jobs.folder import Made


class Fatal(FakeVoice):
    """A row takes 50 ms; "kill" in a text kills the process, and "once FILE" only while FILE is not there."""

    def compute(self, payload: Speakable) -> Made:
        time.sleep(0.05)
        text = payload.request.text
        if "kill" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        if text.startswith("once ") and not (marker := Path(text.removeprefix("once "))).exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().compute(payload)


def fatal() -> Fatal:
    return Fatal()


def broken() -> Fatal:
    raise BundleError("there is no bundle here")


def bug() -> Fatal:
    raise RuntimeError("a fault of the program")
