"""The dialect of Echo-TTS' streaming server: its fields on every route, and its own route, in the cases of its vectors."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from echo_vectors import http_cases
from fake_diffusion import CODEC, diffusion_tts
from fishrt import TTS, FishrtError
from fishrt.audio.encoders import pcm16
from fishrt.diffusion.denoising import PRESETS, Denoising
from fishrt.diffusion.text import split
from fishrt.server.diffusion.echo import speak_of_echo, usual
from fishrt.server.diffusion.fields import DIFFUSION, KEYS, LANGUAGE, MOST_STEPS, asked, denoising_of
from fishrt.server.problems import Problem, problem
from fishrt.server.service import Service
from fishrt.server.settings import Settings
from fishrt.server.speech.fields import Speak, speak_of
from fishrt.speaking.stream import growing_chunks, whole_chunks
from helpers_diffusion import diffusion_model

SPEECH = "/echo/v1/audio/speech"
MODEL = diffusion_model(layers=24)
LONG = "The birds sing in the trees, and the sun shines on the sea. " * 30
Plan = list[tuple[str, list[int], list[int], int]]


def settings_of(base: Denoising | None = None, **fields: Any) -> Denoising:
    return denoising_of(fields, MODEL, base, None)[0].resolve(MODEL)


def refused(call: Callable[[], object]) -> Problem:
    with pytest.raises((Problem, FishrtError)) as caught:
        call()
    return problem(caught.value)


@pytest.fixture(scope="module")
def echo_tts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TTS]:
    """A small diffusion model with windows of the usual length."""
    with diffusion_tts(tmp_path_factory.mktemp("echo") / "bundle", max_frames=640, max_tokens=768) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def service(echo_tts: TTS) -> Service:
    return Service(echo_tts, Settings())


@pytest.fixture(scope="module")
def speak(service: Service) -> Callable[..., Speak]:
    """Return the request of the dialect's route for these fields."""
    return lambda **fields: asyncio.run(speak_of_echo(service, {"input": "Hi", **fields}))


def planned(speak: Speak, tts: TTS) -> Plan:
    """Return text, blocks, steps and seed of every generation."""
    job, found = tts.job(speak.request, None, growing_chunks if speak.stream else whole_chunks), []
    for n, piece in enumerate(job.task.pieces):
        settings = job._settings(n)
        steps = [settings.steps] * len(settings.blocks) if isinstance(settings.steps, int) else list(settings.steps)
        found.append((piece, list(settings.blocks), steps, job.task.seed + n))
    return found


# Fields


def test_fields_are_read_as_the_server_reads_them() -> None:
    usual_settings = Denoising(variant="streaming").over(PRESETS["default"])
    for case in http_cases()["sampler_config_cases"]:
        given = case["extra_body"]
        if "status" in case:
            found = refused(lambda given=given: denoising_of(given, MODEL, usual_settings, None))
            assert (found.status_code, found.param in given or found.param == "num_steps") == (case["status"], True)
            continue
        settings, wanted = settings_of(usual_settings, **given), case["config"]
        for name, value in asked(settings).items():
            usual_value = {"truncation_factor": 1.0, "init_scale": 0.999}.get(name)
            expected = usual_value if wanted[name] is None else wanted[name]
            each = value if isinstance(expected, list) and isinstance(value, tuple) else [value] * len(wanted["block_sizes"])
            assert list(each) == expected if isinstance(expected, list) else value == expected, (given, name)


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"block_sizes": 64}, "blocks", (64,)),
        ({"block_sizes": "64"}, "blocks", (64,)),
        ({"num_steps": "7"}, "steps", 7),
        ({"block_sizes": [8, 8], "num_steps": [3, 4]}, "steps", (3, 4)),
        ({"cfg_scale_text": 2}, "cfg_text", 2),
        ({"early_stop_on_zero": "off"}, "early_stop", False),
        ({"early_stop_on_zero": 1}, "early_stop", True),
        ({"zero_eps": "0.5"}, "zero_eps", 0.5),
        ({"preset": "Low-Mid"}, "steps", (8, 10, 15)),
        ({"preset": "low", "num_steps": 3}, "steps", 3),
        ({"preset": "low", "num_steps": 3}, "blocks", (32, 64, 272, 272)),
        ({"preset": "independent_high_cfg_flat"}, "truncation", 0.8),
        ({"speaker_kv_scale": 1.25}, "force_layers", 24),
        ({"speaker_kv_scale": 1.25, "speaker_kv_min_t": 0}, "force_min_t", 0),
    ],
)
def test_what_a_field_sets(fields: dict[str, Any], name: str, value: object) -> None:
    assert getattr(settings_of(**fields), name) == value


def test_the_pace_of_a_text() -> None:
    pace = settings_of(chunk_target_seconds=9, chunk_min_seconds="2", chunk_max_seconds=12.5, chunk_chars_per_second=20).pace
    assert pace is not None
    assert (pace.target_s, pace.min_s, pace.max_s, pace.letters_per_s, pace.words_per_s) == (9, 2, 12.5, 20, 2.7)
    for off in (False, "off", "no", "0", "", "False"):
        pace = settings_of(chunking_enabled=off).pace
        assert split(LONG, 16, 10**6, pace, "streaming") == ["[S1] " + " ".join([LONG[:59]] * 30)]
        assert all(len(piece) < 768 for piece in split(LONG, 16, 768, pace, "streaming"))


@pytest.mark.parametrize(
    ("fields", "unused"),
    [
        ({"speaker_kv_min_t": 0.9, "speaker_kv_max_layers": 4}, {"speaker_kv_min_t", "speaker_kv_max_layers"}),
        ({"chunking_enabled": False, "chunk_min_seconds": 3}, {"chunk_min_seconds"}),
        ({"chunking_enabled": True, "chunk_min_seconds": 3}, set()),
    ],
)
def test_what_changes_nothing_is_said(fields: dict[str, Any], unused: set[str]) -> None:
    assert set(denoising_of(fields, MODEL, None, None)[1]) == unused


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"num_steps": 0}, "num_steps", "at least 1"),
        ({"num_steps": MOST_STEPS + 1}, "num_steps", f"at most {MOST_STEPS}"),
        ({"num_steps": "x"}, "num_steps", "a number is expected"),
        ({"num_steps": True}, "num_steps", "a whole number"),
        ({"num_steps": 8.5}, "num_steps", "a whole number"),
        ({"num_steps": []}, "num_steps", "the list is empty"),
        ({"num_steps": [4, None]}, "num_steps", "a whole number"),
        ({"block_sizes": []}, "block_sizes", "the list is empty"),
        ({"block_sizes": {}}, "block_sizes", "a whole number"),
        ({"block_sizes": [0]}, "block_sizes", "at least 1"),
        ({"block_sizes": "9" * 5000}, "block_sizes", "a whole number"),
        ({"block_sizes": [8, 8], "num_steps": [3]}, "num_steps", "one for each block"),
        ({"preset": "low", "num_steps": [3, 3]}, "num_steps", "one for each block"),
        ({"block_sizes": [8, 8], "truncation_factor": [0.8]}, "truncation_factor", "one for each block"),
        ({"init_scale": [1, 1.5]}, "init_scale", "at most 1"),
        ({"init_scale": 0}, "init_scale", "above 0"),
        ({"cfg_scale_text": 1e30}, "cfg_scale_text", "at most 100"),
        ({"cfg_min_t": "nan"}, "cfg_min_t", "a number is expected"),
        ({"early_stop_on_zero": "perhaps"}, "early_stop_on_zero", "true or false"),
        ({"guidance_mode": "joint"}, "guidance_mode", "'independent' is expected"),
        ({"chunk_min_seconds": -1}, "chunk_min_seconds", "at least 0"),
        ({"preset": "loud"}, None, "there is no preset 'loud'; the presets are"),
        ({"block_sizes": [320, 321]}, None, "641 frames"),
        ({"rescale_k": 1.2}, None, "give both or neither"),
    ],
)
def test_a_value_out_of_range_is_named(fields: dict[str, Any], param: str | None, message: str) -> None:
    found = refused(lambda: denoising_of(fields, MODEL, None, None))
    assert (found.status_code, found.param) == (400, param)
    assert message in found.detail


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "0.5", "8", "1e999", "x"])


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), _SCALARS | st.lists(_SCALARS, max_size=3) | st.just({"a": 1}), max_size=4))
def test_any_value_is_taken_or_refused(fields: dict[str, Any]) -> None:
    found = {name: value for name, value in fields.items() if value is not None}
    try:
        settings, _ = denoising_of(found, MODEL, Denoising(20), None)
    except (Problem, FishrtError) as error:
        status = problem(error).status_code
    else:
        status = 200 if settings.resolve(MODEL).blocks else 0
    assert status in (200, 400)


def test_blocks_need_a_model_that_has_them() -> None:
    plain = diffusion_model(blockwise=False)
    assert "no weights for blocks" in refused(lambda: denoising_of({"block_sizes": [8, 8]}, plain, None, None)).detail
    assert usual(plain, {}, stream=True) == usual(plain, {}, stream=False)


@pytest.mark.parametrize("nested", [False, True])
def test_fields_are_at_the_top_or_in_extra_body(service: Service, nested: bool) -> None:
    given = {"block_sizes": [16, 32], "num_steps": 7, "cfg_scale_speaker": 5}
    body = {"extra_body": given} if nested else given
    settings = asyncio.run(speak_of(service, {"input": "Hi", **body})).request.denoising
    assert (settings.blocks, settings.steps, settings.cfg_speaker) == ((16, 32), 7, 5)


def test_a_limit_of_frames(service: Service) -> None:
    speak = asyncio.run(speak_of(service, {"input": "Hi", "max_new_tokens": 64}))
    assert (speak.request.denoising.resolve(MODEL).blocks, speak.ignored) == ((64,), ())
    for preset in ({"preset": "low"}, {"preset": "independent_high_cfg"}):
        speak = asyncio.run(speak_of(service, {"input": "Hi", "max_new_tokens": 64, **preset}))
        assert sum(speak.request.denoising.resolve(MODEL).blocks) == 64
    assert planned(asyncio.run(speak_of_echo(service, {"input": "Hi", "max_new_tokens": 64})), service.tts)[0][1] == [32, 32]
    speak = asyncio.run(speak_of(service, {"input": "Hi", "max_new_tokens": 2048, "block_sizes": [32, 32]}))
    assert (speak.request.denoising.resolve(MODEL).frames, speak.ignored) == (64, ("max_new_tokens",))


@pytest.mark.parametrize("name", sorted(LANGUAGE))
def test_settings_of_language_models_are_refused_or_ignored(service: Service, speak: Any, name: str) -> None:
    value = "x" if name == "speaker_prompt" else 1
    found = refused(lambda: asyncio.run(speak_of(service, {"input": "Hi", name: value})))
    assert (found.status_code, found.param) == (400, name)
    assert found.detail == f"{name}: the loaded model is a diffusion model and has no such setting"
    assert speak(**{name: value}).ignored == (name,)
    assert asyncio.run(speak_of(service, {"input": "Hi", name: value}, lenient=True)).ignored == (name,)


def test_a_language_model_refuses_settings_of_diffusion_or_ignores_them(tts: TTS) -> None:
    given = {"input": "Hi", "extra_body": {"num_steps": 4, "zero_eps": 1}}
    spoken = asyncio.run(speak_of_echo(Service(tts, Settings()), given))
    assert (spoken.ignored, spoken.format, spoken.stream, spoken.request.seed) == (("num_steps", "zero_eps"), "pcm", True, 0)
    assert DIFFUSION < KEYS


def test_a_client_of_the_dialect_hears_a_language_model(client: TestClient, tts: TTS) -> None:
    reply = client.post(SPEECH, json={"input": "Hi.", "voice": "awb", "extra_body": {"num_steps": [8, 15, 20]}})
    np.testing.assert_allclose(heard(reply), tts.speak("Hi.", voice="awb", seed=0).pcm, atol=2 / 32768)
    assert (reply.headers["content-type"], reply.headers["x-ignored-parameters"]) == ("application/octet-stream", "num_steps")
    assert client.post(SPEECH, json={"input": "Hi.", "stream": False}).headers["content-type"] == "audio/mpeg"
    assert client.post("/v1/audio/speech", json={"input": "Hi.", "num_steps": 8}).json()["error"]["param"] == "num_steps"


# The dialect's own route


def test_what_is_generated_is_what_the_server_generates(echo_tts: TTS, speak: Any) -> None:
    cases, count = http_cases(), 0
    for case in cases["http_cases"]:
        if case["path"] != "/v1/audio/speech" or case["status"] != 200 or case["body"]["input"] in ("", "日本"):
            continue
        body = {**case["body"], "voice": None}
        long = body["input"] == "<LONG_TEXT>"
        body["input"] = cases["long_text"] if long else body["input"]
        found = planned(speak(**body), echo_tts)
        if "chunking_enabled" in body.get("extra_body", {}):  # the original cuts off what its tokens do not take
            assert " ".join(text.removeprefix("[S1] ") for text, *_ in found) == body["input"].strip()
            assert [part[1:] for part in found] == [([32, 128, 480], [8, 15, 20], 0), ([640], [20], 1), ([640], [20], 2)]
        else:
            wanted = [(text, blocks, steps[: len(blocks)], seed) for _, text, blocks, steps, seed in case["plan"]]
            assert found == wanted
        count += 1
    assert count == 8


def test_what_the_server_refuses_is_refused(speak: Any) -> None:
    cases, count = http_cases(), 0
    for case in cases["http_cases"]:
        if case["path"] == "/v1/audio/speech" and case["status"] >= 400 and case["voice_resolved_by_stub"]:
            if case["body"].get("response_format") == "mp3":  # there is always an encoder here
                assert speak(**{**case["body"], "voice": None}).format == "mp3"
                continue
            given = {"voice": None, **case["body"]} if case["body"] else {"input": None}
            assert refused(lambda given={**given, "voice": None}: speak(**given)).status_code == 400
            count += 1
    assert count == 7


def test_samples_are_within_one_step_of_the_servers() -> None:
    cases = http_cases()["pcm_cases"]
    found = pcm16(np.array(cases["input"], np.float32)).astype(int)
    assert np.abs(found - cases["int16"]).max() <= 1


# By HTTP


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TTS]:
    """A diffusion model with short windows, and the voices `anna`, of one recording, and `team`, a folder of two."""
    folder = tmp_path_factory.mktemp("small")
    for name, frames in (("anna/1", 160), ("team/1", 120), ("team/2", 200)):
        path = folder / "voices" / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(recording(frames))
    with diffusion_tts(folder / "bundle", voices=folder / "voices", max_frames=24) as loaded:
        yield loaded


def recording(frames: int) -> bytes:
    """Return a wav file at the codec's rate."""
    file, samples = io.BytesIO(), frames * CODEC.hop
    soundfile.write(file, 0.3 * np.sin(np.arange(samples) * frames / 500), CODEC.sample_rate, format="WAV")
    return file.getvalue()


@pytest.fixture(scope="module")
def echo(small: TTS, start: Callable[..., TestClient]) -> TestClient:
    return start(small)


def heard(reply: Any) -> np.ndarray:
    assert reply.status_code == 200, reply.text
    return np.frombuffer(reply.content, "<i2") / 32768


def test_a_stream_is_the_rule_and_has_the_form_of_the_dialect(echo: TestClient, small: TTS) -> None:
    reply = echo.post(SPEECH, json={"input": "Hi.", "voice": "anna"})
    wanted = small.speak("Hi.", voice="anna", seed=0, denoising=Denoising(20, variant="streaming")).pcm
    np.testing.assert_allclose(heard(reply), wanted, atol=2 / 32768)
    assert (reply.headers["content-type"], reply.headers["x-audio-sample-rate"], reply.headers["x-seed"]) == (
        "application/octet-stream",
        str(small.sample_rate),
        "0",
    )
    assert "content-length" not in reply.headers


def test_whole_speech_has_a_format(echo: TestClient) -> None:
    stream = heard(echo.post(SPEECH, json={"input": "Hi.", "extra_body": {"num_steps": 2}}))
    fields = {"input": "Hi.", "stream": False, "num_steps": [2]}
    reply = echo.post(SPEECH, json={**fields, "response_format": "wav"})
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(reply.content))[0], stream)
    assert (reply.headers["content-type"], reply.headers["x-audio-sample-rate"]) == ("audio/wav", "800")
    assert echo.post(SPEECH, json=fields).headers["content-type"] == "audio/mpeg"
    reply = echo.post(SPEECH, json={**fields, "response_format": "pcm"})
    assert (reply.headers["content-type"], int(reply.headers["content-length"])) == ("application/octet-stream", 2 * len(stream))


def test_a_piece_has_the_seed_and_its_number(echo: TestClient, small: TTS) -> None:
    text = "The birds sing in the trees. The sun shines on the sea."
    fields = {"input": text, "seed": 7, "extra_body": {"chunk_target_seconds": 1, "chunk_min_seconds": 0, "chunk_max_seconds": 2}}
    settings = Denoising(20, variant="streaming")
    parts = [small.speak(part, seed=7 + n, denoising=settings).pcm for n, part in enumerate((text[:28], text[29:]))]
    for stream in (True, False):
        reply = echo.post(SPEECH, json={**fields, "stream": stream, "response_format": "pcm"})
        np.testing.assert_allclose(heard(reply), np.concatenate(parts), atol=2 / 32768)


def test_the_first_piece_of_a_stream_is_in_blocks(echo_tts: TTS, speak: Any) -> None:
    text = "The birds sing in the trees. The sun shines on the sea."
    fields = {"input": text, "truncation_factor": 0.8, "chunk_target_seconds": 1, "chunk_min_seconds": 0, "chunk_max_seconds": 2}
    settings = speak(**fields).request.denoising
    assert (settings.truncation, settings.later.truncation) == (0.8, 0.8)
    assert [part[1:] for part in planned(speak(**fields), echo_tts)] == [
        ([32, 128, 480], [8, 15, 20], 0),
        ([640], [20], 1),
    ]
    assert speak(**{**fields, "truncation_factor": [0.8, 0.8, 0.7]}).request.denoising.later is None


@pytest.mark.parametrize("header", ["", "data:audio/wav;base64,"])
def test_a_recording_in_base64_is_a_voice_without_a_transcript(echo: TestClient, header: str) -> None:
    fields = {"input": "Hi.", "extra_body": {"num_steps": 2}}
    stored = heard(echo.post(SPEECH, json={**fields, "voice": "anna.wav"}))
    given = heard(echo.post(SPEECH, json={**fields, "voice": header + base64.b64encode(recording(160)).decode()}))
    np.testing.assert_array_equal(stored, given)
    assert not np.array_equal(stored, heard(echo.post(SPEECH, json={**fields, "voice": "team"})))


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": "日本"}, 400, "input"),
        ({"input": "Hi", "voice": "nosuch!"}, 404, "voice"),
        ({"input": "Hi", "voice": "../etc"}, 404, "voice"),
        ({"input": "Hi", "voice": "A" * 400}, 400, "voice"),
        ({"input": "Hi", "voice": "A" * 401 + "!"}, 400, "voice"),
        ({"input": "Hi", "response_format": "wav"}, 400, "response_format"),
        ({"input": "Hi", "response_format": "OPUS"}, 400, "response_format"),
        ({"input": "Hi", "stream": False, "response_format": "flac"}, 400, "response_format"),
        ({"input": "Hi", "extra_body": 3}, 400, "extra_body"),
        ({"input": "Hi", "extra_body": {"num_steps": [1, 2]}}, 400, "num_steps"),
        ({"input": "Hi", "extra_body": {"guidance_mode": "x"}}, 400, "guidance_mode"),
        ({"input": "Hi", "stream": False, "extra_body": {"block_sizes": [8, 8]}}, 400, "num_steps"),
        ({"input": "Hi", "seed": -2}, 400, "seed"),
    ],
)
def test_errors_are_those_of_every_route(echo: TestClient, fields: dict[str, Any], status: int, param: str) -> None:
    reply = echo.post(SPEECH, json=fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error"), error


def test_the_other_paths_are_the_same(echo: TestClient, small: TTS) -> None:
    for path in ("/v1/voices", "/health", "/v1/models"):
        assert echo.get(f"/echo{path}").json().keys() == echo.get(path).json().keys()
    assert [voice["id"] for voice in echo.get("/echo/v1/voices").json()["data"]] == ["anna", "team"] == [*small.voices]
    assert echo.post("/echo/v1/audio/speech/", json={"input": "Hi.", "num_steps": 1}).status_code == 200
    assert echo.get("/echo/nothing").status_code == 404
    assert SPEECH in echo.get("/openapi.json").json()["paths"]


def test_openais_route_speaks_whole_windows_unless_blocks_are_asked_for(echo: TestClient, small: TTS) -> None:
    speech = "/v1/audio/speech"
    reply = echo.post(
        speech, json={"input": "Hi.", "seed": 3, "num_steps": 2, "response_format": "wav", "zero_tail_min_frac": 0.9}
    )
    pcm, rate = soundfile.read(io.BytesIO(reply.content))
    np.testing.assert_allclose(pcm, small.speak("Hi.", seed=3, denoising=Denoising(2)).pcm, atol=2 / 32768)
    assert (rate, reply.headers["x-ignored-parameters"]) == (small.sample_rate, "zero_tail_min_frac")
    assert echo.post(speech, json={"input": "Hi.", "num_steps": 1}).headers["content-type"] == "audio/mpeg"
    assert echo.post(speech, json={"input": "Hi.", "temperature": 0.5}).json()["error"]["param"] == "temperature"
    fields = echo.get("/openapi.json").json()["paths"][speech]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "num_steps" in fields["properties"]
    assert "temperature" not in fields["properties"]


def test_the_model_says_what_it_usually_does(echo: TestClient) -> None:
    (model,) = echo.get("/v1/models").json()["data"]
    assert (model["kind"], model["sampling"], model["speakers"]) == ("diffusion", {}, False)
    assert (model["denoising"]["num_steps"], model["denoising"]["block_sizes"]) == (40, [24])
    assert "low_mid" in model["presets"]


def test_other_dialects_ignore_settings_of_language_models(echo: TestClient) -> None:
    reply = echo.post("/v1/tts", json={"text": "Hi.", "top_p": 0, "temperature": 0.7, "repetition_penalty": 1.2, "num_steps": 1})
    assert (reply.status_code, reply.headers["content-type"]) == (200, "audio/wav")
    assert reply.headers["x-ignored-parameters"] == "top_p, temperature, repetition_penalty"


def test_voices_are_latents(echo: TestClient, small: TTS) -> None:
    rate = small.bundle.manifest.codec.frame_rate
    assert echo.get("/v1/voices/team").json()["seconds"] == (120 + 200) / rate + 1
    assert echo.get("/v1/voices/anna/sample").status_code == 200
    latents = np.load(io.BytesIO(echo.post("/v1/audio/encoding", files={"audio": recording(160)}).content))
    assert (latents.dtype, latents.shape) == (np.float32, (160, small.bundle.manifest.codec.channels))
    found = echo.post("/v1/vqgan/encode?format=json", json={"audios": [base64.b64encode(recording(160)).decode()]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "audios")
    found = echo.post("/v1/vqgan/decode?format=json", json={"tokens": [[[1, 2]]]})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "tokens[0]")
    reply = echo.post("/v1/audio/voices", files={"name": (None, "bea"), "audio_sample": recording(160)})
    assert reply.status_code == 200, reply.text
    assert echo.delete("/v1/audio/voices/bea").status_code == 200
