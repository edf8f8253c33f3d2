"""Fish Audio's SDK: the new half, `fishaudio`, and the old half, `fish_audio_sdk`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import fish_audio_sdk as old
import fishaudio as new
from fishaudio.exceptions import AuthenticationError, NotFoundError, RateLimitError, WebSocketError
from fishaudio.types import FlushEvent, ReferenceAudio, TTSConfig
from report import FOLDER, KEYED_URL, LONG, SAMPLE, SAMPLE_TEXT, TEXT, URL, refusal, run, scenario

client = new.FishAudio(api_key="any", base_url=URL)
session = old.Session("any", base_url=URL)
GREEDY = TTSConfig(temperature=0.0, reference_id="awb")
CALM = {"temperature": 0.5, "top_p": 0.7}


def fragments() -> Iterator[str]:
    """Texts as a language model gives them."""
    yield from (f"{word} " for word in TEXT.split(" "))


@scenario
def converted() -> None:
    for form in ("mp3", "wav", "pcm", "opus"):
        sound = client.tts.convert(text=TEXT, config=TTSConfig(format=form, reference_id="awb", **CALM))
        (FOLDER / f"converted.{form}").write_bytes(sound)


@scenario
def usual() -> int:
    """With every default of the SDK."""
    return len(client.tts.convert(text="Hi."))


@scenario
def streamed() -> int:
    parts = list(client.tts.stream(text=TEXT, reference_id="awb", config=TTSConfig(**CALM), latency="normal"))
    (FOLDER / "streamed.mp3").write_bytes(b"".join(parts))
    return len(parts)


@scenario
def greedy() -> list[bool]:
    first, again = (client.tts.convert(text="Good morning.", config=GREEDY) for _ in range(2))
    no_top = client.tts.convert(text="Good morning.", config=TTSConfig(top_p=0.0, reference_id="awb"))
    return [first == again, first == no_top]


@scenario
def speeds() -> None:
    for speed in (1.0, 2.0):
        sound = client.tts.convert(text="Good morning.", format="wav", speed=speed, config=GREEDY)
        (FOLDER / f"speed{speed:.0f}.wav").write_bytes(sound)


@scenario
def cloned() -> None:
    reference = ReferenceAudio(audio=SAMPLE, text=SAMPLE_TEXT)
    (FOLDER / "cloned.mp3").write_bytes(client.tts.convert(text=TEXT, references=[reference]))


@scenario
def socket() -> None:
    for form in ("mp3", "wav", "pcm", "opus"):
        parts = client.tts.stream_websocket(fragments(), format=form, config=TTSConfig(reference_id="awb", **CALM))
        (FOLDER / f"socket.{form}").write_bytes(b"".join(parts))


@scenario
def flushed() -> int:
    texts = ["Good morning! ", FlushEvent(), "The sun is shining, and the birds are singing in the trees."]
    parts = list(client.tts.stream_websocket(iter(texts), config=TTSConfig(reference_id="awb", **CALM)))
    (FOLDER / "flushed.mp3").write_bytes(b"".join(parts))
    return len(parts)


@scenario
async def asynchronous() -> None:
    async def texts() -> Any:
        for text in fragments():
            yield text

    async with new.AsyncFishAudio(api_key="any", base_url=URL) as many:
        config = TTSConfig(reference_id="awb", **CALM)
        (FOLDER / "async.mp3").write_bytes(await many.tts.convert(text=TEXT, config=config))
        parts = [part async for part in many.tts.stream_websocket(texts(), config=config)]
        (FOLDER / "async-socket.mp3").write_bytes(b"".join(parts))


@scenario
def voices() -> dict[str, Any]:
    made = client.voices.create(title="mine", voices=[SAMPLE], texts=[SAMPLE_TEXT], description="Of a test.")
    (FOLDER / "stored.mp3").write_bytes(client.tts.convert(text=TEXT, reference_id=made.id))
    listed = client.voices.list(page_size=50)
    shown = client.voices.get(made.id)
    client.voices.delete(made.id)
    gone = refusal(NotFoundError, lambda: client.voices.get(made.id))
    return {
        "made": [made.title, made.type, made.state],
        "listed": [voice.id for voice in listed.items],
        "total": listed.total,
        "page": len(client.voices.list(page_size=2, page_number=1).items),
        "shown": [shown.id == made.id, shown.title],
        "gone": [gone.status, gone.message],
    }


@scenario
def mistakes() -> list[Any]:
    keyed = new.FishAudio(api_key="wrong", base_url=KEYED_URL)
    unknown = refusal(NotFoundError, lambda: client.tts.convert(text="Hi.", reference_id="nobody"))
    key = refusal(AuthenticationError, lambda: keyed.tts.convert(text="Hi."))
    refusal(WebSocketError, lambda: list(client.tts.stream_websocket(fragments(), reference_id="nobody")))
    right = new.FishAudio(api_key="secret", base_url=KEYED_URL)
    busy = right.tts.stream_websocket([LONG])
    next(busy)
    full = refusal(RateLimitError, lambda: right.tts.convert(text="Hi."))
    busy.close()
    return [[each.message, each.status] for each in (unknown, key, full)]


@scenario
def old_half() -> dict[str, Any]:
    request = old.TTSRequest(text=TEXT, reference_id="awb", **CALM)
    (FOLDER / "old.mp3").write_bytes(b"".join(session.tts(request)))
    reference = old.ReferenceAudio(audio=SAMPLE, text=SAMPLE_TEXT)
    (FOLDER / "old-cloned.wav").write_bytes(
        b"".join(session.tts(old.TTSRequest(text=TEXT, format="wav", references=[reference])))
    )
    error = refusal(old.HttpCodeErr, lambda: list(session.tts(old.TTSRequest(text="Hi.", reference_id="nobody"))))
    wrong = old.Session("wrong", base_url=KEYED_URL)
    key = refusal(old.HttpCodeErr, lambda: list(wrong.tts(old.TTSRequest(text="Hi."))))
    model = refusal(old.HttpCodeErr, lambda: session.get_model("nobody"))
    return {"unknown": error.status, "key": key.status, "model": [model.status, model.message]}


@scenario
def old_socket() -> None:
    with old.WebSocketSession("any", base_url=URL) as live:
        for nth in range(2):
            request = old.TTSRequest(text="", reference_id="awb", **CALM)
            (FOLDER / f"old-socket{nth}.mp3").write_bytes(b"".join(live.tts(request, fragments())))
        nobody = old.TTSRequest(text="", reference_id="nobody")
        refusal(old.WebSocketErr, lambda: list(live.tts(nobody, fragments())))


@scenario
def old_models() -> dict[str, Any]:
    made = session.create_model(title="ours", voices=[SAMPLE], texts=[SAMPLE_TEXT])
    listed = session.list_models(page_size=50)
    shown = session.get_model(made.id)
    session.delete_model(made.id)
    return {"made": made.title, "listed": [model.title for model in listed.items], "shown": shown.title}


run()
