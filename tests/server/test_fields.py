"""Fields of a request to speak: every spelling, range and type, and what is done with fields that change nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from fastapi.testclient import TestClient

from fishrt import TTS, FishrtError
from fishrt.bundle.features import RepetitionPenalty
from fishrt.server.problems import Problem, problem
from fishrt.server.service import Service
from fishrt.server.settings import Settings
from fishrt.server.speech.fields import Speak, SpeechFields, speak_of

Of = Callable[..., Speak]


@pytest.fixture(scope="module")
def service(tts: TTS) -> Service:
    return Service(tts, Settings())


@pytest.fixture(scope="module")
def of(service: Service) -> Of:
    """Return the checked request of these fields."""

    def checked(*, accept: str = "", **fields: Any) -> Speak:
        return asyncio.run(speak_of(service, {"input": "Hi.", **fields}, accept=accept))

    return checked


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"input": None, "text": "Ho."}, "text", "Ho."),
        ({"voice": "slt"}, "voice", "slt"),
        ({"voice": {"id": "slt"}}, "voice", "slt"),
        ({"voice": ["slt", {"id": "awb"}]}, "voice", ["slt", "awb"]),
        ({"reference_id": "slt"}, "voice", "slt"),
        ({"voice_id": "slt"}, "voice", "slt"),
        ({"speaker": "slt"}, "voice", "slt"),
        ({"voice": "default"}, "voice", None),
        ({"voice": ""}, "voice", None),
        ({"voice": "unconditioned"}, "voice", []),
        ({"seed": 7}, "seed", 7),
        ({"max_new_tokens": 9}, "max_frames", 9),
        ({"max_tokens": 9}, "max_frames", 9),
        ({"max_new_tokens": 0}, "max_frames", None),
        ({"max_new_tokens": 10**9}, "max_frames", 4096),
        ({"volume_db": 20}, "volume", 10),
        ({"prosody": {"volume": -20}}, "volume", 0.1),
        ({}, "volume", 1),
        ({"speed": 2}, "speed", 2),
        ({"speed": "0.5"}, "speed", 0.5),
        ({"prosody": {"speed": 1.5}}, "speed", 1.5),
        ({"mode": "fast"}, "mode", "fast"),
        ({}, "mode", "balanced"),
    ],
)
def test_every_spelling_of_a_field(of: Of, fields: dict[str, Any], name: str, value: Any) -> None:
    for given in (fields, {"extra_body": fields}, {"provider": {"options": {"fish-audio": fields}}}):
        whole = {"input": None, **given} if fields.get("text") else given
        found = getattr(of(**whole).request, name)
        assert found == (pytest.approx(value) if isinstance(value, float | int) else value)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": 1}, "temperature", 1),
        ({"temp": 0.5}, "temperature", 0.5),
        ({"top_p": 1}, "top_p", 1),
        ({"top_k": 5}, "top_k", 5),
        ({}, "top_k", None),
    ],
)
def test_sampling(of: Of, fields: dict[str, Any], name: str, value: Any) -> None:
    sampling = of(**fields).request.sampling
    assert getattr(sampling, name) == value


@pytest.mark.parametrize("off", [0, -1])
def test_top_k_that_is_off_removes_no_token(of: Of, tts: TTS, off: int) -> None:
    sampling = of(top_k=off).request.sampling
    assert sampling is not None
    assert sampling.top_k == tts.bundle.manifest.model.vocab_size


def test_the_top_level_wins_then_extra_body(of: Of) -> None:
    outer = {"extra_body": {"temperature": 0.5, "seed": 5}, "provider": {"options": {"x": {"seed": 6, "top_p": 0.7}}}}
    found = of(temp=0.4, **outer).request
    assert found.sampling is not None
    assert (found.sampling.temperature, found.seed, found.sampling.top_p) == (0.4, 5, 0.7)


NULL = "model voice response_format speed volume_db stream stream_format sample_rate temperature seed extra_body provider".split()


def test_null_is_absent(of: Of) -> None:
    assert of(**dict.fromkeys(NULL)) == of()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": "  \n"}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["Hi."]}, "input"),
        ({"input": "\ud800"}, "input"),
        ({"input": "a" * 50_001}, "input"),
        ({"model": 5}, "model"),
        ({"voice": 5}, "voice"),
        ({"voice": {"name": "slt"}}, "voice"),
        ({"voice": []}, "voice"),
        ({"voice": [5]}, "voice"),
        ({"voice": True}, "voice"),
        ({"response_format": "midi"}, "response_format"),
        ({"response_format": 5}, "response_format"),
        ({"format": "midi"}, "response_format"),
        ({"stream": "true"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_format": "chunks"}, "stream_format"),
        ({"speed": 0.24}, "speed"),
        ({"speed": 4.01}, "speed"),
        ({"speed": "fast"}, "speed"),
        ({"speed": "nan"}, "speed"),
        ({"speed": True}, "speed"),
        ({"prosody": {"speed": 9}}, "speed"),
        ({"volume_db": 20.5}, "volume_db"),
        ({"sample_rate": 3999}, "sample_rate"),
        ({"sample_rate": 192_001}, "sample_rate"),
        ({"sample_rate": "24000"}, "sample_rate"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"mp3_bitrate": 5}, "mp3_bitrate"),
        ({"response_format": "opus", "opus_bitrate": -5}, "opus_bitrate"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"temp": 2}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 5.5}, "top_k"),
        ({"repetition_penalty": 0.8}, "repetition_penalty"),
        ({"repetition_penalty": 2.1}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 10**30}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"instructions": "a" * 4097}, "instructions"),
        ({"num_steps": 20}, "num_steps"),
        ({"extra_body": {"cfg_scale_text": 3.0}}, "cfg_scale_text"),
        ({"extra_body": "text"}, "extra_body"),
    ],
)
def test_what_is_out_of_range_or_of_another_type_is_400(of: Of, fields: dict[str, Any], param: str) -> None:
    with pytest.raises((Problem, FishrtError)) as caught:
        of(**fields)
    found = problem(caught.value)
    assert (found.status_code, found.param) == (400, param), found.detail


def test_an_error_has_the_name_that_the_client_used(of: Of) -> None:
    with pytest.raises(Problem, match="temp: a number below 2 is expected"):
        of(temp=2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": None}, "input (or text): it is missing"),
        ({"input": ""}, "input: the text is empty"),
        ({"input": " "}, "input: the text is empty"),
        ({"input": 5}, "input: a text is expected"),
        ({"input": None, "text": ["Hi."]}, "text: a text is expected"),
        ({"response_format": "midi"}, "response_format: 'mp3', 'opus', 'aac', 'flac', 'wav' or 'pcm' is expected"),
        ({"stream": "yes"}, "stream: true or false is expected"),
        ({"speed": "fast"}, "speed: a number is expected"),
        ({"speed": 5}, "speed: a number of at most 4 is expected"),
        ({"top_p": 0}, "top_p: a number above 0 is expected"),
        ({"seed": 1.5}, "seed: a whole number is expected"),
        ({"seed": -1}, "seed: a number of at least 0 is expected"),
        ({"voice": 5}, 'voice: a name, or an object such as {"id": "…"}, is expected'),
        ({"instructions": "a" * 4097}, "instructions: at most 4096 characters are expected"),
    ],
)
def test_an_error_says_what_is_expected(of: Of, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(Problem) as caught:
        of(**fields)
    assert caught.value.detail == said


WRONG = [5, -1e9, 1e30, 1.5, "x", "\ud800", "1e999", b"x", True, [], ["x"], {}, {"id": 5}, "a" * 5000]


@pytest.mark.parametrize("name", SpeechFields.model_fields)
@pytest.mark.parametrize("lax", [False, True])
def test_no_error_is_in_the_words_of_a_library(service: Service, name: str, lax: bool) -> None:
    for value in WRONG:
        try:
            asyncio.run(speak_of(service, {"input": "Hi.", name: value}, lax=lax))
        except (Problem, FishrtError) as error:
            said = problem(error).detail
            assert not re.search(r"Input should|String should|Value error|another value|valid |required", said), (name, value)


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("GET", "/model?page_size=x", "page_size: a whole number is expected"),
        ("GET", "/model?page_number=0", "page_number: a number of at least 1 is expected"),
        ("GET", "/model?self=x", "self: true or false is expected"),
        ("POST", "/v1/audio/encoding?persist=x", "persist: true or false is expected"),
    ],
)
def test_an_error_of_a_query_says_what_is_expected(client: TestClient, method: str, path: str, said: str) -> None:
    reply = client.request(method, path)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, said)


@pytest.mark.parametrize(
    ("fields", "ignored"),
    [
        (
            {"repetition_penalty": 1.1, "chunk_length": 200, "latency": "balanced"},
            {"repetition_penalty", "chunk_length", "latency"},
        ),
        ({"prosody": {"normalize_loudness": True, "speed": 1}}, {"prosody.normalize_loudness"}),
        ({"extra_body": {"early_stop_threshold": 1.0}}, {"early_stop_threshold"}),
        ({"instructions": "Speak softly."}, {"instructions"}),
        ({"user": "me", "tempature": 1, "language": None}, {"user", "tempature"}),
        ({"extra_body": {"top-p": 1}}, {"top-p"}),
        (
            {"prosody": {"pitch": 1}, "provider": {"order": ["x"], "options": {"x": {"sped": 2}}}},
            {"prosody.pitch", "provider.order", "sped"},
        ),
        ({"prosody": 5, "provider": "x"}, {"prosody", "provider"}),
        ({"text": "Ho.", "voice": "slt", "speaker": "awb"}, {"text", "speaker"}),
    ],
)
def test_fields_that_change_nothing_are_listed(of: Of, fields: dict[str, Any], ignored: set[str]) -> None:
    assert set(of(**fields).ignored) == ignored


def test_ignored_fields_are_in_the_reply(client: TestClient) -> None:
    reply = client.post("/v1/audio/speech", json={"input": ".", "latency": "low", "repetition_penalty": 1.1, "x\r\n": 1})
    assert reply.headers["x-ignored-parameters"] == "latency, ?, repetition_penalty"
    assert "x-ignored-parameters" not in client.post("/v1/audio/speech", json={"input": "."}).headers
    many = client.post("/v1/audio/speech", json={"input": ".", **{f"x{n}" * 15: 1 for n in range(100)}})
    assert len(many.headers["x-ignored-parameters"]) < 1000
    assert many.headers["x-ignored-parameters"].endswith(", ...")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/audio/speech", {"json": {"input": ".", "sead": 1}}),
        ("/v1/audio/speech", {"json": {"input": ".", "sead": 1, "stream_format": "sse"}}),
        ("/v1/audio/speech/batch", {"json": {"items": [{"input": "."}, {"input": ".", "sead": 1}]}}),
        ("/v1/audio/speech/batch", {"json": {"items": [{"input": "."}], "sead": 1}}),
        ("/v1/tts", {"json": {"text": ".", "sead": 1}}),
        ("/v1/tts", {"data": {"text": ".", "sead": "1"}}),
        ("/v1/tts", {"content": msgpack.packb({"text": ".", "sead": 1}), "headers": {"Content-Type": "application/msgpack"}}),
        ("/generate", {"data": {"text": ".", "sead": "1"}}),
        ("/generate", {"data": {"text": ".", "params": '{"sead": 1}'}}),
    ],
)
def test_a_misspelt_field_is_named_in_each_dialect(client: TestClient, path: str, body: dict[str, Any]) -> None:
    reply = client.post(path, **body)
    assert (reply.status_code, reply.headers.get("x-ignored-parameters")) == (200, "sead")


@pytest.mark.parametrize(
    ("fields", "accept", "wanted"),
    [
        ({}, "", ("mp3", False, False)),
        ({"stream": True}, "", ("pcm", True, False)),
        ({"stream": True, "response_format": "mp3"}, "", ("mp3", True, False)),
        ({"streaming": True, "format": "wav"}, "", ("wav", True, False)),
        ({"response_format": "pcm"}, "", ("pcm", True, False)),
        ({"response_format": "pcm", "stream": False}, "", ("pcm", False, False)),
        ({"output_format": "pcm_s16le"}, "", ("pcm", True, False)),
        ({"response_format": "MP3"}, "", ("mp3", False, False)),
        ({"stream_format": "audio"}, "", ("mp3", True, False)),
        ({"stream_format": "sse"}, "", ("mp3", True, True)),
        ({}, "text/event-stream", ("mp3", True, True)),
        ({"stream": True}, "text/event-stream", ("pcm", True, True)),
        ({"stream_format": "audio"}, "text/event-stream", ("mp3", True, False)),
        ({}, "audio/*", ("mp3", False, False)),
    ],
)
def test_the_form_of_the_reply(of: Of, fields: dict[str, Any], accept: str, wanted: tuple[str, bool, bool]) -> None:
    found = of(accept=accept, **fields)
    assert (found.format, found.stream, found.sse) == wanted


def test_the_bit_rate_is_that_of_the_format(of: Of) -> None:
    asked = {"mp3_bitrate": 64, "opus_bitrate": 32_000}
    assert [of(response_format=kind, **asked).bitrate for kind in ("mp3", "opus", "wav")] == [64, 32_000, None]


def test_any_text_length(tts: TTS) -> None:
    fields = {"input": "a" * 60_000}
    assert asyncio.run(speak_of(Service(tts, Settings(max_text_length=0)), fields)).request.text == fields["input"]
    with pytest.raises(Problem, match="60,000 characters; at most 50,000"):
        asyncio.run(speak_of(Service(tts, Settings()), fields))


@pytest.fixture(scope="module")
def other_model(tts: TTS) -> Of:
    """Return the checked request for a model that reads tags and has a repetition penalty."""
    manifest = tts.bundle.manifest
    assert manifest.model.reads is not None
    penalty = RepetitionPenalty(penalty=1.2, window=16, main="row")
    model = replace(
        manifest.model,
        reads=replace(manifest.model.reads, tags=("[]",)),
        sampling=replace(manifest.model.sampling, repetition_penalty=penalty),
    )
    service = Service(TTS(replace(tts.bundle, manifest=replace(manifest, model=model)), tts.engines), Settings())
    return lambda **fields: asyncio.run(speak_of(service, {"input": "Hi.", **fields}))


@pytest.mark.parametrize(
    ("text", "style", "wanted"),
    [
        ("Hi.", "Speak softly.", "[Speak softly.] Hi."),
        ("Hi.", "a [tag]\nand\tmore", "[a (tag) and more] Hi."),
        ("<|speaker:1|>Hi.", "calm", "<|speaker:1|>[calm] Hi."),
        ("Hi.", "  ", "Hi."),
    ],
)
def test_instructions_are_a_tag_for_a_model_that_reads_tags(other_model: Of, text: str, style: str, wanted: str) -> None:
    found = other_model(input=text, instructions=style)
    assert (found.request.text, found.ignored) == (wanted, ())


def test_a_repetition_penalty_is_for_models_that_have_one(other_model: Of) -> None:
    found = other_model(repetition_penalty=1.5)
    assert found.request.sampling is not None
    assert (found.request.sampling.repetition_penalty, found.ignored) == (1.5, ())
