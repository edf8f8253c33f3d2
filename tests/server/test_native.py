"""Routes of other servers: /v1/tts, /v1/references, /v1/vqgan, /model, /generate."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import msgpack
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from fishrt import TTS, Sampling

TTS_PATH = "/v1/tts"
WORDS = "The birds sing in the trees, and the sun shines on the sea."

SDK = {
    "text": "Hi.",
    "format": "mp3",
    "sample_rate": None,
    "mp3_bitrate": 128,
    "opus_bitrate": 32,
    "chunk_length": 200,
    "latency": "balanced",
    "normalize": True,
    "references": [],
    "reference_id": None,
    "prosody": None,
    "top_p": 0.7,
    "temperature": 0.7,
    "max_new_tokens": 1024,
    "repetition_penalty": 1.2,
    "min_chunk_length": 50,
    "condition_on_previous_chunks": True,
    "early_stop_threshold": 1.0,
    "features": ["quality-guard"],
}
"""What Fish Audio's SDK and LiveKit send, nulls of the legacy half included."""


def packed(client: TestClient, path: str, fields: Any, method: str = "POST", **headers: str) -> Any:
    return client.request(method, path, content=msgpack.packb(fields), headers={"Content-Type": "application/msgpack", **headers})


def spoken(client: TestClient, **fields: Any) -> Any:
    reply = client.post(TTS_PATH, json={"text": "Hi.", "seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply


def decoded(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data))


def ignored(reply: Any) -> set[str]:
    return set(reply.headers.get("x-ignored-parameters", "").split(", ")) - {""}


@pytest.fixture(scope="module")
def recording(tts: TTS) -> bytes:
    """A wav file of WORDS."""
    file = io.BytesIO()
    soundfile.write(file, tts.speak(WORDS, seed=3).pcm, tts.sample_rate, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def storing(start: Callable[..., TestClient], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    """A client of a server with a folder of voices of its own."""
    folder = tmp_path_factory.mktemp("stored")
    with TTS.load(threads=1, voices=folder) as own:
        yield start(own), folder


@pytest.mark.parametrize("body", ["json", "json as curl sends it", "msgpack", "multipart", "urlencoded"])
def test_speech_in_each_encoding_is_that_of_the_library(client: TestClient, tts: TTS, body: str) -> None:
    wanted = tts.speak("Hi.", seed=1, sampling=Sampling(0.5, 0.9)).pcm
    fields: dict[str, Any] = {"text": "Hi.", "seed": 1, "temperature": 0.5, "top_p": 0.9, "streaming": False}
    form = {name: str(value) for name, value in fields.items()}
    if body == "json":
        reply = client.post(TTS_PATH, json=fields)
    elif body == "json as curl sends it":
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        reply = client.post(TTS_PATH, content=json.dumps(fields), headers=headers)
    elif body == "msgpack":
        reply = packed(client, TTS_PATH, fields)
    elif body == "multipart":
        reply = client.post(TTS_PATH, files={name: (None, value) for name, value in form.items()})
    else:
        reply = client.post(TTS_PATH, data=form)
    assert reply.status_code == 200, reply.text
    assert (reply.headers["content-type"], reply.headers["x-seed"]) == ("audio/wav", "1")
    assert reply.headers["content-disposition"] == "attachment; filename=audio.wav"
    pcm, rate = decoded(reply.content)
    assert rate == tts.sample_rate
    np.testing.assert_allclose(pcm, wanted, atol=2 / 32768)


def test_every_field_of_the_sdk_is_taken_and_what_is_not_honoured_is_listed(client: TestClient) -> None:
    reply = packed(client, TTS_PATH, SDK, Authorization="Bearer x", model="s2-pro")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "audio/mpeg"
    with av.open(io.BytesIO(reply.content)) as file:
        assert file.streams.audio[0].codec_context.bit_rate == 128_000
    assert ignored(reply) == {
        "chunk_length",
        "latency",
        "normalize",
        "repetition_penalty",
        "min_chunk_length",
        "condition_on_previous_chunks",
        "early_stop_threshold",
        "features",
    }


@pytest.mark.parametrize("bitrate", [-1000, 24, 32, 64, 24_000, 64_000])
def test_bit_rates_of_opus_in_both_units(client: TestClient, bitrate: int) -> None:
    reply = packed(client, TTS_PATH, {**SDK, "text": WORDS, "format": "opus", "opus_bitrate": bitrate, "seed": 1})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/ogg")
    pcm, rate = decoded(reply.content)
    if bitrate > 0:
        kbit = bitrate if bitrate < 1000 else bitrate / 1000
        assert len(reply.content) * 8 / 1000 / (len(pcm) / rate) < 1.5 * kbit


@pytest.mark.parametrize("fields", [{"top_p": 0}, {"top_p": 0.0}, {"temperature": 0}, {"top_p": 0, "temperature": 0.9}])
def test_a_temperature_or_top_p_of_0_is_greedy(client: TestClient, tts: TTS, fields: dict[str, Any]) -> None:
    wanted = tts.speak("Hi.", seed=5, sampling=Sampling(0.0)).pcm
    np.testing.assert_allclose(decoded(spoken(client, seed=5, **fields).content)[0], wanted, atol=2 / 32768)


@pytest.mark.parametrize(("given", "listed"), [(0, set()), (10**6, {"max_new_tokens"}), (4096, set())])
def test_the_limit_of_frames(client: TestClient, given: int, listed: set[str]) -> None:
    reply = spoken(client, max_new_tokens=given)
    assert ignored(reply) == listed
    assert reply.content == spoken(client).content
    assert len(decoded(spoken(client, max_new_tokens=3).content)[0]) == 3 * 640


def test_prosody(client: TestClient) -> None:
    usual = decoded(spoken(client, text=WORDS).content)[0]
    reply = spoken(client, text=WORDS, prosody={"speed": 2.0, "volume": -20, "normalize_loudness": True})
    fast = decoded(reply.content)[0]
    assert len(fast) == pytest.approx(len(usual) / 2, rel=0.03)
    assert np.std(fast) == pytest.approx(np.std(usual) / 10, rel=0.2)
    assert ignored(reply) == {"prosody.normalize_loudness"}


def test_sampler_fields_of_diffusion_are_ignored_here(client: TestClient) -> None:
    assert ignored(spoken(client, num_steps=20, cfg_scale_text=3.0)) == {"num_steps", "cfg_scale_text"}


def test_a_stream_of_wav_has_one_header_and_the_same_speech(client: TestClient) -> None:
    whole, streamed = spoken(client, text=WORDS), spoken(client, text=WORDS, streaming=True)
    assert "content-length" in whole.headers
    assert "content-length" not in streamed.headers
    assert (streamed.content[:4], streamed.content[4:8], streamed.content[40:44]) == (b"RIFF", b"\xff" * 4, b"\xff" * 4)
    pcm = np.frombuffer(streamed.content[44:], "<i2") / 32768
    np.testing.assert_allclose(pcm, decoded(whole.content)[0], atol=3 / 32768)


@pytest.mark.parametrize("format", ["mp3", "opus", "pcm"])
def test_formats_without_a_length_come_while_they_are_made(client: TestClient, tts: TTS, format: str) -> None:
    seconds = len(tts.speak(WORDS, seed=1).pcm) / tts.sample_rate
    streamed = spoken(client, text=WORDS, format=format)
    assert "content-length" not in streamed.headers
    assert "content-length" in spoken(client, text=WORDS, format=format, streaming=False).headers
    if format == "pcm":
        assert len(streamed.content) / 2 / tts.sample_rate == pytest.approx(seconds)
        return
    with av.open(io.BytesIO(streamed.content)) as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
        assert samples / file.streams.audio[0].rate == pytest.approx(seconds, abs=0.12)


def test_a_reference_in_the_request_is_the_voice(client: TestClient, recording: bytes) -> None:
    """reference_id goes before it."""
    binary = packed(client, TTS_PATH, {"text": "Hi.", "seed": 1, "references": [{"audio": recording, "text": WORDS}]})
    encoded = base64.b64encode(recording).decode()
    text = spoken(client, references=[{"audio": encoded, "text": WORDS}])
    form = client.post(
        TTS_PATH, data={"text": "Hi.", "seed": "1", "ref_text": WORDS}, files={"ref_audio": ("a.wav", recording, "audio/wav")}
    )
    assert binary.status_code == form.status_code == 200, (binary.text, form.text)
    assert binary.content == text.content == form.content
    assert binary.content != spoken(client).content
    named = spoken(client, reference_id="awb", references=[{"audio": encoded, "text": WORDS}])
    assert named.content == spoken(client, reference_id="awb").content
    assert ignored(named) == {"references"}


def test_codes_are_a_reference_on_the_speech_route(client: TestClient, tts: TTS, recording: bytes) -> None:
    """As SGLang's clients send them."""
    codes = tts.encode(soundfile.read(io.BytesIO(recording), dtype="float32")[0], tts.sample_rate).tolist()
    replies = [
        client.post("/v1/audio/speech", json={"input": "Hi.", "seed": 1, "response_format": "wav", "references": [each]})
        for each in ({"vq_codes": codes, "text": WORDS}, {"audio": base64.b64encode(recording).decode(), "text": WORDS})
    ]
    assert [each.status_code for each in replies] == [200, 200]
    pcm, other = (decoded(each.content)[0] for each in replies)
    assert len(pcm) == len(other)


def test_errors_satisfy_every_client(client: TestClient) -> None:
    reply = packed(client, TTS_PATH, {"text": "Hi.", "reference_id": "nobody"})
    assert reply.status_code == 404
    found = reply.json()
    assert found["statusCode"] == 404
    assert "nobody" in found["message"]
    assert found["message"] == found["detail"] == found["error"]["message"]
    assert (found["error"]["code"], found["error"]["param"]) == ("voice_not_found", "voice")


@pytest.mark.parametrize(("path", "headers"), [(f"{TTS_PATH}?format=msgpack", {}), (TTS_PATH, {"Accept": "application/msgpack"})])
def test_errors_in_msgpack_when_asked(client: TestClient, path: str, headers: dict[str, str]) -> None:
    reply = packed(client, path, {"text": ""}, **headers)
    assert (reply.status_code, reply.headers["content-type"]) == (400, "application/msgpack")
    assert msgpack.unpackb(reply.content)["statusCode"] == 400
    speech = packed(client, path, {"text": "Hi.", "format": "wav"}, **headers)
    assert (speech.status_code, speech.headers["content-type"]) == (200, "audio/wav")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"\x81",
        msgpack.packb({1: 2}),
        msgpack.packb([]),
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_what_is_no_msgpack(client: TestClient, body: bytes) -> None:
    reply = client.post(TTS_PATH, content=body, headers={"Content-Type": "application/msgpack"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_msgpack"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"text": 5}, "input"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"format": "wma"}, "response_format"),
        ({"prosody": {"speed": 9}}, "speed"),
        ({"references": "x"}, "references"),
        ({"top_p": False}, "top_p"),
    ],
)
def test_wrong_fields_name_themselves(client: TestClient, fields: dict[str, Any], param: str) -> None:
    reply = client.post(TTS_PATH, json={"text": "Hi.", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_health(client: TestClient) -> None:
    for method in ("GET", "POST"):
        assert client.request(method, "/v1/health").json()["status"] == "ok"


def unpacked(reply: Any, status: int = 200) -> dict[str, Any]:
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/msgpack"), reply.text
    return dict(msgpack.unpackb(reply.content))


def test_references_are_stored_listed_renamed_and_deleted(storing: tuple[TestClient, Path], recording: bytes) -> None:
    client, folder = storing
    file = {"audio": ("a.wav", recording, "audio/wav")}
    added = unpacked(client.post("/v1/references/add", data={"id": "anna", "text": WORDS}, files=file))
    assert (added["success"], added["reference_id"]) == (True, "anna")
    assert (folder / "anna").is_dir()
    again = unpacked(client.post("/v1/references/add", data={"id": "anna", "text": WORDS}, files=file), 409)
    assert (again["success"], again["statusCode"]) == (False, 409)
    packed(client, "/v1/references/add", {"id": "bert", "text": WORDS, "audio": recording}).raise_for_status()
    assert {"anna", "bert", "awb"} <= set(unpacked(client.get("/v1/references/list"))["reference_ids"])
    for path, headers in (("/v1/references/list?format=json", {}), ("/v1/references/list", {"Accept": "application/json"})):
        assert "anna" in client.get(path, headers=headers).json()["reference_ids"]
    renamed = packed(client, "/v1/references/update", {"old_reference_id": "anna", "new_reference_id": "carl"})
    assert unpacked(renamed)["new_reference_id"] == "carl"
    assert spoken(client, reference_id="carl").content != spoken(client).content
    taken = client.post("/v1/references/update", json={"old_reference_id": "carl", "new_reference_id": "bert"})
    assert taken.status_code == 409
    assert unpacked(packed(client, "/v1/references/delete", {"reference_id": "carl"}, "DELETE"))["success"]
    gone = client.request("DELETE", "/v1/references/delete?format=json", json={"reference_id": "carl"})
    assert (gone.status_code, gone.json()["message"]) == (404, gone.json()["error"]["message"])
    kept = client.request("DELETE", "/v1/references/delete?format=json&reference_id=awb")
    assert kept.status_code == 403
    assert client.post("/v1/references/add?format=json", json={"id": "x"}).status_code == 400
    assert client.post("/v1/references/add?format=json", json={"text": "x"}).json()["error"]["param"] == "id"
    assert not (folder / "carl").exists()


def test_codes_there_and_back(client: TestClient, tts: TTS, recording: bytes) -> None:
    found = unpacked(packed(client, "/v1/vqgan/encode", {"audios": [recording, recording]}))["tokens"]
    wanted = tts.encode(soundfile.read(io.BytesIO(recording), dtype="float32")[0], tts.sample_rate)
    assert np.array_equal(found, [wanted, wanted])
    reply = packed(client, "/v1/vqgan/decode", {"tokens": found[:1]})
    assert reply.headers["x-audio-sample-rate"] == str(tts.sample_rate)
    audio = unpacked(reply)["audios"][0]
    np.testing.assert_allclose(np.frombuffer(audio, "<f2"), tts.decode(wanted), atol=2e-3)
    in_json = client.post("/v1/vqgan/decode?format=json", json={"tokens": found[:1]}).json()
    assert base64.b64decode(in_json["audios"][0]) == audio


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("encode", {}),
        ("encode", {"audios": [5]}),
        ("encode", {"audios": [b"no audio"]}),
        ("encode", {"audios": [b""] * 17}),
        ("decode", {"tokens": [[[10**6]]]}),
        ("decode", {"tokens": [[["x"]]]}),
        ("decode", {"tokens": [[[1], [1, 2]]]}),
        ("decode", {"tokens": "x"}),
    ],
)
def test_what_cannot_be_encoded_or_decoded(client: TestClient, path: str, fields: dict[str, Any]) -> None:
    assert unpacked(packed(client, f"/v1/vqgan/{path}", fields), 400)["error"]["message"]


FIELDS_OF_THE_SDK = (
    "_id type title description cover_image train_mode state tags samples created_at updated_at languages visibility "
    "lock_visibility like_count mark_count shared_count task_count liked marked author"
).split()


def test_models_are_the_voices(storing: tuple[TestClient, Path], recording: bytes) -> None:
    client, _ = storing
    file = {"voices": ("a.wav", recording, "audio/wav")}
    made = client.post("/model", data={"title": "dora", "texts": WORDS, "visibility": "private", "type": "tts"}, files=file)
    assert made.status_code == 200, made.text
    assert (made.json()["_id"], set(made.json())) == ("dora", set(FIELDS_OF_THE_SDK))
    assert client.get("/model/dora").json() == made.json()
    first = client.get("/model?page_size=1&page_number=1&tag=x&sort_by=task_count").json()
    second = client.get("/model?page_size=1&page_number=2").json()
    assert first["total"] == second["total"] > 1
    assert first["items"] != second["items"]
    assert [each["_id"] for each in client.get("/model?title=DOR").json()["items"]] == ["dora"]
    assert "awb" not in [each["_id"] for each in client.get("/model?self=true&page_size=99").json()["items"]]
    assert client.delete("/model/dora").status_code == 200
    assert client.get("/model/dora").json()["statusCode"] == 404
    assert client.get("/model?page_size=0").status_code == 400


def test_a_model_of_several_recordings_is_one_voice(storing: tuple[TestClient, Path], recording: bytes) -> None:
    client, folder = storing
    files = [("voices", (f"{n}.wav", recording, "audio/wav")) for n in range(2)]
    made = client.post("/model", data={"title": "emma", "texts": [WORDS, "Good morning."]}, files=files)
    assert made.status_code == 200, made.text
    kept, _ = soundfile.read(folder / "emma/recording.wav")
    one, rate = decoded(recording)
    assert len(kept) == 2 * len(one) + rate // 4
    np.testing.assert_allclose(kept[-len(one) :], one, atol=1e-4)
    assert client.get("/v1/voices/emma").json()["transcript"] == f"{WORDS}\nGood morning."
    fewer = client.post("/model", data={"title": "fred", "texts": WORDS}, files=files)
    assert (fewer.status_code, fewer.json()["error"]["param"]) == (400, "texts")
    assert client.delete("/model/emma").status_code == 200


def test_generate(client: TestClient, tts: TTS, recording: bytes) -> None:
    params = json.dumps({"temperature": 0.5, "top_p": 0.9, "top_k": 30, "seed": 1, "n_threads": 4})
    reply = client.post("/generate", data={"text": "Hi.", "params": params, "voice_dir": "/etc"})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
    wanted = tts.speak("Hi.", seed=1, sampling=Sampling(0.5, 0.9, 30)).pcm
    np.testing.assert_allclose(decoded(reply.content)[0], wanted, atol=2 / 32768)
    assert ignored(reply) == {"n_threads", "voice_dir"}
    raw = client.post("/generate", data={"text": "Hi.", "params": '{"stream": true, "output_format": "pcm_s16le", "seed": 1}'})
    assert raw.headers["x-audio-encoding"] == "pcm_s16le"
    assert len(raw.content) == 2 * len(tts.speak("Hi.", seed=1).pcm)
    voices = [
        client.post("/generate", data={"text": "Hi.", "params": '{"seed": 1}', **voice}).content
        for voice in ({"voice": "awb"}, {"voice_id": "awb"}, {"voice_profile": "awb"})
    ]
    assert voices[0] == voices[1] == voices[2] == spoken(client, reference_id="awb").content
    cloned = [
        client.post("/generate", data={"text": "Hi.", "params": '{"seed": 1}', text: WORDS}, files={audio: recording})
        for audio, text in (("reference", "reference_text"), ("prompt_audio", "prompt_text"), ("ref_audio", "ref_text"))
    ]
    assert [each.status_code for each in cloned] == [200] * 3, cloned[0].text
    assert cloned[0].content == cloned[1].content == cloned[2].content != voices[0]
    assert client.post("/generate", data={"text": "Hi."}, files={"reference": recording}).status_code == 400
    assert client.post("/generate", data={"text": "Hi.", "params": "[1]"}).json()["statusCode"] == 400


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("get", "/v1/references/list", "200"), ("post", "/v1/vqgan/encode", "4XX"), ("post", "/v1/tts", "4XX")],
)
@pytest.mark.parametrize("format", ["json", "msgpack"])
def test_the_description_has_both_encodings(client: TestClient, method: str, path: str, status: str, format: str) -> None:
    reply = client.request(method, path, params={"format": format})
    described = client.get("/openapi.json").json()["paths"][path][method]["responses"][status]
    assert reply.headers["content-type"] == f"application/{format}"
    assert f"application/{format}" in described["content"]
