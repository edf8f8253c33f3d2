"""Reading of what libsndfile does not know, through PyAV: webm, as browsers record it, m4a, aac, wma, amr and Ogg with Speex.

The first bytes name the demuxer, and only it is opened: ffmpeg would also try playlists, which name other files. A process of its
own decodes, so that a file which states wrong sizes, or a fault of ffmpeg, costs neither the memory nor the life of this one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..arrays import Pcm
from ..errors import AudioError
from .pyav import pyav

_DEMUXERS = {
    "matroska": rb"\x1aE\xdf\xa3",
    "mov": rb".{4}(ftyp|moov|mdat|wide|free|skip)",
    "asf": rb"0&\xb2u\x8ef\xcf\x11",
    "aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "amr": rb"#!AMR",
    "ogg": rb"OggS",
}
"""ffmpeg's demuxer → how its files begin, a pattern of bytes."""


def demuxer_of(begin: bytes) -> str | None:
    """Return ffmpeg's demuxer for a file that begins with these bytes, 12 of them; None: fishrt reads no such file."""
    return next((name for name, pattern in _DEMUXERS.items() if re.match(pattern, begin, re.DOTALL)), None)


def unpacked(data: memoryview, demuxer: str, name: str) -> Iterator[tuple[Pcm, int, float]]:
    """Yield the first sound of a file in blocks: float32 [samples], channels averaged; the rate in Hz; the stated length in s.

    The length is 0 if the file does not state it. Raises AudioError for a damaged file, for one without sound, and without PyAV.
    """
    pyav(f"the kind of audio in {name}")
    from .unpacker import HEAD

    program = [sys.executable, "-P", str(Path(__file__).with_name("unpacker.py")), demuxer]
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        process = subprocess.Popen(
            program, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        )
    seconds = 0.0
    with process:
        assert process.stdout is not None
        try:
            while len(head := process.stdout.read(HEAD.size)) == HEAD.size:
                samples, rate, stated_s = HEAD.unpack(head)
                if not samples:
                    reason = process.stdout.read().decode()
                    break
                yield np.frombuffer(process.stdout.read(4 * samples), np.float32), rate, stated_s
                seconds += samples / rate
            else:
                reason = "its decoder stopped"
        finally:
            process.kill()
    if reason:
        what = f"{name} is damaged {seconds:.1f} s from its start" if seconds else f"{name} is not audio that can be read"
        raise AudioError(f"{what}: {reason}", hint="record or convert it again")
