"""Play speech on the default output device of this machine, through the package sounddevice."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..arrays import Pcm
from ..errors import OutputError

log = logging.getLogger(__name__)


def check_player() -> None:
    """Check before long work that there is an output device. Raises OutputError otherwise."""
    sounddevice = _sounddevice()
    try:
        sounddevice.check_output_settings(channels=1, dtype="float32")
    except (sounddevice.PortAudioError, ValueError) as error:
        raise OutputError(f"there is no device to play on: {error}", hint="write a file instead: -o hello.wav") from None


@contextmanager
def playing(rate: int, *, written: bool) -> Iterator[Callable[[Pcm], None]]:
    """Open the device and yield a function that plays pcm float32 [samples] at `rate` Hz, and blocks while the buffer is full.

    The end of the block waits until everything is played. written: whether the speech is also written to a file; a device that
    fails, such as an unplugged headset, is then only a warning. Raises OutputError.
    """
    sounddevice = _sounddevice()
    failed = False

    def play(pcm: Pcm) -> None:
        nonlocal failed
        try:
            if not failed:
                device.write(pcm)
        except sounddevice.PortAudioError as error:
            if not written:
                raise
            failed = True
            log.warning("the rest is not played: %s", error)

    try:
        with sounddevice.OutputStream(samplerate=rate, channels=1, dtype="float32") as device:
            yield play
    except sounddevice.PortAudioError as error:
        raise OutputError(f"cannot play: {error}", hint="write a file instead: -o hello.wav") from None


def _sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ImportError:
        raise OutputError("playing needs sounddevice, which is not installed", hint='pip install "fishrt[play]"') from None
    except OSError as error:  # PortAudio, which it loads
        raise OutputError(
            f"sounddevice cannot be used: {error}", hint="install the library PortAudio, such as libportaudio2 on Debian"
        ) from None
