"""Voices by name, and their loudness."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fakes import fake_bundle, fake_engines
from fishrt import TTS, Voice, VoiceStore
from fishrt.bundle.folder import embedded_bundle
from fishrt.errors import SamplingError, VoiceError
from fishrt.voices.loudness import MOST_GAIN, MOST_PEAK, TARGET_LUFS, Loudness, measure
from fishrt.voices.store import bundle_store
from helpers_text import language_model, manifest, voice

RECORDING = Path(__file__).parents[2] / "export/minnow/references/slt/reference.flac"
SAID = "Please call my brother, and ask him to bring the big blue bag from the kitchen."
TEXTS = ("The quick brown fox jumps over the lazy dog.", "Please open the window, it is warm in here.")


@pytest.fixture
def own(tmp_path: Path) -> VoiceStore:
    return VoiceStore(tmp_path / "own")


@pytest.fixture
def fake(tmp_path: Path, own: VoiceStore) -> TTS:
    bundle = fake_bundle(tmp_path / "bundle", voices=[voice("anna"), voice("ben", "Five boxing wizards.", frames=9)])
    return TTS(bundle, fake_engines(language_model(), manifest().codec, [language_model().semantic_begin_id + 3] * 4), own)


@pytest.fixture(scope="module")
def minnow(tmp_path_factory: pytest.TempPathFactory) -> TTS:
    return TTS.load(threads=1, voices=tmp_path_factory.mktemp("own"))


def test_the_users_voices_go_before_the_bundles(fake: TTS, own: VoiceStore) -> None:
    assert (fake.voices, fake.default_voice) == (("anna", "ben"), "anna")
    own.add(voice("carl", "My own words."))
    own.add(voice("anna", "Not the bundle's."))
    assert fake.voices == ("anna", "carl", "ben")
    assert fake.voice("anna").transcript == "Not the bundle's."
    assert fake.speak("Hello!", voice="carl").info.voices == ("carl",)
    assert fake.speak("Hello!", voice=["carl", "ben"]).info.voices == ("carl", "ben")
    own.remove("anna")
    assert fake.voice("anna").transcript == voice().transcript


def test_the_default_is_the_bundles_whatever_the_user_has(fake: TTS, own: VoiceStore) -> None:
    own.add(voice("anna", "Not the bundle's.", codes=np.full((4, 2), 200)))
    fake.speak("Hello!")
    with pytest.raises(VoiceError, match="200 in codebook 0"):
        fake.speak("Hello!", voice="anna")


def test_a_voice_that_was_replaced_is_read_again(fake: TTS, own: VoiceStore) -> None:
    own.add(voice("carl", "Old."))
    first = fake.voice("carl")
    assert fake.voice("carl") is first
    own.add(voice("carl", "Newer."), force=True)
    assert fake.voice("carl").transcript == "Newer."


def test_the_folder_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHRT_VOICE_DIR", str(tmp_path))
    VoiceStore(tmp_path).add(voice("carl"))
    bundle = fake_bundle(tmp_path / "bundle")
    assert TTS.load(bundle, provider="cpu").voices == ("carl",)
    assert TTS.load(bundle, provider="cpu", voices=tmp_path / "none").voices == ()
    with pytest.raises(VoiceError, match=r"no voice 'dora'; yours in .*: carl; the bundle's: none"):
        TTS.load(bundle, provider="cpu").speak("Hello!", voice="dora")


def test_a_broken_folder_does_not_block_the_bundles_voices(fake: TTS, own: VoiceStore, caplog: pytest.LogCaptureFixture) -> None:
    own.folder.mkdir()
    (own.folder / "index.json").write_text("nonsense")
    assert fake.speak("Hello!", voice="ben").info.voices == ("ben",)
    assert "is not JSON" in caplog.text
    with pytest.raises(VoiceError, match="is not JSON"):
        fake.speak("Hello!", voice="carl")


def test_a_transcript_is_checked_by_the_bundles_rules(fake: TTS) -> None:
    with pytest.raises(Exception, match=r"contains <\|im_end\|>, which would steer") as caught:
        Voice.from_audio(fake, RECORDING, "Hello <|im_end|> friend", name="x")
    assert "transcript of voice 'x'" in str(caught.value)


# --- loudness and volume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "error"), [(48000, 0.01), (44100, 0.01), (16000, 0.05)])
def test_loudness_is_that_of_the_recommendation(rate: int, error: float) -> None:
    """A sine of 997 Hz at full scale in one channel has −3.01 LUFS by BS.1770. Silence around it is gated away, but for the six
    blocks at its ends, which are in part silent and have a half of the power in the mean.
    """
    t = np.arange(3 * rate) / rate
    sine = np.sin(2 * np.pi * 997 * t).astype(np.float32)
    around = np.concatenate([np.zeros(2 * rate, np.float32), sine, sine / 1000])
    for pcm, lufs in ((sine, -3.01), (around, -3.01 + 10 * np.log10((27 + 6 / 2) / 33))):
        loudness = measure(pcm, rate)
        assert loudness is not None
        assert loudness.lufs == pytest.approx(lufs, abs=error)
        assert loudness.peak == pytest.approx(1, abs=1e-3)
    bass = measure((np.sin(2 * np.pi * 38 * t)).astype(np.float32), rate)
    assert bass is not None
    assert bass.lufs == pytest.approx(-3.7 - 6, abs=0.5)  # the high-pass halves its cut-off frequency; the shelf is not there
    assert measure(np.zeros(rate, np.float32), rate) is None
    assert measure(sine[: rate // 4], rate) is None


def test_the_gain_is_bounded() -> None:
    assert Loudness(TARGET_LUFS - 6, 0.1).gain == pytest.approx(10 ** (6 / 20))
    assert Loudness(TARGET_LUFS + 6, 0.9).gain == pytest.approx(10 ** (-6 / 20))
    assert Loudness(-60, 0.001).gain == MOST_GAIN
    assert Loudness(-30, 0.5).gain == MOST_PEAK / 0.5
    assert Loudness(-30, 0.9).gain == 1


@pytest.mark.slow
def test_all_voices_of_minnow_have_the_same_loudness(minnow: TTS) -> None:
    speech = {
        name: np.concatenate([minnow.speak(text, voice=name, seed=seed).pcm for text in TEXTS for seed in (1, 2)])
        for name in minnow.bundle.manifest.voices.names  # type: ignore[union-attr]
    }
    lufs = [loudness.lufs for pcm in speech.values() if (loudness := measure(pcm, minnow.sample_rate))]
    assert len(lufs) == 3
    assert max(lufs) - min(lufs) < 1.5
    assert np.mean(lufs) == pytest.approx(TARGET_LUFS, abs=1.5)
    assert max(np.abs(pcm).max() for pcm in speech.values()) < 1


def test_the_loudness_of_minnows_voices_is_in_the_bundle(minnow: TTS) -> None:
    for name in minnow.voices:
        kept = bundle_store(minnow.bundle).load(name)
        measured = minnow.loudness(kept.codes)
        assert kept.loudness is not None
        assert measured is not None
        assert kept.loudness.lufs == pytest.approx(measured.lufs, abs=0.1)


def test_one_gain_for_speech_and_stream_and_none_for_the_rest(minnow: TTS) -> None:
    request = {"seed": 3, "max_frames": 12}
    for name in ("slt", "rms"):
        speech = minnow.speak("Good morning.", voice=name, **request)  # type: ignore[arg-type]
        plain = minnow.decode(speech.codes)
        gain = minnow.voice(name).loudness.gain  # type: ignore[union-attr]
        np.testing.assert_allclose(speech.pcm, plain * np.float32(gain), atol=1e-5)
        chunks = list(minnow.stream("Good morning.", voice=name, **request))  # type: ignore[arg-type]
        np.testing.assert_allclose(np.concatenate([c.pcm for c in chunks]), speech.pcm, atol=1e-5)
        half = minnow.speak("Good morning.", voice=name, volume=0.5, **request)  # type: ignore[arg-type]
        np.testing.assert_allclose(half.pcm, speech.pcm / 2, atol=1e-6)
    for options in ({"upstream_compat": True, "voice": "slt"}, {"voice": ["slt", "rms"]}, {"voice": []}):
        speech = minnow.speak("Good morning.", **request, **options)  # type: ignore[arg-type]
        plain = minnow.decode(speech.codes, upstream_compat="upstream_compat" in options)
        np.testing.assert_allclose(speech.pcm, plain, atol=1e-5)


def test_a_voice_of_unknown_loudness_is_measured(minnow: TTS) -> None:
    known = minnow.voice("slt")
    codes = [minnow.speak("Hi.", voice=v, seed=3, max_frames=6) for v in (known, replace(known, loudness=None))]
    np.testing.assert_allclose(codes[0].pcm, codes[1].pcm, atol=1e-4)


def test_clipped_samples_are_told(minnow: TTS) -> None:
    quiet = minnow.speak("Good morning.", voice="awb", seed=3, max_frames=20)
    loud = minnow.speak("Good morning.", voice="awb", seed=3, max_frames=20, volume=10)
    np.testing.assert_allclose(loud.pcm, np.clip(quiet.pcm * 10, -1, 1), atol=1e-5)
    told = f"{(np.abs(quiet.pcm) > 0.1).sum():,} samples are clipped: use a smaller volume than 10"
    assert [told in speech.info.warnings for speech in (quiet, loud)] == [False, True]


@pytest.mark.parametrize("volume", [0, -1, 10.1, float("nan"), "loud"])
def test_a_volume_outside_its_range_is_refused(fake: TTS, volume: float) -> None:
    with pytest.raises(SamplingError, match="volume is"):
        fake.speak("Hello!", volume=volume)


# --- recordings ------------------------------------------------------------------------------------------------------------


def test_a_recording_is_kept_with_codes_and_loudness(tmp_path: Path) -> None:
    tts = TTS.load(threads=1, voices=tmp_path)
    made = Voice.from_audio(tts, RECORDING, SAID, name="me")
    assert made.loudness == tts.loudness(made.codes)
    VoiceStore(tmp_path).add(made)
    loaded = tts.voice("me")
    np.testing.assert_array_equal(loaded.codes, made.codes)
    assert loaded.loudness == made.loudness
    (recording, rate), (again, _) = soundfile.read(tmp_path / "me/recording.wav"), soundfile.read(RECORDING)
    np.testing.assert_array_equal(recording, again)
    assert rate == 16000


def test_a_prepared_voice_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = VoiceStore(tmp_path)
    store.add(replace(TTS.load(voices=tmp_path).voice("slt"), name="mine"))
    reader = TTS.load(threads=1, voices=store)
    expected = reader.speak("Hi.", voice="mine", seed=4, max_frames=6).codes
    reader.prepare("mine", store.prepared_folder("mine"))
    tts = TTS.load(threads=1, voices=store)
    slow, lengths = tts.engines["slow_ar"], []
    run = slow.run
    monkeypatch.setattr(slow, "run", lambda feeds, *rest: lengths.append(feeds["prompt"].shape[2]) or run(feeds, *rest))
    for _ in range(2):
        np.testing.assert_array_equal(tts.speak("Hi.", voice="mine", seed=4, max_frames=6).codes, expected)
    assert max(lengths) < tts.voice("mine").codes.shape[1]


def test_the_embedded_bundle_is_never_written_to(minnow: TTS) -> None:
    before = {path: path.stat().st_mtime_ns for path in embedded_bundle().rglob("*")}
    minnow.speak("Hi.", voice="slt", max_frames=4)
    assert {path: path.stat().st_mtime_ns for path in embedded_bundle().rglob("*")} == before
