"""Every program of examples/ runs, with the embedded voice, as its first line says."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SHORT = "Good morning."


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example in an empty folder, which is returned."""
    monkeypatch.chdir(tmp_path)

    def run_example(name: str, *arguments: str) -> Path:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path

    return run_example


def spoken_seconds(path: Path) -> float:
    """Of a file that holds more than silence."""
    pcm, rate = soundfile.read(path)
    assert np.abs(pcm).max() > 0.05
    return len(pcm) / rate


def test_a_text_is_saved(run, capsys):
    folder = run("save.py")
    assert 1 < spoken_seconds(folder / "hello.wav") < 10
    assert capsys.readouterr().out.startswith("hello.wav: ")
    run("save.py", "short.flac", SHORT)
    assert 0.5 < spoken_seconds(folder / "short.flac") < 3


def test_speech_goes_to_a_sound_card(run, monkeypatch):
    """The card is a fake: machines that run tests have none."""
    played: list[np.ndarray] = []

    class OutputStream:
        def __init__(self, samplerate: int, channels: int, dtype: str) -> None:
            assert (samplerate, channels, dtype) == (16000, 1, "float32")

        def __enter__(self) -> OutputStream:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, pcm: np.ndarray) -> None:
            assert pcm.dtype == np.float32
            played.append(pcm.copy())

    monkeypatch.setitem(sys.modules, "sounddevice", types.SimpleNamespace(OutputStream=OutputStream))
    run("play.py", SHORT)
    assert len(played) > 1
    assert np.abs(np.concatenate(played)).max() > 0.05


def test_speech_is_streamed_in_asyncio(run, capsys):
    run("async_stream.py", SHORT)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 1
    assert all(line.startswith("after ") and line.endswith(" s of speech") for line in lines)


def test_a_recording_becomes_a_voice(run):
    reference = ROOT / "export/minnow/references/awb/reference.flac"
    folder = run("own_voice.py", str(reference), reference.with_suffix(".lab").read_text().strip(), SHORT)
    assert 0.5 < spoken_seconds(folder / "own-voice.wav") < 3


def test_each_line_becomes_a_file(run, capsys, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text(f"{SHORT}\n\n...\nThank you.\n")
    folder = run("batch.py", str(lines), "out")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["001.wav", "004.wav"]
    assert all(spoken_seconds(path) > 0.3 for path in (folder / "out").iterdir())
    assert capsys.readouterr().err.startswith("line 3: ")


@pytest.mark.parametrize("name", ["batch.py", "own_voice.py"])
def test_an_example_without_its_arguments_tells_them(run, name):
    with pytest.raises(SystemExit, match=f"python {name}"):
        run(name)


def test_the_notebook_runs_and_holds_no_outputs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cells = [c for c in json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        exec("".join(cell["source"]), names)
    assert 0.5 < spoken_seconds(tmp_path / "hello.wav") < 10


def test_the_list_of_examples_is_complete():
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[`{path.name}`]({path.name})" in listed for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))
