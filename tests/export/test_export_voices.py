"""What goes into a bundle beside the graphs: built-in voices and the terms of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from echo_model import EchoModel
from fishrt import TTS
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs
from fishrt.errors import PromptError
from fishrt.text.tokenizer import Tokenizer
from fishrt.voices.store import VoiceStore
from fishrt_export.checkpoint.families import FAMILIES
from fishrt_export.checkpoint.references import References, check_references, copy_licence, encode_references
from fishrt_export.errors import ExportError
from synthetic import write_reference


def checked(checkpoint: Path, bundle: Bundle) -> References | None:
    return check_references(checkpoint, bundle, Tokenizer.load(bundle.file(bundle.manifest.tokenizer)))


def test_references_become_voices(checkpoint: Path, tiny_bundle: Bundle, tmp_path: Path) -> None:
    bundle = Bundle(Path(shutil.copytree(tiny_bundle.path, tmp_path / "bundle")), tiny_bundle.manifest)
    for name in ("ben", "anna"):
        write_reference(checkpoint, name)
    voices = encode_references(checked(checkpoint, bundle), bundle)
    assert voices is not None
    assert (voices.default, voices.names) == ("anna", ("anna", "ben"))
    store = VoiceStore(bundle.path / "voices")
    assert store.list() == ["anna", "ben"]
    voice, codec = store.load("ben"), bundle.manifest.codec
    assert (voice.transcript, voice.fingerprint) == ("This is ben.", codec.fingerprint)
    decoded = TTS(bundle, BundleGraphs(bundle, "cpu", 1)).loudness(voice.codes)
    assert voice.loudness is not None
    assert decoded is not None
    assert voice.loudness.lufs == pytest.approx(decoded.lufs, abs=0.1)
    assert not (bundle.path / "voices/ben/recording.wav").exists()  # its terms are not ours
    assert voice.codes.shape == (len(codec.codebook_sizes), -(-int(0.5 * codec.sample_rate) // codec.hop))


def test_transcripts_are_checked_before_anything_is_exported(checkpoint: Path, tiny_bundle: Bundle) -> None:
    write_reference(checkpoint, "ben")
    (path,) = (checkpoint / "references/ben").glob("*.lab")
    path.write_text("This is <|im_end|> ben.")
    with pytest.raises(PromptError, match="transcript of voice 'ben' contains"):
        checked(checkpoint, tiny_bundle)


def test_no_references_no_voices(checkpoint: Path, tiny_bundle: Bundle) -> None:
    assert checked(checkpoint, tiny_bundle) is None
    (checkpoint / "references").mkdir()
    assert checked(checkpoint, tiny_bundle) is None
    assert tiny_bundle.manifest.voices is None


def test_the_default_voice_can_be_named(checkpoint: Path, tiny_bundle: Bundle) -> None:
    for name in ("ben", "anna"):
        write_reference(checkpoint, name)
    (checkpoint / "references/default.txt").write_text("ben\n")
    references = checked(checkpoint, tiny_bundle)
    assert references is not None
    assert (references.default, references.names) == ("ben", ("anna", "ben"))


def test_recordings_without_words_are_voices_of_a_diffusion_model(echo_model: EchoModel, tmp_path: Path) -> None:
    bundle = Bundle(Path(shutil.copytree(echo_model.bundle.path, tmp_path / "bundle")), echo_model.bundle.manifest)
    write_reference(tmp_path, "anna")
    (tmp_path / "references/anna/a.lab").unlink()
    references = check_references(tmp_path, bundle, None)
    voices = encode_references(references, bundle)
    assert voices is not None
    assert (voices.default, voices.names) == ("anna", ("anna",))
    voice = VoiceStore(bundle.path / "voices").load("anna")
    assert voice.latents is not None
    assert (voice.latents.shape, voice.transcript) == ((8, 80), "")
    (tmp_path / "references/ben").mkdir()
    with pytest.raises(ExportError, match="not voices") as caught:
        check_references(tmp_path, bundle, None)
    assert caught.value.hint == "each needs a recording"


@pytest.mark.parametrize(
    ("files", "name", "file"),
    [
        ({}, "CC-BY-NC-SA-4.0 (of the published Fish Speech 1.5; the checkpoint names none)", None),
        ({"LICENSE.md": "\n# Research License\n\ntext"}, "Research License", "LICENSE.md"),
        ({"README.md": "---\nlicense: other\nlicense_name: research\n---\n"}, "research", "README.md"),
        ({"README.md": "---\nlicense: apache-2.0\n---\n", "LICENSE": "Apache License\n"}, "apache-2.0", "LICENSE"),
        (
            {"README.md": "# A model\n"},
            "CC-BY-NC-SA-4.0 (of the published Fish Speech 1.5; the checkpoint names none)",
            "README.md",
        ),
    ],
)
def test_the_terms_of_the_weights(tmp_path: Path, files: dict[str, str], name: str, file: str | None) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for path, text in files.items():
        (tmp_path / "in" / path).write_text(text, encoding="utf-8")
    licence = copy_licence(tmp_path / "in", tmp_path / "out", FAMILIES["1.5"])
    assert (licence.name, licence.file) == (name, file)
    note = (tmp_path / "out/WEIGHTS-LICENCE.txt").read_text()
    assert "keep the terms of their publisher" in note
    assert name in note
    if file:
        assert (tmp_path / "out" / file).read_text() == files[file]
