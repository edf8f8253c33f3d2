"""curl | ffmpeg: a stream is decoded while it comes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


def piped(server: Any, ffmpeg: str, path: Path, **fields: Any) -> str:
    """Speak through a pipe into a wav file; return what curl and ffmpeg complain of."""
    raw = ["-f", "s16le", "-ac", "1", "-ar", "16000"] if fields["response_format"] == "pcm" else []
    body = json.dumps({"seed": 6, "voice": "awb", "stream": True, **fields})
    asking = ["curl", "-sS", "--fail", "-N", f"http://127.0.0.1:{server.port}/v1/audio/speech", "--json", body]
    hearing = [ffmpeg, "-v", "error", "-y", *raw, "-i", "pipe:0", "-ac", "1", str(path)]
    with subprocess.Popen(asking, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as curl:
        heard = subprocess.run(hearing, stdin=curl.stdout, stderr=subprocess.PIPE, text=True)
        said = heard.stderr + curl.communicate()[1]
    assert (curl.returncode, heard.returncode) == (0, 0), said
    return said


@pytest.mark.parametrize("form", ["wav", "mp3", "opus", "aac", "flac", "pcm"])
def test_a_stream_in_a_pipe(
    server: Any, ffmpeg: str, hear: Any, share_understood: Any, text: str, tmp_path: Path, form: str
) -> None:
    assert not piped(server, ffmpeg, tmp_path / "sound.wav", input=text, response_format=form)
    assert not piped(server, ffmpeg, tmp_path / "whole.wav", input=text, response_format="wav", stream=False)
    sound, whole = hear(tmp_path / "sound.wav"), hear(tmp_path / "whole.wav")
    assert share_understood(sound) > 0.5
    # mp3 and aac have whole frames, and no place to tell how much of them is padding.
    assert sound.seconds == pytest.approx(whole.seconds, abs=0.1 if form in ("mp3", "aac") else 0.002)


def test_a_long_text_in_a_pipe(server: Any, ffmpeg: str, hear: Any, text: str, tmp_path: Path) -> None:
    """Several pieces of text are one stream."""
    for name, form in (("sound", "opus"), ("whole", "wav")):
        assert not piped(server, ffmpeg, tmp_path / f"{name}.wav", input=f"{text} " * 5, response_format=form)
    assert hear(tmp_path / "sound.wav").seconds == pytest.approx(hear(tmp_path / "whole.wav").seconds, abs=0.002)
