"""Audio files that are read, and their errors."""

from __future__ import annotations

import io
import os
import sys
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.audio.encode import write_audio
from fishrt.audio.files import check_pcm, read_audio
from fishrt.errors import AudioError

RATE = 16000
TONE = (0.5 * np.sin(np.arange(RATE // 2) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def test_channels_are_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", np.stack([TONE, np.zeros_like(TONE), TONE / 2], axis=1), RATE, "FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "s.wav")[0], TONE / 2, atol=1e-7)


def test_an_open_file_is_read() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, TONE, RATE, format="FLAC")
    buffer.seek(0)
    assert len(read_audio(buffer)[0]) == len(TONE)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    (folder / "text.wav").write_text("this is no audio")
    (folder / "nothing.wav").write_bytes(b"")
    soundfile.write(folder / "empty.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.array([0, np.nan]), RATE, "FLOAT")
    return {
        "missing": (folder / "missing.wav", "No such file"),
        "folder": (folder, "Is a directory"),
        "text": (folder / "text.wav", "not audio"),
        "no bytes": (folder / "nothing.wav", "is empty"),
        "no samples": (folder / "empty.wav", "no samples"),
        "not numbers": (folder / "nan.wav", "not numbers"),
    }


@pytest.mark.parametrize("case", ["missing", "folder", "text", "no bytes", "no samples", "not numbers"])
def test_files_that_cannot_be_used_are_named(tmp_path: Path, case: str) -> None:
    path, says = bad_files(tmp_path)[case]
    with pytest.raises(AudioError, match=says) as caught:
        read_audio(path)
    assert str(path) in str(caught.value)


def test_the_length_is_checked_while_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.wav", "a.mp3"):
        write_audio(tmp_path / name, TONE, RATE)
        assert len(read_audio(tmp_path / name, max_seconds=0.5)[0]) == len(TONE)
        with pytest.raises(AudioError, match=rf"{name} is too long: at most 0\.4 s"):
            read_audio(tmp_path / name, max_seconds=0.4)
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **rest: asked.append(n) or read(self, n, **rest))
    write_audio(tmp_path / "long.wav", np.zeros(RATE * 60, np.float32), RATE)
    with pytest.raises(AudioError, match="too long"):
        read_audio(tmp_path / "long.wav", max_seconds=0.4)
    assert len(asked) == 1


def test_memory_that_does_not_suffice_is_an_error_for_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    write_audio(tmp_path / "a.wav", TONE, RATE)
    monkeypatch.setattr(soundfile.SoundFile, "read", no_memory)
    with pytest.raises(AudioError, match=r"a\.wav is too long for the memory"):
        read_audio(tmp_path / "a.wav")


# --- lengths that headers state wrongly, and joined files --------------------------------------------------------------------


def encoded(container: str, encoding: str, pcm: np.ndarray = TONE, rate: int = RATE, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, encoding, format=container, **options) as file:
        file.write(pcm)
    return buffer.getvalue()


def read_bytes(data: bytes) -> np.ndarray:
    return read_audio(io.BytesIO(data))[0]


def level(pcm: np.ndarray) -> float:
    return float(np.abs(pcm).max())


UNSEEKABLE = [
    *((container, "GSM610") for container in ("WAV", "W64", "AIFF")),
    *(("WAV", encoding) for encoding in ("G721_32", "NMS_ADPCM_16", "NMS_ADPCM_24", "NMS_ADPCM_32")),
    *(("AU", encoding) for encoding in ("G721_32", "G723_24", "G723_40")),
    *(("XI", encoding) for encoding in ("DPCM_8", "DPCM_16")),
]


@pytest.mark.parametrize(("container", "encoding"), UNSEEKABLE)
def test_encodings_that_cannot_be_seeked_are_read(container: str, encoding: str) -> None:
    pcm = read_bytes(encoded(container, encoding))
    assert len(TONE) <= len(pcm) < len(TONE) + 400  # whole blocks
    assert np.sqrt(np.square(pcm).mean()) == pytest.approx(0.35, abs=0.07)


VOICED = np.random.default_rng(1).standard_normal(RATE * 2).astype(np.float32) * np.repeat([0.001, 0.2], RATE)
"""Quiet, then loud: with a variable bit rate, the first frame does not predict the length."""


def test_mp3_of_variable_bit_rate_without_a_count_is_read_to_its_end() -> None:
    data = encoded("MP3", "MPEG_LAYER_III", VOICED, bitrate_mode="VARIABLE", compression_level=0.5)
    assert len(read_bytes(data)) == len(VOICED)
    assert len(soundfile.read(io.BytesIO(data.replace(b"Xing", bytes(4))))[0]) != len(VOICED)  # libsndfile's estimate
    for tag in (b"", b"TAG" + bytes(125)):
        pcm = read_bytes(data.replace(b"Xing", bytes(4)) + tag)
        assert len(VOICED) <= len(pcm) <= len(VOICED) + 3 * 1152
        assert level(pcm[RATE // 2 : RATE]) < 0.01 < 0.1 < level(pcm[-RATE // 2 :])


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_joined_mp3_is_read_to_its_end(mode: str) -> None:
    data = encoded("MP3", "MPEG_LAYER_III", VOICED, bitrate_mode=mode, compression_level=0.5)
    for between in (b"", b"ID3\4\0\0\0\0\1\0" + bytes(128)):
        assert 2 * len(VOICED) <= len(read_bytes(data + between + data)) <= 2 * len(VOICED) + 6 * 1152


@pytest.mark.parametrize("between", [b"", b"ID3\4\0\0\0\0\1\0" + b"\xff\xfb\x90\x64" * 32, b"TAG" + bytes(125)])
def test_joined_mp3_of_other_channels_is_read_to_its_end_and_of_other_rates_refused(between: bytes) -> None:
    data, other = encoded("MP3", "MPEG_LAYER_III"), io.BytesIO()
    soundfile.write(other, np.stack([TONE, TONE], axis=1), RATE, "MPEG_LAYER_III", format="MP3")
    for joined in (data + between + other.getvalue(), other.getvalue() + between + data):
        assert len(read_bytes(joined)) == 2 * len(TONE)
    for rate in (22050, 48000):
        with pytest.raises(AudioError, match=f"16,000 Hz and {rate:,} Hz"):
            read_bytes(data + between + encoded("MP3", "MPEG_LAYER_III", TONE, rate))


def test_mp3_that_breaks_off_keeps_its_whole_frames_and_rubbish_inside_is_refused() -> None:
    data = encoded("MP3", "MPEG_LAYER_III", VOICED, bitrate_mode="CONSTANT", compression_level=0.5)
    assert len(VOICED) - 2 * 1152 < len(read_bytes(data[:-100])) <= len(VOICED)
    middle = len(data) // 2
    with pytest.raises(AudioError, match=r"damaged 0\.9 s from its start|damaged 1\.\d s from its start"):
        read_bytes(data[:middle] + bytes(range(16)) * 400 + data[middle:])


CHUNKS = [("WAV", "PCM_16"), ("WAV", "IMA_ADPCM"), ("AIFF", "PCM_16"), ("AU", "PCM_16"), ("SVX", "PCM_16"), ("NIST", "PCM_16")]
CHUNKS += [("RF64", "PCM_16"), ("W64", "PCM_16"), ("W64", "MS_ADPCM")]
SOUNDS = [*CHUNKS, ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("container", "encoding"), [*SOUNDS, ("MP3", "MPEG_LAYER_III")])
def test_a_file_that_breaks_off_is_refused(container: str, encoding: str) -> None:
    sound = np.random.default_rng(1).uniform(-0.3, 0.3, RATE * 36 // 10).astype(np.float32)
    data = encoded(container, encoding, sound)
    assert len(sound) <= len(read_bytes(data)) < len(sound) + 600
    says = {"FLAC": "damaged", "OGG": r"breaks off after [01]\.\d s"}.get(container, r"breaks off after 1\.8 of 3\.[67] s")
    for joined in (b"", data):
        # The whole of joined mp3 is not stated; the others are not read as joined.
        if not joined or container not in ("MP3", "AU", "SVX", "NIST", "RF64", "W64"):
            with pytest.raises(AudioError, match=says):
                read_bytes(joined + data[: len(data) // 2])


def test_ogg_that_ends_between_two_pages_is_read_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    data = encoded("OGG", "VORBIS", VOICED)
    assert len(read_bytes(data)) == len(VOICED)
    assert caplog.text == ""
    assert 0 < len(read_bytes(data[: data.rindex(b"OggS")])) < len(VOICED)
    assert "has no mark of its end: it may break off after 1." in caplog.text
    with pytest.raises(AudioError, match="breaks off"):
        read_bytes(data[: data.rindex(b"OggS") + 10])


def test_flac_that_ends_between_two_frames_is_refused_if_its_length_is_stated() -> None:
    data = bytearray(encoded("FLAC", "PCM_16"))
    data[22:26] = (2 * len(TONE)).to_bytes(4, "big")
    with pytest.raises(AudioError, match=r"breaks off after 0\.5 of 1\.0 s"):
        read_bytes(bytes(data))


def test_a_few_bytes_may_be_lacking_at_the_end() -> None:
    for container, encoding in ((container, encoding) for container, encoding in CHUNKS if encoding == "PCM_16"):
        assert len(read_bytes(encoded(container, encoding)[:-100])) == len(TONE) - 50


@pytest.mark.parametrize("channels", [2, 1024])
def test_memory_does_not_grow_with_the_channels(channels: int) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.tile(TONE[:2000, None], channels), RATE, format="WAV")
    tracemalloc.start()
    pcm = read_bytes(buffer.getvalue())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_allclose(pcm, TONE[:2000], atol=4e-5)
    assert peak < 2 * len(buffer.getvalue()) + 2**20


def test_the_shift_of_mp3_is_left_out_only_where_it_is_quiet() -> None:
    data = encoded("MP3", "MPEG_LAYER_III", TONE, bitrate_mode="CONSTANT", compression_level=0.5)
    pcm = read_bytes(data.replace(b"Info", bytes(4)))
    assert level(pcm[576:1600]) > 0.3  # the frame that held the count is silent now
    cut = data[len(data) // 2 :]
    loud = read_bytes(cut[cut.index(data[:2]) :])
    assert level(loud[1200:1600]) > 0.3


def test_flac_of_unknown_or_wrong_length_is_read_to_its_end() -> None:
    data = bytearray(encoded("FLAC", "PCM_16"))
    assert int.from_bytes(data[22:26], "big") == len(TONE)
    for told in (0, 100):
        data[22:26] = told.to_bytes(4, "big")
        for tag in (b"", b"TAG" + bytes(125)):
            np.testing.assert_allclose(read_bytes(bytes(data) + tag), TONE, atol=2e-5)
    with pytest.raises(AudioError, match="damaged"):
        read_bytes(bytes(data[:-1000]))


@pytest.mark.parametrize("told", [0, 100, 0x7FFFFFFF, 0xFFFFFFFF])
def test_wav_of_unknown_or_wrong_length_is_read_to_its_end(told: int) -> None:
    data = bytearray(encoded("WAV", "PCM_16"))
    data[40:44] = told.to_bytes(4, "little")
    np.testing.assert_allclose(read_bytes(bytes(data)), TONE, atol=4e-5)
    au = bytearray(encoded("AU", "PCM_16"))
    au[8:12] = told.to_bytes(4, "big")
    np.testing.assert_allclose(read_bytes(bytes(au)), TONE, atol=4e-5)


def test_chunks_behind_the_sound_of_a_wav_are_no_sound() -> None:
    data = encoded("WAV", "PCM_16")
    assert len(read_bytes(data + b"LIST" + (400).to_bytes(4, "little") + bytes(400))) == len(TONE)
    assert len(read_bytes(data + bytes(300))) == len(TONE)


@pytest.mark.parametrize(
    ("container", "encoding"),
    [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("WAV", "GSM610"), ("AIFF", "PCM_16")],
)
def test_joined_files_are_read_to_their_end(container: str, encoding: str) -> None:
    data, other = encoded(container, encoding), encoded(container, encoding, TONE[::2].copy())
    parts = [len(read_bytes(part)) for part in (data, other, data)]
    assert len(read_bytes(data + other + data)) == sum(parts)
    if encoding != "GSM610":
        with pytest.raises(AudioError, match=r"16,000 Hz and 24,000 Hz|16,000 Hz and 48,000 Hz"):
            read_bytes(data + encoded(container, encoding, TONE, 24000))


def test_samples_of_another_scale_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", TONE * 32768, RATE, "FLOAT")
    with pytest.raises(AudioError, match=r"samples of .*a\.wav reach ±16,384; −1 to 1 is expected"):
        read_audio(tmp_path / "a.wav")
    soundfile.write(tmp_path / "loud.wav", TONE * 6, RATE, "FLOAT")
    assert level(read_audio(tmp_path / "loud.wav")[0]) == pytest.approx(3)
    with pytest.raises(AudioError, match="reach ±16,384"):
        check_pcm(TONE * 32768, RATE)


@pytest.mark.parametrize("encoding", ["PCM_16", "GSM610"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_read_to_its_end(tmp_path: Path, encoding: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    data = encoded("WAV", encoding)
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data))
    writer.start()
    pcm, _ = read_audio(tmp_path / "pipe")
    writer.join()
    np.testing.assert_array_equal(pcm, read_bytes(data))


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(encoded("WAV", "PCM_16"))))
    assert len(read_audio("-")[0]) == len(TONE)
    with pytest.raises(AudioError, match="standard input is empty"):
        read_audio("-")


def test_a_pipe_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.audio.files.MAX_PIPED_BYTES", 1000)
    with pytest.raises(AudioError, match="does not end"):
        read_bytes(encoded("WAV", "PCM_16"))


@given(
    data=st.binary(max_size=300), head=st.sampled_from([b"RIFF", b"RIFF\0\0\0\0WAVEdata", b"OggS\0\2", b"fLaC", b"ID3", b".snd"])
)
@settings(max_examples=60, deadline=None)
def test_rubbish_is_refused(data: bytes, head: bytes) -> None:
    with pytest.raises(AudioError):
        read_bytes(head + data)
