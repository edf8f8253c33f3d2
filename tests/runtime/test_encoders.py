"""Sound that is encoded while it comes: formats, rates, bit rates, and what other decoders hear."""

from __future__ import annotations

import io
import struct
import sys
import wave
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.audio.encode import encode_audio, growing_audio, write_audio
from fishrt.audio.encoders import UNKNOWN, Encoder, open_encoder, pcm16
from fishrt.audio.files import read_audio
from fishrt.audio.resample import resample
from fishrt.errors import AudioError

FRAME = {"wav": 1, "pcm": 1, "flac": 1, "opus": 1, "mp3": 1152, "aac": 1024}
"""Samples by which a decoded stream may be longer than what was encoded, beyond DELAY. Ogg states the exact end of Opus."""
DELAY = {"mp3": 1105, "aac": 1024}
"""Samples of silence that encoder and decoder add to the beginning; only a header of a whole file could state it."""
FORMATS = [*FRAME]


def voice(rate: int, seconds: float = 1.3) -> np.ndarray:
    """Return a gliding harmonic tone that swells, as float32 [samples]."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * (120 * t + 30 * t**2)
    return (np.sin(2 * np.pi * 2 * t) ** 2 * sum(0.2 / k * np.sin(k * phase) for k in range(1, 9))).astype(np.float32)


def encoded(encoder: Encoder, pcm: np.ndarray, size: int) -> list[bytes]:
    """Return what comes back for each part of `size` samples, and at the end."""
    return [*(encoder.push(pcm[at : at + size]) for at in range(0, len(pcm), size)), encoder.finish()]


def decoded(data: bytes, format: str, rate: int) -> np.ndarray:
    """Decode a stream by libsndfile, which shares no code with the encoders, and AAC by PyAV. Check its rate."""
    if format == "pcm":
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    if format == "aac":
        import av

        with av.open(io.BytesIO(data)) as file:
            frames = list(file.decode(audio=0))
        assert {frame.sample_rate for frame in frames} == {rate}
        return np.concatenate([frame.to_ndarray()[0] for frame in frames])
    blocks = []
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (file.samplerate, file.channels) == (rate, 1)
        file.seekable = lambda: False
        while len(block := file.read(1000, dtype="float32")):
            blocks.append(block)
    return np.concatenate(blocks)


def likeness(heard: np.ndarray, expected: np.ndarray) -> tuple[int, float]:
    """Return the delay in samples at which the two are most alike, and their correlation there."""
    points = 1 << (len(heard) + len(expected)).bit_length()
    alike = np.fft.irfft(np.fft.rfft(heard, points) * np.conj(np.fft.rfft(expected, points)))
    delay = int(alike.argmax())
    part = heard[delay : delay + len(expected)]
    return delay, float(np.corrcoef(part, expected[: len(part)])[0, 1])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rate", [16000, 24000, 44100, 12345, 96000])
def test_a_stream_sounds_like_what_was_pushed(format: str, rate: int) -> None:
    pcm, encoder = voice(rate), open_encoder(format, rate)
    heard = decoded(b"".join(encoded(encoder, pcm, rate // 20)), format, encoder.rate)
    expected = resample(pcm, rate, encoder.rate)
    extra, delay = len(heard) - len(expected), DELAY.get(format, 0)
    assert 0 <= extra <= delay + FRAME[format]
    found, alike = likeness(heard, expected)
    assert delay <= found <= delay + 1
    assert alike > 0.99


@pytest.mark.parametrize("format", FORMATS)
def test_parts_of_any_size_give_the_same_stream(format: str) -> None:
    pcm = voice(24000, 0.7)
    whole = b"".join(encoded(open_encoder(format, 24000), pcm, len(pcm)))
    for size in (77, 1024, 5000):
        parts = b"".join(encoded(open_encoder(format, 24000), pcm, size))
        if format == "opus":  # each stream has another serial number
            np.testing.assert_array_equal(decoded(parts, format, 48000), decoded(whole, format, 48000))
        else:
            assert parts == whole


@pytest.mark.parametrize("format", FORMATS)
def test_a_player_can_begin_soon(format: str) -> None:
    """After 0.3 s there is sound in the bytes, and each further 0.2 s brings more."""
    parts = encoded(open_encoder(format, 16000), voice(16000, 1.0), 1600)
    rate = open_encoder(format, 16000).rate
    assert len(decoded(b"".join(parts[:3]), format, rate)) > 0.05 * rate
    assert all(first + second for first, second in pairwise(parts[3:-1]))


@pytest.mark.parametrize(
    ("format", "rate", "expected"),
    [
        ("opus", 16000, 48000),
        ("mp3", 12345, 16000),
        ("mp3", 96000, 48000),
        ("aac", 4000, 8000),
        ("flac", 12345, 12345),
        ("wav", 7, 7),
    ],
)
def test_a_stream_has_a_rate_that_its_format_can_hold(format: str, rate: int, expected: int) -> None:
    assert open_encoder(format, rate).rate == expected
    assert open_encoder(format, 44100, target=rate).rate == expected


@pytest.mark.parametrize(("asked", "kbit"), [(64, 64), (192_000, 192), (None, 128)])
@pytest.mark.parametrize("rate", [11025, 16000, 44100])
def test_mp3_has_the_bit_rate_that_was_asked_for(rate: int, asked: int | None, kbit: int) -> None:
    """A low sample rate has no high bit rates: it gives way to one that was asked for, and the usual one gives way to it."""
    pcm, encoder = voice(rate, 4), open_encoder("mp3", rate, bitrate=asked)
    data = b"".join(encoded(encoder, pcm, rate))
    expected = min(kbit, 64) if asked is None and rate < 16000 else kbit
    assert len(data) * 8 / 4000 == pytest.approx(expected, rel=0.04)
    assert (encoder.rate == rate) == (asked != 192_000 or rate == 44100)


def test_opus_has_the_bit_rate_that_was_asked_for() -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 4 * 48000).astype(np.float32)
    sizes = [len(b"".join(encoded(open_encoder("opus", 48000, bitrate=asked), noise, 9600))) for asked in (24, 24000, 64)]
    assert [size / 500 for size in sizes] == pytest.approx([24, 24, 64], rel=0.15)  # bytes of 4 s as kbit/s
    automatic, usual = (
        len(b"".join(encoded(open_encoder("opus", 48000, bitrate=asked), noise, 9600))) for asked in (-1000, None)
    )
    assert automatic == usual


@pytest.mark.parametrize(
    ("format", "asked"), [("mp3", 100), ("mp3", 0), ("mp3", -1000), ("opus", 5), ("opus", 600_000), ("wav", 64)]
)
def test_a_bit_rate_that_cannot_be_is_refused(format: str, asked: int) -> None:
    with pytest.raises(AudioError, match="bit rate"):
        open_encoder(format, 16000, bitrate=asked)


@pytest.mark.parametrize("format", FORMATS)
def test_no_sound_is_a_stream_without_sound(format: str) -> None:
    data = b"".join(encoded(open_encoder(format, 24000), np.empty(0, np.float32), 1))
    assert data[:4] == {"wav": b"RIFF", "flac": b"fLaC", "opus": b"OggS"}.get(format, b"")


def test_streams_do_not_state_a_length() -> None:
    """MP3 begins with a frame of sound, without the frame "Info"; the sizes of wav are unknown; so is the length of FLAC."""
    mp3, wav, flac = (b"".join(encoded(open_encoder(name, 44100), voice(44100), 4410)) for name in ("mp3", "wav", "flac"))
    assert mp3[:2] == b"\xff\xfb"
    assert not any(mark in mp3 for mark in (b"ID3", b"Xing", b"Info", b"TAG"))
    assert wav.count(b"RIFF") == 1
    assert struct.unpack("<I", wav[4:8]) == struct.unpack("<I", wav[40:44]) == (UNKNOWN,)
    with wave.open(io.BytesIO(wav)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (44100, 1, 2)
    assert int.from_bytes(flac[21:26], "big") & (1 << 36) - 1 == 0
    assert read_audio(io.BytesIO(flac))[0].shape == read_audio(io.BytesIO(wav))[0].shape == voice(44100).shape


@pytest.mark.parametrize("format", FORMATS)
def test_a_complete_stream_states_its_length(format: str) -> None:
    pcm, encoder = voice(24000), open_encoder(format, 24000)
    data = b"".join(encoded(encoder, pcm, 1000))
    complete = encoder.complete(data)
    assert len(complete) == len(data)
    if format in ("wav", "flac"):
        whole, rate = soundfile.read(io.BytesIO(complete), dtype="int16")
        np.testing.assert_array_equal(whole, pcm16(pcm))
        assert rate == 24000
    else:
        assert complete == data


def test_a_file_of_aac(tmp_path: Path) -> None:
    """AAC has no writer but the one of streams."""
    write_audio(tmp_path / "a.aac", voice(16000), 16000)
    assert (tmp_path / "a.aac").read_bytes() == b"".join(encoded(open_encoder("aac", 16000), voice(16000), 100))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.opus", "a.aac", "a.pcm"])
def test_a_file_grows_in_each_format(tmp_path: Path, name: str) -> None:
    """wav and FLAC state their length at the end."""
    format = name[2:]
    with growing_audio(tmp_path / name, 16000) as file:
        for part in np.array_split(voice(16000), 7):
            file.write(part)
    data = (tmp_path / name).read_bytes()
    assert (
        likeness(decoded(data, format, 48000 if format == "opus" else 16000)[::1], voice(48000 if format == "opus" else 16000))[1]
        > 0.99
    )
    if format in ("wav", "flac"):
        assert soundfile.info(tmp_path / name).frames == len(voice(16000))


def test_samples_outside_the_range_are_clipped() -> None:
    loud = np.array([2, -2] * 2000, np.float32).repeat(20)
    for format in ("mp3", "opus", "aac", "flac", "wav"):
        encoder = open_encoder(format, 48000)
        heard = decoded(b"".join(encoded(encoder, loud, 4000)), format, 48000)
        assert np.abs(heard).mean() < 1.1


def test_without_pyav_wav_and_pcm_remain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    for format in FORMATS:
        if format in ("wav", "pcm"):
            assert open_encoder(format, 16000).push(voice(16000))
            continue
        with pytest.raises(AudioError, match=f"{format} needs PyAV") as caught:
            open_encoder(format, 16000)
        assert "fishrt[server]" in (caught.value.hint or "")
    for name in ("a.mp3", "a.flac", "a.opus"):
        write_audio(tmp_path / name, voice(16000), 16000)
    with pytest.raises(AudioError, match="aac needs PyAV"):
        write_audio(tmp_path / "a.aac", voice(16000), 16000)
    assert not (tmp_path / "a.aac").exists()
    with pytest.raises(AudioError, match="no streams of ogg"):
        open_encoder("ogg", 16000)
    assert encode_audio(voice(16000), 16000, "ogg")
