"""Recordings that libsndfile does not know: webm, m4a, aac, wma; broken ones, and ones that unpack to far more than they are."""

from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.audio import files, unpack, unpacker
from fishrt.audio.files import MAX_RATE, read_audio
from fishrt.errors import AudioError


class Pipe(io.RawIOBase):
    """A file that cannot be sought in, as a browser writes its recording."""

    def __init__(self) -> None:
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)


KINDS = {
    "webm": ("webm", "libopus", "flt", 48000, {}),
    "webm of a browser": ("webm", "libopus", "flt", 48000, {"live": "1"}),
    "m4a": ("ipod", "aac", "fltp", 44100, {}),
    "mp4 for streaming": ("mp4", "aac", "fltp", 44100, {"movflags": "frag_keyframe+empty_moov"}),
    "mov": ("mov", "pcm_s16le", "s16", 44100, {}),
    "mka": ("matroska", "flac", "s16", 16000, {}),
    "3gp": ("3gp", "aac", "fltp", 16000, {}),
    "aac": ("adts", "aac", "fltp", 24000, {}),
    "wma": ("asf", "wmav2", "fltp", 44100, {}),
    "Ogg with FLAC": ("ogg", "flac", "s16", 16000, {}),
}


def packed(kind: str, seconds: float = 2.0, *, channels: int = 1, loud: float = 0.5) -> bytes:
    """Return a recording of a tone of 440 Hz in one of KINDS; of two channels, only the first sounds."""
    muxer, codec, samples, rate, options = KINDS[kind]
    file = Pipe() if "live" in options else io.BytesIO()
    with av.open(file, "w", muxer, options=options) as container:
        layout = "mono" if channels == 1 else "stereo"
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.format = samples
        stream.codec_context.bit_rate = 96000
        tone = loud * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)
        pcm = np.stack([tone] + [np.zeros_like(tone)] * (channels - 1))
        array = (pcm * 32767).astype(np.int16) if samples == "s16" else pcm.astype(np.float32)
        array = array if samples == "fltp" else np.ascontiguousarray(array.T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(array, format=samples, layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return bytes(file.data) if isinstance(file, Pipe) else file.getvalue()


def read(data: bytes, **options: Any) -> tuple[np.ndarray, int]:
    return read_audio(io.BytesIO(data), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_what_libsndfile_does_not_know_is_read(kind: str, tmp_path: Path) -> None:
    rate = KINDS[kind][3]
    (tmp_path / "recording").write_bytes(packed(kind))
    pcm, found = read_audio(tmp_path / "recording")
    assert (found, pcm.dtype) == (rate, np.float32)
    assert 1.99 * rate < len(pcm) < 2 * rate + 2500  # encoders add silence
    middle = pcm[rate // 2 : rate // 2 + rate]
    assert np.std(middle) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)
    assert np.abs(np.fft.rfft(middle)).argmax() == 440


@pytest.mark.parametrize("kind", ["webm", "m4a", "mov", "mka"])
def test_channels_are_averaged(kind: str) -> None:
    pcm, rate = read(packed(kind, channels=2))
    assert np.std(pcm[rate // 2 : rate]) == pytest.approx(0.25 / np.sqrt(2), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_ends_with_the_seconds_that_are_allowed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, taken = packed(kind, 20.0, loud=0.0), 0.0

    def counted(*given: Any) -> Iterator[tuple[np.ndarray, int, float]]:
        nonlocal taken
        for pcm, rate, stated_s in unpack.unpacked(*given):
            taken += len(pcm) / rate
            yield pcm, rate, stated_s

    monkeypatch.setattr(files, "unpacked", counted)
    assert len(read(data, max_seconds=21)[0]) / KINDS[kind][3] == pytest.approx(taken)
    taken = 0.0
    with pytest.raises(AudioError, match=r"too long: at most 2\.0 s"):
        read(data, max_seconds=2)
    assert taken < 4


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("webm of a browser", "wma")])
def test_a_recording_that_breaks_off_is_refused(kind: str) -> None:
    """A browser writes no length into webm, and wma has none that is true: what is missing there cannot be known."""
    data = packed(kind)
    for part in (0.3, 0.6, 0.85):
        with pytest.raises(AudioError):
            read(data[: int(len(data) * part)])


def test_a_file_without_sound() -> None:
    file = io.BytesIO()
    with av.open(file, "w", "webm") as container:
        stream = container.add_stream("libvpx", rate=10, width=32, height=32, pix_fmt="yuv420p")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(AudioError, match="no sound"):
        read(file.getvalue())


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    """Formats of ffmpeg that name other files, which it would open, are not tried."""
    soundfile.write(tmp_path / "secret.wav", np.zeros(1000), 16000)
    for text in ("ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:1,\n{}\n"):
        with pytest.raises(AudioError, match="not audio that can be read"):
            read(text.format(tmp_path / "secret.wav").encode())


def test_an_impossible_rate_is_refused() -> None:
    """A second of it would not fit into memory."""
    data = io.BytesIO()
    soundfile.write(data, np.zeros(100), 16000, format="WAV")
    wav = bytearray(data.getvalue())
    wav[24:28] = (MAX_RATE + 1).to_bytes(4, "little")
    with pytest.raises(AudioError, match="states a rate of 768,001 Hz"):
        read(bytes(wav))


def test_minutes_of_silence_in_a_small_file_take_no_memory() -> None:
    for container, encoding in (("FLAC", "PCM_16"), ("OGG", "VORBIS")):
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", 8000, 1, encoding, format=container) as sound:
            for _ in range(40):
                sound.write(np.zeros(8000 * 30, np.float32))
        tracemalloc.start()
        with pytest.raises(AudioError, match=r"too long: at most 30\.0 s"):
            read(file.getvalue(), max_seconds=30)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10 * len(file.getvalue()) + 10e6


DEMUXERS = {kind: unpack.demuxer_of(packed(kind, 0.1)[:12]) or "" for kind in KINDS}
SMALL = {kind: packed(kind, 0.3) for kind in KINDS}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_changed_bytes_give_sound_or_an_error(kind: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(SMALL[kind])
    for place, byte in changes:
        data[int(place**3 * (len(data) - 1))] = byte
    try:
        for pcm, rate, stated_s in islice(unpacker.blocks(io.BytesIO(data), DEMUXERS[kind]), 100):
            assert (pcm.dtype, pcm.ndim) == (np.float32, 1)
            assert rate >= 0
            assert stated_s >= 0
    except (av.FFmpegError, ValueError):
        return


def boxes(data: bytes, changes: dict[bytes, list[tuple[int, int]]]) -> bytes:
    """Return an MP4 file with other numbers in boxes: name → (offset in bytes after the name, number of 32 bits)."""
    changed = bytearray(data)
    for name, numbers in changes.items():
        at = changed.index(name) + len(name)
        for offset, number in numbers:
            changed[at + offset : at + offset + 4] = number.to_bytes(4, "big")
    return bytes(changed)


@pytest.mark.parametrize("kind", ["m4a", "mp4 for streaming"])
def test_sizes_that_are_not_true_take_no_memory(kind: str, tmp_path: Path) -> None:
    """A hundred million samples of one byte, which ffmpeg would list: gigabytes for a file of a few kB."""
    many = 100_000_000
    if kind == "m4a":
        data = boxes(SMALL[kind], {b"stsz": [(4, 1), (8, many)], b"stsc": [(12, many)], b"stts": [(8, many)]})
    else:
        data = boxes(SMALL[kind], {b"trun": [(0, 1), (4, many)]})
    (tmp_path / "lies").write_bytes(data)
    program = "import resource, sys; from fishrt.audio.files import read_audio; from fishrt.errors import AudioError\n"
    program += "try:\n    read_audio(sys.argv[1])\nexcept AudioError:\n"
    program += "    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # of one decoder, in a process of its own
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path / "lies")], capture_output=True, text=True, check=True)
    assert 0 < int(found.stdout) < 900_000  # kB


def test_a_decoder_that_dies_is_an_error_for_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(AudioError, match="its decoder stopped"):
        read(SMALL["m4a"])


def test_without_pyav_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match="needs PyAV") as caught:
        read(SMALL["m4a"])
    assert "fishrt[server]" in (caught.value.hint or "")
    with pytest.raises(AudioError, match="not audio"):
        read(b"this is no audio")
