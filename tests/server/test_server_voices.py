"""Voices over HTTP: every shape of the list, uploads and what they refuse, names, references in requests, and a killed server."""

from __future__ import annotations

import base64
import gc
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="needs the server extra")

from fastapi.testclient import TestClient

from fishrt import TTS, Voice, VoiceStore
from fishrt.audio.resample import resample
from fishrt.server.voices.library import OPENAI_VOICES

RECORDING = Path(__file__).parents[2] / "export/minnow/references/slt/reference.flac"
WORDS = "Please call my brother, and ask him to bring the big blue bag from the kitchen."
SOUND = RECORDING.read_bytes()
BUILT_IN = ["awb", "rms", "slt"]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> VoiceStore:
    return VoiceStore(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def voiced(start: Callable[..., TestClient], own: VoiceStore) -> Iterator[TestClient]:
    """A client of a server with a voice folder of its own."""
    with TTS.load(threads=1, voices=own) as tts:
        yield start(tts)


@pytest.fixture(autouse=True)
def _only_the_bundles(voiced: TestClient, own: VoiceStore) -> Iterator[None]:
    """Each test begins and ends without voices of clients."""
    yield
    for voice in voiced.get("/v1/voices").json()["uploaded_voices"]:
        assert voiced.delete(f"/v1/voices/{voice['id']}").status_code == 200
    assert names(voiced) == BUILT_IN
    assert [path.name for path in own.folder.iterdir()] == []


def names(client: TestClient) -> list[str]:
    return client.get("/v1/voices?format=names").json()


def add(client: TestClient, name: str = "anna", sound: Any = SOUND, text: str | None = WORDS, **fields: str) -> Any:
    given = {"name": name, "ref_text": text, **fields}
    data = {key: value for key, value in given.items() if value is not None}
    return client.post("/v1/audio/voices", data=data, files={"audio_sample": ("a.flac", sound, "audio/flac")})


def failed(reply: Any, status: int, code: str | None, message: str) -> None:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["code"] == code
    assert message in error["message"]


def speak(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/audio/speech", json={"input": "Hi.", "response_format": "wav", "seed": 1, **fields})


def test_the_list_has_every_shape(voiced: TestClient) -> None:
    assert add(voiced, "zoé").status_code == 200
    for path in ("/v1/audio/voices", "/v1/voices", "/audio/voices", "/voices", "/v1/audio/voices?limit=100"):
        found = voiced.get(path).json()
        assert found["object"] == "list"
        assert found["voices"] == found["items"] == found["data"]
        assert [voice["id"] for voice in found["voices"]] == [*BUILT_IN, "zoé"]
        assert found["default_voice"] == "awb"
        assert [voice["name"] for voice in found["uploaded_voices"]] == ["zoé"]
        for voice in found["voices"]:
            assert voice["id"] == voice["voice_id"] == voice["name"]
            assert voice["object"] == "voice"
            assert isinstance(voice["created_at"], int)
            assert WORDS not in str(voice)
        assert [voice["origin"] for voice in found["voices"]] == ["bundle"] * 3 + ["user"]
    assert names(voiced) == [*BUILT_IN, "zoé"]


def test_an_upload_answers_in_both_shapes_and_is_on_disk(voiced: TestClient, own: VoiceStore) -> None:
    reply = add(voiced, "Anna-Lena", consent="cons_1", type="audio_sample", speaker_description="warm")
    assert reply.status_code == 200
    found = reply.json()
    assert {key: found[key] for key in ("id", "name", "object", "type", "success")} == {
        "id": "Anna-Lena",
        "name": "Anna-Lena",
        "object": "audio.voice",
        "type": "audio_sample",
        "success": True,
    }
    assert isinstance(found["created_at"], int)
    assert found["voice"]["name"] == "Anna-Lena"
    assert found["warnings"] == []
    stored = own.load("Anna-Lena")
    assert stored.transcript == WORDS
    assert own.is_recorded("Anna-Lena")
    assert speak(voiced, voice={"id": "Anna-Lena"}).status_code == 200
    shown = voiced.get("/v1/audio/voices/Anna-Lena").json()
    assert shown["transcript"] == WORDS
    assert shown["seconds"] == pytest.approx(soundfile.info(RECORDING).duration, abs=0.1)
    gone = voiced.delete("/v1/audio/voices/Anna-Lena")
    assert gone.status_code == 200
    assert {**gone.json(), "message": ""} == {
        "id": "Anna-Lena",
        "name": "Anna-Lena",
        "object": "audio.voice.deleted",
        "deleted": True,
        "success": True,
        "message": "",
    }
    failed(voiced.delete("/v1/audio/voices/Anna-Lena"), 404, "voice_not_found", "there is no voice 'Anna-Lena'")
    failed(speak(voiced, voice="Anna-Lena"), 404, "voice_not_found", "awb, rms, slt")


def test_an_upload_tells_what_is_poor_about_the_recording(voiced: TestClient) -> None:
    assert any("letters of transcript" in warning for warning in add(voiced, sound=wav(1)).json()["warnings"])


@pytest.mark.parametrize("audio", ["audio_sample", "audio", "file", "ref_audio"])
@pytest.mark.parametrize("text", ["ref_text", "text", "transcript"])
def test_other_names_of_the_fields(voiced: TestClient, audio: str, text: str) -> None:
    reply = voiced.post("/v1/audio/voices", data={"name": "anna", text: WORDS}, files={audio: ("x", SOUND)})
    assert reply.status_code == 200


def test_an_upload_as_json(voiced: TestClient) -> None:
    body = {"name": "anna", "audio_sample": base64.b64encode(SOUND).decode(), "ref_text": WORDS}
    assert voiced.post("/v1/audio/voices", json=body).status_code == 200
    prompt = {"name": "ben", "type": "prompt", "prompt": "A deep voice."}
    failed(voiced.post("/v1/audio/voices", json=prompt), 400, None, "voices are made of recordings")
    assert voiced.post("/v1/audio/voices", json={**body, "audio_sample": 3, "name": "ben"}).status_code == 400
    assert voiced.post("/v1/audio/voices", json={**body, "name": ["ben"]}).status_code == 400


@pytest.mark.parametrize("name", ["größe", "日本語", "a b.c_d-e", "1", "x" * 255, "A" + "\u0301"])
def test_names_of_every_script(voiced: TestClient, name: str) -> None:
    assert add(voiced, name).status_code == 200
    assert voiced.get(f"/v1/voices/{name}").status_code == 200
    assert speak(voiced, voice=name).status_code == 200


BAD_NAMES = [
    "",
    " ",
    ".",
    "..",
    "../x",
    "a/b",
    "/etc",
    "a\\b",
    "a\0b",
    "a\nb",
    ".hidden",
    "a.",
    "x" * 256,
    "CON",
    "a:b",
    "a\u202eb",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "%2e%2e%2fx", "default", "unconditioned", "<b>"])
def test_names_that_no_voice_can_have(voiced: TestClient, own: VoiceStore, name: str) -> None:
    reply = add(voiced, name)
    assert reply.status_code == 400
    assert "name" in reply.json()["error"]["message"]
    assert name or "the voice has no name; use letters" in reply.json()["error"]["message"]
    assert names(voiced) == BUILT_IN
    assert not list(own.folder.iterdir())
    reply = voiced.post("/v1/audio/encoding", params={"id": name, "prompt": WORDS, "persist": True}, files={"x": SOUND})
    assert reply.status_code == 400


@pytest.mark.parametrize("name", ["..", "%2e%2e", "..%2f..%2fetc", "%2fetc%2fpasswd", "a%00b", ".fishrt-0", "%ff", "a%0d%0aX:y"])
def test_no_path_leaves_the_voice_folder(voiced: TestClient, own: VoiceStore, name: str) -> None:
    secret = own.folder.parent / "voice.json"
    secret.write_text("{}")
    for path in (f"/v1/audio/voices/{name}", f"/v1/voices/{name}/sample"):
        for reply in (voiced.get(path), voiced.delete(path)):
            assert reply.status_code in (400, 404, 405)
            assert "X" not in reply.headers
    assert secret.exists()


def test_a_taken_name_and_the_bundles(voiced: TestClient, own: VoiceStore) -> None:
    assert add(voiced, "Änne").status_code == 200
    failed(add(voiced, "A\u0308nne", text="Other words."), 409, "voice_exists", "already a voice")
    assert own.load("Änne").transcript == WORDS
    failed(add(voiced, "awb"), 403, "voice_kept", "belongs to the bundle")
    failed(voiced.delete("/v1/voices/awb"), 403, "voice_kept", "belongs to the bundle")
    encoding = {"params": {"id": "Änne", "prompt": WORDS}, "files": {"x": SOUND}}
    failed(voiced.post("/v1/audio/encoding", **encoding), 409, "voice_exists", "already a voice")
    assert names(voiced) == [*BUILT_IN, "Änne"]


def wav(seconds: float, level: float = 0.5) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, level * np.sin(np.arange(round(seconds * 16_000)) * 0.1), 16_000, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("sound", "text", "message"),
    [
        (SOUND, None, "no transcript"),
        (SOUND, "", "no transcript"),
        (SOUND, "?!", "neither a letter nor a digit"),
        (b"", WORDS, "is empty"),
        (b"no audio at all" * 30, WORDS, "not audio"),
        (SOUND[:2000], WORDS, ""),
        (wav(0), WORDS, "no samples"),
        (wav(0.05), WORDS, "too short"),
        (wav(1, level=0), WORDS, "silent"),
        (wav(400), WORDS, "too long"),
    ],
)
def test_recordings_that_make_no_voice(voiced: TestClient, sound: bytes, text: str | None, message: str) -> None:
    reply = add(voiced, "anna", sound, text)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
    assert names(voiced) == BUILT_IN
    params = {"id": "anna", "prompt": text or "?", "persist": "true"}
    assert voiced.post("/v1/audio/encoding", params=params, files={"x": sound}).status_code == 400
    assert names(voiced) == BUILT_IN


OLD, NEW = "old_reference_id", "new_reference_id"


@pytest.mark.parametrize(
    ("path", "name", "audio", "text"),
    [
        ("/v1/audio/voices", "name", "audio_sample", "ref_text"),
        ("/v1/audio/voices", "id", "file", "transcript"),
        ("/v1/references/add", "id", "audio", "text"),
        ("/model", "title", "voices", "texts"),
    ],
)
def test_an_error_names_the_field_at_fault(voiced: TestClient, path: str, name: str, audio: str, text: str) -> None:
    right = {name: "anna", audio: base64.b64encode(SOUND).decode(), text: WORDS}
    wrong: list[tuple[str, Any]] = [
        *((name, value) for value in ("awb", "a/b", "default")),
        *((audio, value) for value in ("bm8gYXVkaW8=", "?", base64.b64encode(wav(1, level=0)).decode())),
        *((text, value) for value in ("?!", "<|im_end|>")),
    ]
    for field, value in wrong:
        reply = voiced.post(f"{path}?format=json", json={**right, field: value})
        assert reply.status_code in (400, 403)
        assert reply.json()["error"]["param"] in (field, f"{field}[0]"), (field, value)


@pytest.mark.parametrize(
    ("method", "path", "fields", "param"),
    [
        ("POST", "/v1/audio/encoding?id=a/b&prompt=x", {"x": "UklG"}, "id"),
        ("POST", "/v1/audio/encoding?id=a&prompt=%3F", {"x": "UklG"}, "prompt"),
        ("POST", "/v1/audio/encoding?id=a&prompt=x", {"x": "UklG"}, "x"),
        ("POST", "/v1/audio/encoding", {"x": "UklG"}, "x"),
        ("POST", "/v1/vqgan/encode", {"audios": [base64.b64encode(SOUND).decode(), "UklG"]}, "audios[1]"),
        ("POST", "/v1/vqgan/encode", {"audios": [5]}, "audios[0]"),
        ("POST", "/v1/vqgan/decode", {"tokens": [[[10**6]]]}, "tokens[0]"),
        ("POST", "/v1/references/update", {OLD: "nobody", NEW: "x"}, OLD),
        ("POST", "/v1/references/update", {OLD: "awb", NEW: "x"}, OLD),
        ("POST", "/v1/references/update", {OLD: "anna", NEW: "awb"}, NEW),
        ("POST", "/v1/references/update", {OLD: "anna", NEW: "a/b"}, NEW),
        ("DELETE", "/v1/references/delete", {"reference_id": "nobody"}, "reference_id"),
    ],
)
def test_an_error_of_other_routes_names_the_field_at_fault(
    voiced: TestClient, method: str, path: str, fields: Any, param: str
) -> None:
    assert add(voiced).status_code == 200
    reply = voiced.request(method, path, json=fields, headers={"Accept": "application/json"})
    assert (reply.status_code // 100, reply.json()["error"]["param"]) == (4, param)


def test_what_is_not_kept_of_a_voice_is_named(voiced: TestClient) -> None:
    """OpenAI's consent among it."""
    found = [add(voiced, consent="cons_1", speaker_description="warm", type="audio_sample")]
    sound = base64.b64encode(SOUND).decode()
    found.append(voiced.post("/v1/references/add", json={"id": "ben", "audio": sound, "text": WORDS, "tekst": "x"}))
    found.append(voiced.post("/model", json={"title": "carl", "voices": sound, "texts": WORDS, "visibility": "private"}))
    assert [reply.status_code for reply in found] == [200] * 3
    named = [set(reply.headers["x-ignored-parameters"].split(", ")) for reply in found]
    assert named == [{"consent", "speaker_description"}, {"tekst"}, {"visibility"}]


@pytest.mark.parametrize(
    ("muxer", "codec", "rate"), [("webm", "libopus", 48_000), ("ipod", "aac", 44_100), ("adts", "aac", 16_000)]
)
def test_recordings_of_browsers_and_phones(voiced: TestClient, muxer: str, codec: str, rate: int) -> None:
    av = pytest.importorskip("av")
    sound, was = soundfile.read(RECORDING, dtype="float32")
    file = io.BytesIO()
    with av.open(file, "w", muxer) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(resample(sound, was, rate)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate, stream.codec_context.frame_size or None)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    assert add(voiced, sound=file.getvalue()).status_code == 200
    assert voiced.get("/v1/voices/anna").json()["seconds"] == pytest.approx(len(sound) / was, abs=0.2)


def test_a_small_file_of_many_hours_is_refused(voiced: TestClient) -> None:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 8000, 1, format="FLAC") as hours:
        for _ in range(40):
            hours.write(np.zeros(8000 * 360, np.int16))
    assert len(file.getvalue()) < 1 << 20
    reply = add(voiced, sound=file.getvalue())
    failed(reply, 400, None, "too long")


def test_an_upload_without_a_recording(voiced: TestClient) -> None:
    for body in ({"data": {"name": "anna", "ref_text": WORDS}}, {"json": {"name": "anna"}}):
        failed(voiced.post("/v1/audio/voices", **body), 400, None, "the recording is missing")
    broken = {"content": b"--x\r\nhello", "headers": {"Content-Type": "multipart/form-data; boundary=x"}}
    assert voiced.post("/v1/audio/voices", **broken).status_code == 400
    assert voiced.post("/v1/audio/voices", headers={"Content-Type": "multipart/form-data"}).status_code == 400
    many = [("audio_sample", SOUND[:9])] * 20
    assert voiced.post("/v1/audio/voices", data={"name": "anna"}, files=many).status_code == 400


def test_a_full_disk_lists_nothing(voiced: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", failing)
        reply = add(voiced)
    failed(reply, 500, "cannot_write", "its log has more")
    assert names(voiced) == BUILT_IN


def test_a_sample_of_a_voice(voiced: TestClient) -> None:
    add(voiced)
    for name in ("awb", "anna"):
        reply = voiced.get(f"/v1/voices/{name}/sample")
        assert reply.headers["content-type"] == "audio/wav"
        pcm, rate = soundfile.read(io.BytesIO(reply.content))
        assert 1 < len(pcm) / rate <= 10
        assert np.abs(pcm).max() > 0.05
    failed(voiced.get("/v1/voices/nobody/sample"), 404, "voice_not_found", "nobody")


def test_codes_of_a_recording(voiced: TestClient, own: VoiceStore) -> None:
    expected = Voice.from_audio(TTS.load(threads=1, voices=own), RECORDING, WORDS).codes
    for part in ("audio", "whatever"):
        reply = voiced.post("/v1/audio/encoding", files={part: ("a.flac", SOUND)})
        assert reply.headers["content-type"] == "application/x-npy"
        codes = np.load(io.BytesIO(reply.content))
        assert codes.dtype == np.int64
        assert (codes == expected).all()
    assert names(voiced) == BUILT_IN
    reply = voiced.post("/v1/audio/encoding", params={"id": "until", "prompt": WORDS}, files={"audio": SOUND})
    assert (np.load(io.BytesIO(reply.content)) == expected).all()
    assert names(voiced) == [*BUILT_IN, "until"]
    assert own.list() == []
    reply = voiced.post("/audio/encoding", params={"id": "ever", "prompt": WORDS, "persist": "true"}, files={"audio": SOUND})
    assert (np.load(io.BytesIO(reply.content)) == expected).all()
    assert own.list() == ["ever"]
    for name in ("until", "ever"):
        assert voiced.get(f"/v1/voices/{name}").json()["transcript"] == WORDS
        assert speak(voiced, voice=name).content == speak(voiced, voice=name).content
    assert speak(voiced, voice="until").content == speak(voiced, voice="ever").content
    for params in ({"id": "x"}, {"prompt": WORDS}, {"persist": "true"}):
        assert voiced.post("/v1/audio/encoding", params=params, files={"audio": SOUND}).status_code == 400
    assert voiced.post("/v1/audio/encoding").status_code == 400
    assert voiced.post("/v1/audio/encoding", params={"persist": "maybe"}, files={"audio": SOUND}).status_code == 400


@pytest.fixture(scope="module")
def spoken_by(voiced: TestClient) -> Callable[..., str]:
    """Return which voice of the bundle speaks: the same seed gives the same audio."""
    heard = {speak(voiced, voice=name).content: name for name in BUILT_IN}
    assert len(heard) == 3
    return lambda **fields: heard.get(speak(voiced, **fields).content, "another")


def test_openais_names_speak_in_local_voices(voiced: TestClient, spoken_by: Callable[..., str]) -> None:
    before = {name: spoken_by(voice=name) for name in sorted(OPENAI_VOICES)}
    assert len(before) == 13
    assert set(before.values()) == set(BUILT_IN)
    add(voiced, "zoe", wav(1))
    assert {name: spoken_by(voice=name) for name in sorted(OPENAI_VOICES)} == before
    add(voiced, "alloy", wav(1))
    assert speak(voiced, voice="alloy").content == speak(voiced, voice="zoe").content
    assert spoken_by(voice="alloy") == "another"


def test_names_that_mean_the_default_or_no_voice(voiced: TestClient, spoken_by: Callable[..., str]) -> None:
    for fields in ({}, {"voice": None}, {"voice": ""}, {"voice": "default"}, {"voice": {"id": "default"}}):
        assert spoken_by(**fields) == "awb"
    assert spoken_by(voice="rms.wav") == spoken_by(voice="rms.MP3") == "rms"
    unconditioned = speak(voiced, voice="unconditioned")
    assert unconditioned.status_code == 200
    assert spoken_by(voice="unconditioned") == "another"
    for name in ("Alloy", "rms.txt", "nobody.wav", "../rms", "nobody"):
        failed(speak(voiced, voice=name), 404, "voice_not_found", "there is no voice")


def test_a_voice_called_default_speaks_only_if_it_is_named(
    voiced: TestClient, own: VoiceStore, spoken_by: Callable[..., str]
) -> None:
    """As for the library and `fishrt voice list`: the default voice is the bundle's."""
    with TTS.load(threads=1, voices=own) as tts:
        own.add(Voice.from_audio(tts, RECORDING, WORDS, name="default"))
        usual = tts.speak("Hi.", seed=1).info.voices
        assert (usual, tts.default_voice) == (("awb",), "awb")
    assert voiced.get("/v1/voices").json()["default_voice"] == "awb"
    assert [spoken_by(**fields) for fields in ({}, {"voice": ""}, {"voice": None})] == ["awb"] * 3
    assert spoken_by(voice="default") == "another"


def test_a_deleted_voice_leaves_the_memory(voiced: TestClient) -> None:
    def held(name: str) -> int:
        gc.collect()
        return sum(isinstance(each, Voice) and each.name == name for each in gc.get_objects())

    for path in ("/v1/voices", "/v1/references"):
        assert add(voiced, "lena").status_code == 200
        assert speak(voiced, voice="lena").status_code == 200
        assert held("lena") > 0
        if path == "/v1/voices":
            assert voiced.delete("/v1/voices/lena").status_code == 200
        else:
            names = {"old_reference_id": "lena", "new_reference_id": "mia"}
            assert voiced.post("/v1/references/update", json=names).status_code == 200
        assert speak(voiced).status_code == 200  # the scheduler has had the last request until now
        until = time.monotonic() + 10
        while held("lena") and time.monotonic() < until:
            time.sleep(0.05)
        assert held("lena") == 0, path


@pytest.mark.parametrize("voice", [[], [[]], [["awb"]], ["awb", None], {"id": None}, {"name": "awb"}, 3, True, ["default"]])
def test_what_names_no_voice(voiced: TestClient, voice: Any) -> None:
    reply = speak(voiced, voice=voice)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "voice"


def test_strict_names(start: Callable[..., TestClient]) -> None:
    strict = start(strict_voices=True)
    failed(speak(strict, voice="alloy"), 404, "voice_not_found", "alloy")
    assert speak(strict, voice="default").status_code == 200


def test_references_go_before_the_voice(voiced: TestClient) -> None:
    encoded = base64.b64encode(SOUND).decode()
    add(voiced, "anna")
    expected = speak(voiced, voice="anna").content
    for fields in (
        {"ref_audio": f"data:audio/flac;base64,{encoded}", "ref_text": WORDS, "voice": "default"},
        {"references": [{"audio": encoded, "text": WORDS}], "voice": "awb"},
        {"extra_body": {"reference_audio": encoded, "reference_text": WORDS}},
        {"voice": encoded, "prompt_text": WORDS},
        {"voice": ["anna"]},
    ):
        assert speak(voiced, **fields).content == expected
    failed(speak(voiced, ref_audio=encoded), 400, "invalid_reference", "no transcript")
    failed(speak(voiced, ref_text=WORDS), 400, "invalid_reference", "without a recording")
    failed(speak(voiced, ref_audio=str(RECORDING), ref_text=WORDS), 400, "invalid_reference", "reads no files")
    failed(speak(voiced, ref_audio="http://127.0.0.1/a", ref_text=WORDS), 400, "invalid_reference", "fetches no recordings")


def test_references_from_the_media_folder(start: Callable[..., TestClient]) -> None:
    media = start(media_dir=RECORDING.parent, allow_url_refs=True)
    assert speak(media, ref_audio=f"file://{RECORDING}", ref_text=WORDS).status_code == 200
    failed(speak(media, ref_audio="../awb/reference.flac", ref_text=WORDS), 400, "invalid_reference", "no such file")
    failed(speak(media, ref_audio="http://localhost:8080/a", ref_text=WORDS), 400, "invalid_reference", "public internet")


def test_a_batch_with_references(voiced: TestClient) -> None:
    shared = {"ref_audio": base64.b64encode(SOUND).decode(), "ref_text": WORDS, "seed": 1, "response_format": "wav"}
    items = [{"input": "Hi."}, {"input": "Hi.", "ref_text": "?"}]
    found = voiced.post("/v1/audio/speech/batch", json={"items": items, **shared}).json()
    assert [result["status"] for result in found["results"]] == ["success", "error"]


def test_what_needs_the_key(start: Callable[..., TestClient]) -> None:
    locked = start(api_key="secret")
    assert locked.get("/v1/voices").status_code == locked.get("/audio/voices").status_code == 200
    for method, path in (
        ("GET", "/v1/voices/awb"),
        ("GET", "/v1/voices/awb/sample"),
        ("POST", "/v1/voices"),
        ("POST", "/v1/audio/voices"),
        ("DELETE", "/v1/voices/awb"),
        ("POST", "/v1/audio/encoding"),
    ):
        assert locked.request(method, path).status_code == 401
        assert locked.request(method, path, headers={"Authorization": "Bearer secret"}).status_code != 401


def test_the_description_has_the_routes(voiced: TestClient) -> None:
    paths = voiced.get("/openapi.json").json()["paths"]
    assert {"get", "post"} <= paths["/v1/audio/voices"].keys()
    assert {"get", "delete"} <= paths["/v1/audio/voices/{name}"].keys()
    assert "references" in json.dumps(paths["/v1/audio/speech"])
