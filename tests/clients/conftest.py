"""Real clients against a real server. Each client is driven by a program of `programs/`, in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="needs the server extra")

from fishrt import TTS
from quality import Recogniser, VoiceClassifier, mfcc_summary, word_errors, words
from serving import Server, serving

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parents[1] / ".venv-clients"
PYTHON = ENVIRONMENT / "bin/python"
TEXT = "Good morning! The sun is shining, and the birds are singing in the trees."
SAMPLE_TEXT, SAMPLE_VOICE = "May you live in interesting times.", "slt"
KEY = "secret"
_RATE = 16_000


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of this folder, and skip those whose client is not in the environment of clients."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("clients")
            made, target = ("large", "clients") if item.get_closest_marker("large") else ("small", "test")
            if not (ENVIRONMENT / made).exists():
                item.add_marker(
                    pytest.mark.skip(reason=f"the client is not installed here: `make {target}` installs and runs it")
                )


@dataclass(frozen=True)
class Heard:
    """Sound that a client received, as another decoder than fishrt's reads it."""

    pcm: np.ndarray
    """float32 [samples] at 16 kHz"""

    @property
    def seconds(self) -> float:
        return len(self.pcm) / _RATE


@pytest.fixture(scope="session")
def ffmpeg() -> str:
    """The path of ffmpeg, which is in a package of the clients' environment."""
    code = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"
    return subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="session")
def hear(ffmpeg: str) -> Callable[..., Heard]:
    """Return what ffmpeg decodes of a file. pcm_rate: that of a file without a header, in Hz."""

    def heard(path: Path, *, pcm_rate: int = 0) -> Heard:
        raw = ["-f", "s16le", "-ac", "1", "-ar", str(pcm_rate)] if pcm_rate else []
        command = [ffmpeg, "-v", "error", *raw, "-i", str(path), "-f", "f32le", "-ac", "1", "-ar", str(_RATE), "-"]
        done = subprocess.run(command, capture_output=True)
        assert not done.returncode, done.stderr.decode()
        assert not done.stderr, done.stderr.decode()
        return Heard(np.frombuffer(done.stdout, np.float32))

    return heard


@pytest.fixture(scope="session")
def share_understood() -> Callable[..., float]:
    """Return the share of a text's words that an independent recogniser understands."""
    recogniser = Recogniser()

    def share(sound: Heard, text: str = TEXT) -> float:
        return 1 - word_errors(text, recogniser(sound.pcm, _RATE)) / len(words(text))

    return share


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that anybody may use; its output goes on with the page's address and that of Wyoming."""
    with serving(tmp_path_factory.mktemp("server"), "--wyoming-port", "0") as started:
        yield started


@pytest.fixture(scope="session")
def wyoming_url(server: Server) -> str:
    """The address of the server in Wyoming's protocol."""
    assert server.process.stdout
    _, wyoming = (server.process.stdout.readline() for _ in range(2))
    return wyoming.removeprefix("Wyoming: ").strip()


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, that speaks one request at a time and lets none wait."""
    options = ("--max-active", "1", "--max-queue", "0")
    with serving(tmp_path_factory.mktemp("keyed"), *options, FISHRT_API_KEY=KEY) as started:
        yield started


@pytest.fixture(scope="session")
def text() -> str:
    """A text that is understood whoever speaks it, with any seed: the most wrong words in 96 tries were 4 of 14."""
    return TEXT


@pytest.fixture(scope="session")
def tts() -> Iterator[TTS]:
    with TTS.load(threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def sample(tts: TTS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of `SAMPLE_TEXT`, in a voice that is not the default one."""
    path = tmp_path_factory.mktemp("sample") / "sample.wav"
    speech = tts.speak(SAMPLE_TEXT, voice=SAMPLE_VOICE, seed=1)
    soundfile.write(path, speech.pcm, speech.sample_rate)
    return path


@pytest.fixture(scope="session")
def voice_of(tts: TTS) -> Callable[[Heard], str]:
    """Return which of the embedded voices a sound is like."""
    examples = {
        name: [mfcc_summary(tts.speak(TEXT, voice=name, seed=seed).pcm, _RATE) for seed in range(4)]
        for name in tts.bundle.manifest.voices.ordered  # type: ignore[union-attr]
    }
    classifier = VoiceClassifier(examples)
    return lambda sound: classifier(mfcc_summary(sound.pcm, _RATE))


class Report:
    """What a program saw."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found = json.loads((folder / "report.json").read_text())

    def __call__(self, scenario: str) -> Any:
        """Return the result of a scenario; fail with its traceback if it has none."""
        found = self._found[scenario]
        if "traceback" in found:
            pytest.fail(found["traceback"], pytrace=False)
        return found["result"]


@pytest.fixture(scope="session")
def drive(
    server: Server, keyed_server: Server, wyoming_url: str, sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Report]:
    """Run a program against the servers, and return what it saw."""

    def driven(program: str, *command: str) -> Report:
        folder = tmp_path_factory.mktemp(Path(program).stem)
        shutil.copy(sample, folder / "sample.wav")
        (folder / "text.txt").write_text(TEXT)
        (folder / "sample.txt").write_text(SAMPLE_TEXT)
        urls = [f"http://127.0.0.1:{each.port}" for each in (server, keyed_server)]
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [*(command or [str(PYTHON)]), str(HERE / "programs" / program), *urls, wyoming_url, str(folder)],
            env=kept,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert not done.returncode, done.stdout
        return Report(folder)

    return driven
