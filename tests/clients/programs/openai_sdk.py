"""OpenAI's SDK for Python."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import openai
from openai import AsyncOpenAI, OpenAI
from report import FOLDER, KEYED_URL, LONG, SAMPLE, SAMPLE_TEXT, TEXT, URL, refusal, run, scenario

client = OpenAI(base_url=f"{URL}/v1", api_key="any", max_retries=0)
SEED = {"seed": 6}


def facts(error: openai.APIStatusError) -> dict[str, Any]:
    return {"status": error.status_code, "code": error.code, "param": error.param, "type": error.type, "id": error.request_id}


@scenario
def whole() -> None:
    reply = client.audio.speech.create(model="tts-1", voice="alloy", input=TEXT, extra_body=SEED)
    reply.stream_to_file(FOLDER / "whole.mp3")


@scenario
def formats() -> dict[str, Any]:
    seen = {}
    for form in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        with client.audio.speech.with_streaming_response.create(
            model="tts-1", voice="awb", input=TEXT, response_format=form, stream_format="audio", extra_body=SEED
        ) as reply:
            reply.stream_to_file(FOLDER / f"streamed.{form}")
            seen[form] = dict(reply.headers)
    return seen


@scenario
def parts() -> list[int]:
    """The samples come while they are made."""
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="awb", input=TEXT, response_format="pcm", instructions="Calm.", extra_body=SEED
    ) as reply:
        return [len(part) for part in reply.iter_bytes()]


@scenario
def events() -> dict[str, Any]:
    with client.audio.speech.with_streaming_response.create(
        model="gpt-4o-mini-tts", voice="awb", input=TEXT, response_format="mp3", stream_format="sse", extra_body=SEED
    ) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    found = [json.loads(line) for line in lines]
    sound = b"".join(base64.b64decode(event["audio"]) for event in found if event["type"] == "speech.audio.delta")
    (FOLDER / "events.mp3").write_bytes(sound)
    return {"types": [event["type"] for event in found], "usage": found[-1]["usage"]}


@scenario
def seeds() -> list[bool]:
    one, again, other = (
        client.audio.speech.create(model="x", voice="awb", input="Hi.", response_format="wav", extra_body={"seed": seed}).content
        for seed in (1, 1, 2)
    )
    return [one == again, one == other]


@scenario
def speeds() -> None:
    for speed in (1, 2):
        reply = client.audio.speech.create(
            model="x", voice="awb", input=TEXT, response_format="wav", speed=speed, extra_body=SEED
        )
        reply.write_to_file(FOLDER / f"speed{speed}.wav")


@scenario
def presets() -> list[str]:
    names = "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()
    return [name for name in names if client.audio.speech.create(model="tts-1", voice=name, input="Hi.").content]


@scenario
def voices() -> dict[str, Any]:
    sample = ("sample.wav", SAMPLE, "audio/wav")

    def create() -> Any:
        return client.audio.voices.create(
            name="mine", audio_sample=sample, consent="cons_1234", extra_body={"ref_text": SAMPLE_TEXT}
        )

    def speak() -> Any:
        return client.audio.speech.create(model="tts-1", voice={"id": made.id}, input=TEXT, extra_body={"seed": 1})

    made = create()
    taken = refusal(openai.ConflictError, create)
    speak().write_to_file(FOLDER / "cloned.mp3")
    deleted = client.audio.voices.delete(made.id)
    unknown = refusal(openai.NotFoundError, speak)
    again = refusal(openai.NotFoundError, lambda: client.audio.voices.delete(made.id))
    return {
        "made": made.model_dump(),
        "deleted": deleted.model_dump(),
        "taken": facts(taken),
        "unknown": facts(unknown),
        "again": facts(again),
    }


@scenario
def models() -> list[Any]:
    listed = [model.id for model in client.models.list()]
    return [
        listed,
        client.models.retrieve(listed[0]).id,
        facts(refusal(openai.NotFoundError, lambda: client.models.retrieve("x"))),
    ]


@scenario
def mistakes() -> dict[str, Any]:
    def refused(**fields: Any) -> dict[str, Any]:
        call = {"model": "tts-1", "voice": "alloy", "input": "Hi.", **fields}
        return facts(refusal(openai.BadRequestError, lambda: client.audio.speech.create(**call)))

    return {
        "speed": refused(speed=9),
        "response_format": refused(response_format="ogg"),
        "input": refused(input=""),
        "voice": refused(voice=7),
        "top_p": refused(extra_body={"top_p": 2}),
    }


@scenario
def keys() -> dict[str, Any]:
    def with_key(key: str) -> OpenAI:
        return OpenAI(base_url=f"{KEYED_URL}/v1", api_key=key, max_retries=0)

    def speak(key: str) -> Any:
        return with_key(key).audio.speech.create(model="tts-1", voice="alloy", input="Hi.")

    right = len(speak("secret").content)
    wrong = facts(refusal(openai.AuthenticationError, lambda: speak("wrong")))
    return {"right": right, "wrong": wrong, "listed": [model.id for model in with_key("wrong").models.list()]}


@scenario
def full() -> dict[str, Any]:
    """While one speaks and none may wait, the next one is refused, until the first goes away."""
    one = OpenAI(base_url=f"{KEYED_URL}/v1", api_key="secret", max_retries=0)

    def speak() -> Any:
        return one.audio.speech.create(model="tts-1", voice="alloy", input="Hi.")

    with one.audio.speech.with_streaming_response.create(
        model="tts-1", voice="alloy", input=LONG, response_format="pcm"
    ) as first:
        parts = first.iter_bytes()  # kept: the SDK closes a reply whose iterator is dropped
        next(parts)
        busy = refusal(openai.RateLimitError, speak)
    patient = one.with_options(max_retries=5).audio.speech.create(model="tts-1", voice="alloy", input="Hi.")
    return {**facts(busy), "retry_after": busy.response.headers["retry-after"], "then": len(patient.content)}


@scenario
async def at_once() -> list[bool]:
    """Eight requests at once each get what they get alone."""
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="any") as many:

        async def speak(seed: int) -> bytes:
            reply = await many.audio.speech.create(
                model="x", voice="awb", input="Good morning.", response_format="wav", extra_body={"seed": seed}
            )
            return reply.content

        alone = [await speak(seed) for seed in range(8)]
        together = await asyncio.gather(*(speak(seed) for seed in range(8)))
    return [one == other for one, other in zip(alone, together, strict=True)]


run()
