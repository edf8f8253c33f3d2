"""The program that `unpack.py` starts: it decodes standard input by PyAV and writes blocks of samples to standard output.

ffmpeg allocates what headers state: a few bytes can cost gigabytes. A process of its own can have a limit of memory and time, and
has them on Linux. It imports nothing of fishrt, so that it starts soon and from any place.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
import numpy.typing as npt

DECODERS = (
    "aac aac_latm alac opus libopus vorbis libvorbis flac mp3 mp3float mp2 mp2float ac3 eac3 wmav1 wmav2 wmapro wmalossless "
    "wmavoice amrnb amrwb libopencore_amrnb libopencore_amrwb speex libspeex adpcm_ima_qt pcm_alaw pcm_mulaw pcm_u8 pcm_s8 "
    "pcm_s16le pcm_s16be pcm_s24le pcm_s24be pcm_s32le pcm_s32be pcm_f32le pcm_f32be pcm_f64le pcm_f64be"
).split()
"""The decoders that are used: of sound only."""
HEAD = struct.Struct("<IId")
"""Before each block: number of samples, 0 before the reason of an error or the end; rate in Hz; length that is stated in s."""
_MEMORY = 512 << 20
"""Bytes beyond those of the started program."""
_CPU_S = 120


def blocks(file: BinaryIO, demuxer: str) -> Iterator[tuple[npt.NDArray[np.float32], int, float]]:
    """Yield the first sound of a file: float32 [samples], channels averaged; the rate in Hz; the stated length in s, 0 for none.

    Raises av.FFmpegError for a damaged file, ValueError for one without sound.
    """
    options = {"format_whitelist": demuxer, "codec_whitelist": ",".join(DECODERS)}
    with av.open(file, "r", demuxer, options, metadata_errors="replace") as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None or stream.codec_context.name not in DECODERS:
            raise ValueError("it has no sound of a known kind")
        stream.codec_context.thread_count = 1
        stated_s = _stated_s(container, stream, demuxer)
        for frame in container.decode(stream):
            if frame.is_corrupt:
                raise ValueError("a part is missing")
            yield _samples(frame), frame.sample_rate, stated_s


def _stated_s(container: Any, stream: Any, demuxer: str) -> float:
    """Return the length in s that a header states; 0: none does. Other lengths are ffmpeg's guesses."""
    if demuxer == "mov":
        return float((stream.duration or 0) * stream.time_base)
    if demuxer == "matroska" and len(container.streams) == 1:
        return float(container.duration or 0) / 1e6
    return 0.0


def _samples(frame: Any) -> npt.NDArray[np.float32]:
    """Return the samples of a frame, float32 [samples], channels averaged."""
    array = frame.to_ndarray()
    if not frame.format.is_planar:
        array = array.reshape(-1, frame.layout.nb_channels).T
    zero, full = {"u": (128, 128), "i": (0, 2 ** (8 * array.dtype.itemsize - 1)), "f": (0, 1)}[array.dtype.kind]
    mean: npt.NDArray[np.float32] = ((array.mean(axis=0, dtype=np.float64) - zero) / full).astype(np.float32)
    return mean


def _main(demuxer: str) -> None:
    if sys.platform == "linux":
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    out, reason = sys.stdout.buffer, ""
    try:
        for pcm, rate, stated_s in blocks(sys.stdin.buffer, demuxer):
            if len(pcm):
                out.write(HEAD.pack(len(pcm), rate, stated_s) + pcm.tobytes())
    except (av.FFmpegError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it needs too much memory"
    out.write(HEAD.pack(0, 0, 0.0) + reason.encode())


if __name__ == "__main__":
    _main(sys.argv[1])
