"""Speech begins in silence: no tick before each piece, whether it is decoded at once or streamed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fishrt import TTS
from fishrt.arrays import Pcm
from fishrt.bundle.codec_start import CODEC_START, read_codec_start
from fishrt.bundle.folder import Bundle, embedded_bundle, sha256
from fishrt.bundle.manifest import MANIFEST
from fishrt.errors import BundleError

TEXT = "Good morning. " * 12
"""Two pieces."""


@pytest.fixture(scope="module")
def tts() -> TTS:
    return TTS.load(threads=1)


def level(pcm: Pcm, rate: int) -> float:
    """Peak of the first 20 ms, in dB of full scale."""
    return float(20 * np.log10(np.abs(pcm[: rate // 50]).max()))


@pytest.mark.parametrize("voice", ["awb", "rms", "slt"])
def test_every_piece_begins_without_a_tick(tts: TTS, voice: str) -> None:
    hop = tts.bundle.manifest.codec.hop
    said = tts.speak(TEXT, voice=voice, seed=1, max_frames=5)
    starts = np.cumsum([0, *(piece.frames * hop for piece in said.info.pieces)])[:-1]
    assert len(starts) == 2
    assert max(level(said.pcm[start:], tts.sample_rate) for start in starts) < -50

    chunks = list(tts.stream(TEXT, voice=voice, seed=1, max_frames=5))
    pieces = [np.concatenate([c.pcm for c in group]) for _, group in itertools.groupby(chunks, lambda chunk: chunk.piece)]
    assert max(level(pcm, tts.sample_rate) for pcm in pieces) < -50
    np.testing.assert_allclose(np.concatenate(pieces), said.pcm, rtol=0, atol=3e-6)


def test_upstreams_behaviour_begins_from_zeros(tts: TTS) -> None:
    said = tts.speak("Good morning.", seed=1, max_frames=4)
    ours = tts.decode(said.codes)
    assert level(ours, tts.sample_rate) < -50
    literal = tts.decode(said.codes, upstream_compat=True)
    assert level(literal, tts.sample_rate) > -30
    assert level(tts.speak("Good morning.", seed=1, max_frames=4, upstream_compat=True).pcm, tts.sample_rate) > -30
    # The rest of the audio is equal.
    hop = tts.bundle.manifest.codec.hop
    np.testing.assert_allclose(literal[2 * hop :], ours[2 * hop :], rtol=0, atol=1e-3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_bundle(), tmp_path / "bundle"))


def replaced(folder: Path) -> Bundle:
    """Return the bundle with a manifest of its present file."""
    data = json.loads((folder / MANIFEST).read_text())
    file = folder / CODEC_START
    data["files"][CODEC_START] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    (folder / MANIFEST).write_text(json.dumps(data))
    return Bundle.load(folder)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (None, "cannot be read"),
        ({"columns.99": np.zeros((1, 128, 6), np.float32)}, r"holds columns\.99"),
        ({"columns.0": np.zeros((1, 128, 7), np.float32)}, r"holds columns\.0"),
        ({"columns.0": np.zeros((1, 128, 6), np.float64)}, r"holds columns\.0"),
    ],
)
def test_a_file_of_another_codec_is_refused(folder: Path, arrays: dict[str, np.ndarray] | None, says: str) -> None:
    if arrays is None:
        (folder / CODEC_START).write_bytes(b"PK\x03\x04 is no archive")
    else:
        np.savez(folder / CODEC_START, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=says) as caught:
        read_codec_start(replaced(folder))
    assert "export the checkpoint again" in (caught.value.hint or "")


def test_a_bundle_without_one_begins_from_zeros(tiny_bundle: Bundle) -> None:
    assert read_codec_start(tiny_bundle) == {}


def test_export_writes_it_where_there_is_a_tick(folder: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the export extra")
    from fishrt_export.sources.codec_start import write_start

    shipped = read_codec_start(Bundle.load(folder))
    (folder / CODEC_START).unlink()
    manifest = Bundle.load(embedded_bundle()).manifest
    write_start(folder, manifest.specs["codec_encode"], manifest.specs["codec_decode"], manifest.codec)
    with np.load(folder / CODEC_START) as written:
        assert written.keys() == shipped.keys()
        for name, array in shipped.items():
            np.testing.assert_allclose(written[name], array, rtol=1e-3, atol=1e-3)

    noisy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "noisy"))  # its silence is noise from the first sample on
    graphs = tiny_bundle.manifest.specs
    write_start(noisy, graphs["codec_encode"], graphs["codec_decode"], tiny_bundle.manifest.codec)
    assert not (noisy / CODEC_START).exists()
