from __future__ import annotations

import dataclasses
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fishrt.bundle.features import Reads
from fishrt.bundle.folder import Bundle
from fishrt.errors import ArgumentError, AudioError, OutputError, PromptError, VoiceError
from fishrt.voices.loudness import Loudness, measure
from fishrt.voices.recordings import doubts
from fishrt.voices.store import VoiceStore, find_voice
from fishrt.voices.voice import Voice, read_codes
from helpers_text import language_model, manifest, voice

RATE = 16000


class FakeTts:
    """A TTS that encodes a recording to its number of frames."""

    def __init__(self, content=None):
        self.bundle = Bundle(Path("some bundle"), content or manifest())
        self.encoded = 0

    def encode(self, pcm, rate):
        codec = self.bundle.manifest.codec
        self.encoded += 1
        frames = -(-len(pcm) * codec.sample_rate // rate // codec.hop)
        return np.full((len(codec.codebook_sizes), frames), 5, dtype=np.int64)

    def loudness(self, codes):
        return Loudness(-20.0 - codes.shape[1] / 100, 0.5)

    def check_transcript(self, text, what):
        if "<|" in text:
            raise PromptError(f"{what} contains a control token")


SAID = "Please call my brother, and ask him to bring the big blue bag from the kitchen."
SPEECH = soundfile.read(Path(__file__).parents[2] / "export/minnow/references/awb/reference.flac", dtype="float32")[0]


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return np.sin(np.arange(int(seconds * rate)) * 0.1).astype(np.float32) * 0.5


@pytest.fixture
def store(tmp_path):
    return VoiceStore(tmp_path / "voices")


def same(a: Voice, b: Voice) -> bool:
    texts = (a.name, a.transcript, a.fingerprint) == (b.name, b.transcript, b.fingerprint)
    return texts and a.codes.dtype == b.codes.dtype and np.array_equal(a.codes, b.codes)


def test_a_store_gives_back_what_it_was_given(store):
    assert store.list() == []
    first, second = voice("Anna-Marie 2", "Grüße, 世界!"), voice("bob_b", fingerprint=None)
    assert store.add(first) == store.folder / "Anna-Marie 2"
    store.add(second)
    assert store.list() == ["Anna-Marie 2", "bob_b"]
    assert same(store.load("Anna-Marie 2"), first)
    assert same(store.load("bob_b"), second)
    assert {p.name for p in (store.folder / "bob_b").iterdir()} == {"voice.json", "codes.npy"}  # there was no recording
    store.remove("bob_b")
    assert store.list() == ["Anna-Marie 2"]
    assert [p.name for p in store.folder.iterdir()] == ["Anna-Marie 2"]


def of_codec(fingerprint: str) -> FakeTts:
    return FakeTts(dataclasses.replace(manifest(), codec=dataclasses.replace(manifest().codec, fingerprint=fingerprint)))


def test_a_recording_serves_every_codec(store):
    first, other = FakeTts(), of_codec("f" * 64)
    made = Voice.from_audio(first, (tone(1.0), RATE), "What I say.", name="me")
    store.add(made)
    np.testing.assert_array_equal(soundfile.read(store.folder / "me/recording.wav", dtype="float32")[0], tone(1.0))
    loaded = store.load("me", other)
    assert (loaded.fingerprint, loaded.transcript, loaded.loudness) == ("f" * 64, "What I say.", Loudness(-20.25, 0.5))
    loaded.check(other.bundle)
    for tts in (first, other):
        encoded = tts.encoded
        assert store.load("me", tts).fingerprint == tts.bundle.manifest.codec.fingerprint
        assert tts.encoded == encoded  # what was encoded is kept
    assert store.load("me", fingerprint="f" * 64).fingerprint == "f" * 64
    assert store.load("me").fingerprint == first.bundle.manifest.codec.fingerprint


def test_codes_alone_serve_one_codec(store):
    store.add(voice("me too"))
    with pytest.raises(VoiceError, match="was made with the codec a1b2c3d4a1b2") as caught:
        store.load("me too", of_codec("f" * 64)).check(Bundle(Path("b 1"), of_codec("f" * 64).bundle.manifest))
    assert "only codes of it are kept" in caught.value.hint
    assert "fishrt voice add 'me too' --bundle 'b 1' --force --audio FILE --text TEXT" in caught.value.hint


def test_a_store_that_cannot_be_written_still_gives_its_voices(store, monkeypatch):
    store.add(Voice.from_audio(FakeTts(), (tone(1.0), RATE), "What I say.", name="me"))

    def failing(*_):
        raise OutputError("read-only")

    monkeypatch.setattr("fishrt.voices.store.write_whole", failing)
    assert store.load("me", of_codec("f" * 64)).fingerprint == "f" * 64


def test_voices_of_the_first_schema_are_read_and_their_loudness_is_kept(store):
    folder = store.add(voice())
    old = {"schema": 1, "transcript": "Hello.", "fingerprint": voice().fingerprint}
    (folder / "voice.json").write_text(json.dumps(old))
    assert same(store.load("anna"), dataclasses.replace(voice(), transcript="Hello."))
    assert json.loads((folder / "voice.json").read_text()) == old
    fixed = VoiceStore(store.folder, fixed=True)
    assert fixed.load("anna", FakeTts()).loudness == Loudness(-20.06, 0.5)
    assert json.loads((folder / "voice.json").read_text()) == old
    store.load("anna", FakeTts())
    assert json.loads((folder / "voice.json").read_text())["codes"][0]["loudness"] == {"lufs": -20.06, "peak": 0.5}


@pytest.mark.parametrize("name", ["张三", "Zoë", "Иван Петров", "v1.2", "हिन्दी", "علی\u200cرضا", "CONrad", "٣", "a" * 255])
def test_names_of_every_script(store, name):
    folder = store.add(voice(name))
    assert folder.parent == store.folder
    assert store.list() == [name]
    assert store.load(name).name == name
    store.remove(name)
    assert store.list() == []


def test_accents_may_be_written_in_two_ways(store):
    composed, apart = unicodedata.normalize("NFC", "Zoë"), unicodedata.normalize("NFD", "Zoë")
    store.add(voice(composed))
    assert store.load(apart).name == composed
    (store.folder / composed).rename(store.folder / apart)  # as macOS and archives spell it
    assert store.list() == [composed]
    for name in (composed, apart):
        assert store.load(name).name == composed
        with pytest.raises(VoiceError, match="already"):
            store.add(voice(name))
    store.remove(composed)
    assert store.list() == []


def test_hidden_files_and_folders_are_no_recordings(store):
    folder = store.folder / "anna"
    (folder / "x.wav").mkdir(parents=True)
    (store.folder / ".hidden").mkdir()
    assert store.list() == []
    soundfile.write(folder / "s.wav", tone(1.0), RATE)
    (folder / "s.lab").write_text("Words.", encoding="utf-8-sig")
    (folder / "._s.wav").write_bytes(b"Mac OS X")
    (store.folder / "._anna").write_bytes(b"Mac OS X")
    assert store.list() == ["anna"]
    assert store.left_out() == {}
    assert store.load("anna", FakeTts()).transcript == "Words."


def test_what_is_left_out_has_a_reason(store):
    (store.folder / "empty").mkdir(parents=True)
    (store.folder / "a:b").mkdir()
    (store.folder / "words").mkdir()
    soundfile.write(store.folder / "words/a.wav", tone(1.0), RATE)
    (store.add(voice("broken")) / "codes.npy").unlink()
    (store.folder / "index.json").write_text('{"speakers": {"zed": "x"}}')
    reasons = store.left_out()
    says = {"empty": "holds no voice", "a:b": "cannot be the name", "words": "no transcript a.lab", "broken": "is missing"}
    assert {name for name in reasons if says.get(name, "zed.npy is missing") in reasons[name]} == {*says, "zed"} == set(reasons)
    assert store.list() == []
    for name in ("empty", "words", "broken"):
        with pytest.raises(VoiceError) as caught:
            store.load(name, FakeTts())
        assert str(caught.value) == reasons[name]
    for name in ("empty", "a:b"):  # a request says why, as the list does
        with pytest.raises(VoiceError) as caught:
            find_voice(name, store, None)
        assert str(caught.value) == reasons[name]


@pytest.mark.parametrize(
    ("pcm", "text", "says"),
    [
        (np.clip(tone(3.0) * 30, -1, 1), "The small dog runs across the field.", "clipped"),
        (np.random.default_rng(0).standard_normal(RATE * 3).astype(np.float32) / 10, "The small dog runs home.", "noise"),
        (SPEECH * 0.01, SAID, "very quiet"),
        (SPEECH, "hi", "4.2 s for 2 letters"),
        (SPEECH, SAID * 3, "4.2 s for 186 letters"),
        (SPEECH, "張三李四王五趙六錢七孫八", None),
        (SPEECH, SAID, None),
    ],
    ids=["clipped", "noise", "quiet", "few words", "many words", "Chinese", "good"],
)
def test_doubts(pcm, text, says):
    lm = language_model(voice_seconds=(2.0, 5.0))
    found = list(doubts(pcm, RATE, text, lm))
    assert [says in doubt for doubt in found] == ([] if says is None else [True])


def test_a_transcript_that_the_model_does_not_read_well_is_doubted():
    lm = language_model(voice_seconds=(2.0, 5.0), reads=Reads(("en",), None, ()))
    said = "Маленькая собака бежит."
    assert list(doubts(SPEECH, RATE, said, lm)) == ["has letters in its transcript that this model does not read well"]
    assert not list(doubts(SPEECH, RATE, SAID, lm))


def test_audio_of_another_type_is_named():
    with pytest.raises(ArgumentError, match="audio is a ndarray"):
        Voice.from_audio(FakeTts(manifest()), tone(1.0), "x")


@pytest.mark.parametrize(
    ("best", "fits", "doubted"), [((2.0, 5.0), (2.0, 5.0), (1.9, 5.1)), ((10.0, 15.0), (3.0, 15.0), (2.9, 15.1))]
)
def test_short_and_long_recordings_are_doubted_at_every_door(best, fits, doubted, caplog):
    fake = FakeTts(dataclasses.replace(manifest(), model=language_model(voice_seconds=best)))
    for seconds in (*fits, *doubted):
        caplog.clear()
        Voice.from_audio(fake, (tone(seconds), RATE), "word " * round(2 * seconds))
        assert ("is best for this model" in caplog.text) == (seconds in doubted), seconds


def test_the_length_that_suits_the_model_is_told():
    lm = language_model(voice_seconds=(2.0, 5.0))
    assert next(doubts(np.tile(SPEECH, 3), RATE, SAID * 3, lm)).endswith("2 to 5 s is best for this model")
    with pytest.raises(AudioError) as caught:
        Voice.from_audio(FakeTts(dataclasses.replace(manifest(), model=lm)), (tone(0.1), RATE), "x")
    assert "2 to 5 s is best" in caught.value.hint


def test_a_taken_name_needs_force(store):
    store.add(voice(transcript="old"))
    with pytest.raises(VoiceError, match="already"):
        store.add(voice(transcript="new"))
    assert store.load("anna").transcript == "old"
    store.add(voice(transcript="new"), force=True)
    assert store.load("anna").transcript == "new"
    assert [p.name for p in store.folder.iterdir()] == ["anna"]


def test_a_failed_write_leaves_the_old_voice(store, monkeypatch):
    store.add(voice(transcript="old"))

    def failing(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OutputError, match="No space left"):
        store.add(voice(transcript="new"), force=True)
    assert store.load("anna").transcript == "old"
    assert [p.name for p in store.folder.iterdir()] == ["anna"]


BAD_NAMES = "# # a#a #..#.#a/b#a\\b#a\n#.a#a.#a:b#a\ud800#CON#nul.x#a\u202eb".split("#")


@pytest.mark.parametrize("name", [*BAD_NAMES, "a" * 256, "é" * 128])
def test_bad_names(store, name):
    for action in (lambda: store.add(voice(name)), lambda: store.load(name), lambda: store.remove(name)):
        with pytest.raises(VoiceError, match="cannot be the name" if name else "the voice has no name"):
            action()
    assert not store.folder.exists()


def test_an_unknown_voice_lists_the_known(store):
    store.add(voice("bob"))
    for action in (store.load, store.remove):
        with pytest.raises(VoiceError, match=r"no voice 'carl'.*bob"):
            action("carl")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("voice.json", b"{", "not JSON"),
        ("voice.json", b"[]", "not a JSON object"),
        ("voice.json", b"\xff", "not UTF-8"),
        ("voice.json", b'{"schema": 3}', "schema 3"),
        ("voice.json", b'{"schema": 1, "transcript": "x"}', "fingerprint"),
        ("voice.json", b'{"schema": 2, "transcript": "x", "recording": null, "codes": []}', "must name codes"),
        (
            "voice.json",
            b'{"schema":2,"transcript":"x","recording":"../a.wav","codes":[{"fingerprint":null,"file":"codes.npy","loudness":null}]}',
            "files of its folder",
        ),
        ("voice.json", b'{"schema": 1, "transcript": 3, "fingerprint": null}', "damaged"),
        ("codes.npy", None, "is missing"),
        ("codes.npy", b"", "not codes"),
        ("codes.npy", b"\x93NUMPY\x01\x00", "not an array"),
    ],
)
def test_damaged_files_are_named(store, file, content, message):
    path = store.add(voice()) / file
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(VoiceError, match=message) as caught:
        store.load("anna")
    assert file in str(caught.value)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", "uint8"])
def test_codes_of_any_integer_type(tmp_path, dtype):
    codes = np.arange(12).reshape(3, 4)
    np.save(tmp_path / "a.npy", codes.astype(dtype))
    np.save(tmp_path / "b.npy", codes[None].astype(dtype))
    for name in ("a.npy", "b.npy"):
        read = read_codes(tmp_path / name)
        assert read.dtype == np.int64
        np.testing.assert_array_equal(read, codes)
        assert type(read) is np.ndarray


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def with_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


NO_CODES = {
    "floats": npy(np.zeros((2, 3), np.float32)),
    "1-d": npy(np.zeros(3, np.int64)),
    "two of them": npy(np.zeros((2, 2, 3), np.int64)),
    "no frames": npy(np.zeros((2, 0), np.int64)),
    "negative": npy(np.full((2, 3), -1)),
    "booleans": npy(np.zeros((2, 3), bool)),
    "times": npy(np.zeros((4, 2), "m8[s]")),
    "pickle": npy(np.array({"a": 1})),
    "truncated": npy(np.zeros((4, 100), np.int64))[:-1],
    "more than memory": with_header("{'descr': '<i8', 'fortran_order': False, 'shape': (4, 100000000000000), }"),
    "more than 64 bits": with_header(f"{{'descr': '<i8', 'fortran_order': False, 'shape': (4, {10**30}), }}"),
    "no type": with_header("{'descr': ',,', 'fortran_order': False, 'shape': (4, 2)}"),
    "cut header": with_header("{"),
    "list as key": with_header("{[]: 1}"),
    "deep header": with_header("-" * 9000 + "1"),
}


@pytest.mark.parametrize("case", NO_CODES)
def test_what_is_no_array_of_codes(tmp_path, case):
    (tmp_path / "a.npy").write_bytes(NO_CODES[case])
    with pytest.raises(VoiceError, match=r"a\.npy (is not an array of codes|holds)"):
        read_codes(tmp_path / "a.npy")


@pytest.mark.parametrize("loudness", [{"lufs": -1e308}, {"lufs": 1e308}, {"lufs": float("nan")}, {"peak": 0}, {"peak": 10**400}])
def test_a_loudness_that_no_sound_has(store, loudness):
    folder = store.add(dataclasses.replace(voice(), loudness=Loudness(-20.0, 0.5)))
    path = folder / "voice.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["codes"][0]["loudness"] |= loudness
    path.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(VoiceError, match=r"voice\.json is damaged"):
        store.load(voice().name)


def test_a_file_name_that_cannot_be_harms_no_other_voice(store):
    folder = store.add(dataclasses.replace(voice(), name="long"))
    path = folder / "voice.json"
    path.write_text(path.read_text(encoding="utf-8").replace("codes.npy", "x" * 300), encoding="utf-8")
    store.add(dataclasses.replace(voice(), name="good"))
    assert store.list() == ["good"]
    assert "is missing" in store.left_out()["long"]


def test_a_recording_of_a_few_hertz_is_measured_without_a_crash():
    assert measure(tone(8, 1), 1) is None


def test_upstream_references(store):
    folder = store.folder / "some speaker"
    folder.mkdir(parents=True)
    for name, seconds, text in (("b.wav", 1.0, "Second one."), ("a.flac", 0.5, "First one.\n")):
        soundfile.write(folder / name, tone(seconds), RATE)
        (folder / name).with_suffix(".lab").write_text(text, encoding="utf-8")
    assert store.list() == ["some speaker"]
    loaded = store.load("some speaker", FakeTts())
    assert loaded.transcript == "First one.\nSecond one."
    assert loaded.codes.shape == (4, 13 + 25)
    assert loaded.fingerprint == manifest().codec.fingerprint
    with pytest.raises(VoiceError, match="encoded first"):
        store.load("some speaker")
    for refused in (lambda: store.remove("some speaker"), lambda: store.add(voice("some speaker"), force=True)):
        with pytest.raises(VoiceError, match="left alone"):
            refused()
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(("content", "message"), [(b"caf\xe9", "not UTF-8"), (None, "no transcript"), (b" \n", "no transcript")])
def test_upstream_references_with_a_bad_transcript(store, content, message):
    folder = store.folder / "x"
    folder.mkdir(parents=True)
    soundfile.write(folder / "a.wav", tone(1), RATE)
    if content is not None:
        (folder / "a.lab").write_bytes(content)
    with pytest.raises(VoiceError, match=message) as caught:
        store.load("x", FakeTts())
    assert "a.lab" in str(caught.value) or "'x'" in str(caught.value)


def test_fish_speech_rs_index(store):
    store.folder.mkdir()
    (store.folder / "index.json").write_text(
        json.dumps({"speakers": {"default": "Hello there.", "Zoë": "Salut.", "../evil": "x"}}), encoding="utf-8"
    )
    codes = np.arange(8).reshape(4, 2)
    np.save(store.folder / "default.npy", codes.astype(np.uint32))
    np.save(store.folder / "Zoë.npy", codes)
    np.save(store.folder.parent / "evil.npy", codes)
    assert store.list() == ["Zoë", "default"]
    assert "cannot be the name" in store.left_out()["../evil"]  # what cannot be loaded is not hidden either
    assert store.load("Zoë").transcript == "Salut."
    for action in (store.load, store.remove):
        with pytest.raises(VoiceError, match="cannot be the name"):
            action("../evil")
    loaded = store.load("default")
    assert same(loaded, Voice("default", codes.astype(np.int64), "Hello there.", None))
    loaded.check(manifest())
    with pytest.raises(VoiceError, match="left alone"):
        store.remove("default")


@pytest.mark.parametrize("content", ["[]", "{}", '{"speakers": []}', '{"speakers": {"a": 1}}', "nonsense"])
def test_a_bad_index(store, content):
    store.folder.mkdir()
    (store.folder / "index.json").write_text(content, encoding="utf-8")
    with pytest.raises(VoiceError, match=r"index\.json"):
        store.list()


def test_check_accepts_its_own_bundle_only():
    voice().check(manifest())
    voice(fingerprint=None).check(manifest())
    with pytest.raises(VoiceError, match="no transcript"):
        voice(transcript=" \n").check(manifest())
    with pytest.raises(VoiceError, match=r"made with the codec ffffffffffff…; this bundle's is a1b2c3d4") as caught:
        voice(fingerprint="f" * 64).check(manifest())
    assert "fishrt voice add anna --force" in caught.value.hint


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((3, 5), np.int64), r"\[3, 5\].*4 codebooks"),
        (np.zeros((5, 5), np.int64), r"\[5, 5\].*4 codebooks"),
        (np.zeros((4, 0), np.int64), r"\[4, 0\].*1 frame"),
        (np.zeros(4, np.int64), r"shape \[4\]"),
        (np.full((4, 2), 1.9), "float64"),
        ([[1], [1], [1], [1]], "a list"),
        (np.array([[0], [0], [160], [0]]), "160.*codebook 2"),
        (np.array([[-1], [0], [0], [0]]), "-1.*codebook 0"),
    ],
)
def test_check_of_codes(codes, message):
    with pytest.raises(VoiceError, match=message):
        voice(codes=codes).check(manifest())


def test_codes_are_checked_by_the_codecs_entries_and_not_the_language_models():
    content = manifest(
        codec=dataclasses.replace(manifest().codec, codebook_sizes=(1000,) * 4),
        model=language_model(codebook_width=1024, code_offset=1, code_zero="fast"),
    )
    voice(codes=np.full((4, 2), 999)).check(content)
    with pytest.raises(VoiceError, match="1000 in codebook 0, which has the entries 0 to 999"):
        voice(codes=np.full((4, 2), 1000)).check(content)


def test_from_audio(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(1.0, 8000)] * 2, axis=1), 8000)
    for audio in (tmp_path / "a.wav", str(tmp_path / "a.wav"), (tone(1.0), RATE)):
        made = Voice.from_audio(FakeTts(), audio, " What I say. ", name="me")
        assert (made.name, made.transcript, made.codes.shape) == ("me", "What I say.", (4, 25))
        made.check(manifest())


@pytest.mark.parametrize(
    ("audio", "transcript", "error", "message"),
    [
        ((tone(0.19), RATE), "x", AudioError, r"too short: 0\.19 s; a voice takes 0\.2 s to 20\.0 s"),
        ((tone(20.1), RATE), "x", AudioError, r"too long: 20\.10 s"),
        ((tone(1), 0), "x", AudioError, "rate is 0"),
        ((tone(1), -RATE), "x", AudioError, "rate is -16000"),
        ((tone(1), 16000.5), "x", AudioError, r"rate is 16000\.5"),
        (([0.1] * RATE, RATE), "x", AudioError, "a list"),
        ((np.zeros(RATE, np.float32), RATE), "x", VoiceError, "silent"),
        ((np.full(RATE, 9e-4, np.float32), RATE), "x", VoiceError, "silent"),
        ((np.full(RATE, np.nan, np.float32), RATE), "x", AudioError, "not numbers"),
        ((tone(1) * 32768, RATE), "x", AudioError, "the samples of the recording of voice 'voice' reach ±16,384; −1 to 1 is"),
        ((tone(1), RATE), " ", VoiceError, "no transcript"),
        ((tone(1), RATE), "...", VoiceError, "neither a letter nor a digit"),
        ((tone(1), RATE), "\u200b", VoiceError, "neither a letter nor a digit"),
        ((tone(1), RATE), "Hello <|im_end|> friend", PromptError, "transcript of voice 'voice' contains"),
        ((tone(1), RATE), "\udcff", PromptError, "UTF-8"),
    ],
)
def test_recordings_that_make_no_voice(audio, transcript, error, message):
    with pytest.raises(error, match=message):
        Voice.from_audio(FakeTts(), audio, transcript)


def test_a_recording_must_fit_the_codec_and_the_context(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(21), RATE)
    with pytest.raises(AudioError, match=r"a\.wav is too long: at most 20\.0 s"):
        Voice.from_audio(FakeTts(), tmp_path / "a.wav", "x")
    small = FakeTts(dataclasses.replace(manifest(), model=language_model(max_prompt=100)))
    with pytest.raises(AudioError, match=r"0\.2 s to 4\.0 s"):
        Voice.from_audio(small, (tone(5), RATE), "x")
