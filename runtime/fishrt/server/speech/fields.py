"""The fields of a request to speak: every spelling that clients use → one `Speak`.

Clients put fields at the top level of the JSON, in an object `extra_body`, and in the objects of `provider.options`; the first of
them that has a field wins. A field that is null is absent.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from ...audio.formats import bit_rate
from ...bundle.diffusion import Diffusion
from ...bundle.features import LanguageModel
from ...diffusion.denoising import Denoising
from ...errors import AudioError
from ...language_model.sampling import Sampling
from ...request import Request, VoiceLike
from ...text.split import SPEAKER, check_unicode, speakable
from ...voices.voice import Voice
from ..diffusion.fields import DIFFUSION, KEYS, LANGUAGE, DenoisingFields, denoising_of, number
from ..problems import Problem
from ..service import Service
from ..voices.references import AUDIO, TEXT, find_references
from ..words import expected

FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
OPENAI_RATE = 24_000
"""Sample rate of OpenAI's raw samples, in Hz: its clients take it for granted."""
MOST_SPEAKERS = 64
"""Most voices of one request."""
_MOST_OPTIONS = 16
"""Most objects in `provider.options`."""
_OPENAI_MODEL = re.compile(r"tts-1(-|$)|gpt-4o-mini-tts")

SPELLINGS = {
    "model": (),
    "input": ("text",),
    "voice": ("reference_id", "voice_id", "speaker"),
    "references": (),
    "ref_audio": AUDIO[1:],
    "ref_text": TEXT[1:],
    "response_format": ("format", "output_format"),
    "speed": ("prosody.speed",),
    "volume_db": ("prosody.volume",),
    "stream": ("streaming",),
    "stream_format": (),
    "sample_rate": (),
    "mode": (),
    "max_new_tokens": ("max_tokens",),
    "temperature": ("temp",),
    "top_p": (),
    "top_k": (),
    "repetition_penalty": (),
    "seed": (),
    "instructions": (),
    "speaker_prompt": (),
    "mp3_bitrate": (),
    "opus_bitrate": (),
}
"""Name of a field → the other spellings of it. All other fields change nothing here; a reply lists them."""


def _voice(value: Any) -> Any:
    """Return the name of a voice, from a name or OpenAI's object; a list gives the names of several speakers."""
    if isinstance(value, list) and value:
        if len(value) > MOST_SPEAKERS:
            raise ValueError(f"at most {MOST_SPEAKERS} voices are expected")
        return [_voice([] if isinstance(each, list) else each) for each in value]
    name = value.get("id") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise ValueError('a name, or an object such as {"id": "…"}, is expected')
    return name


def _format(value: Any) -> Any:
    """Return the name of a format: in any case, and by the name of its samples."""
    return {"pcm_s16le": "pcm"}.get(value.lower(), value.lower()) if isinstance(value, str) else value


_NAME = {"type": "string"}
_OPTIONAL = {"anyOf": [_NAME, {"type": "null"}]}
_CODES = {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}}
_REFERENCE = {"type": "object", "properties": {"audio": _NAME, "text": _NAME, "codes": _CODES}, "required": ["text"]}
_REFERENCES = {"anyOf": [{"type": "array", "items": _REFERENCE}, {"type": "null"}]}
_VOICE = {
    "anyOf": [
        _NAME,
        {"type": "object", "properties": {"id": _NAME}, "required": ["id"]},
        {"type": "array", "items": _NAME, "minItems": 1},
        {"type": "null"},
    ]
}


class SpeechFields(BaseModel):
    """What `POST /v1/audio/speech` takes. Every field but `input` may be left out or null; unknown fields are no error."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, json_schema_extra={"additionalProperties": True})

    model: str | None = Field(None, description="Any name: the loaded model speaks. OpenAI's names give pcm at 24 kHz.")
    input: str = Field(min_length=1, description="The text. Also: text.")
    voice: Annotated[Any, BeforeValidator(_voice), WithJsonSchema(_VOICE)] = Field(
        None,
        description="A voice, one of OpenAI's 13 names, or one for each speaker. Also: reference_id, voice_id, speaker.",
    )
    references: Annotated[Any, WithJsonSchema(_REFERENCES)] = Field(
        None, description="Recordings of the voice, or of the voice of each speaker. They go before `voice`."
    )
    ref_audio: Annotated[Any, WithJsonSchema(_OPTIONAL)] = Field(
        None,
        description="A recording: base64, data URL, or URL or file if the server allows it. Also: reference_audio, prompt_audio.",
    )
    ref_text: Annotated[Any, WithJsonSchema(_OPTIONAL)] = Field(
        None, description="The words of `ref_audio`. Also: reference_text, prompt_text."
    )
    response_format: Annotated[Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None, BeforeValidator(_format)] = Field(
        None, description="mp3 unless `stream` is true: then pcm, 16-bit little-endian mono samples. Also: format, output_format."
    )
    speed: Annotated[float | None, BeforeValidator(number)] = Field(
        None, ge=0.25, le=4, description="Speaking rate; the pitch stays. Also: prosody.speed."
    )
    volume_db: float | None = Field(None, ge=-20, le=20, description="Gain in dB. Also: prosody.volume.")
    stream: bool | None = Field(
        None, description="Send the audio while it is made. pcm is, unless this is false. Also: streaming."
    )
    stream_format: Literal["audio", "sse"] | None = Field(
        None, description="sse: server-sent events with base64 audio; audio: its bytes, while they are made."
    )
    sample_rate: int | None = Field(None, ge=4000, le=192_000, description="Sample rate of the audio in Hz.")
    mode: Literal["fast", "balanced", "quality"] | None = Field(
        None, description="Of a stream: fast has shorter first chunks, quality longer ones. The speech is the same."
    )
    max_new_tokens: int | None = Field(
        None,
        ge=0,
        description="Most frames of each piece of the text; 0 or more than the model's limit is that limit. Also: max_tokens.",
    )
    temperature: float | None = Field(None, ge=0, lt=2, description="0 is greedy. Also: temp.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1: every token may be drawn.")
    repetition_penalty: float | None = Field(None, ge=0.9, le=2, description="Ignored by models without one.")
    seed: int | None = Field(None, ge=0, lt=2**64, description="The same seed gives the same speech; the reply has it in X-Seed.")
    instructions: str | None = Field(None, max_length=4096, description="A style, for models that read tags in square brackets.")
    speaker_prompt: str | None = Field(None, description="Replaces the system text, for models that have one.")
    mp3_bitrate: int | None = Field(None, description="kbit/s: 64, 128 or 192.")
    opus_bitrate: int | None = Field(None, description="bit/s, or kbit/s below 1000; -1000 is automatic.")


def speech_schema(model: LanguageModel | Diffusion) -> dict[str, Any]:
    """Return the JSON schema of a request to such a model."""
    schema = SpeechFields.model_json_schema()
    if isinstance(model, Diffusion):
        own = {name: field for name, field in schema["properties"].items() if name not in LANGUAGE}
        schema["properties"] = own | DenoisingFields.model_json_schema()["properties"]
    return schema


@dataclass(frozen=True, slots=True)
class Speak:
    """A checked request, and the form of its reply."""

    request: Request
    format: str
    rate: int
    """Sample rate of the reply, in Hz."""
    stream: bool
    """Whether the reply is sent while it is made."""
    sse: bool
    bitrate: int | None
    """Of mp3 and opus, in kbit/s or bit/s; None: the encoder's."""
    ignored: tuple[str, ...]
    """Fields of the request that changed nothing, as the client spelt them."""
    style: str | None
    """In front of every text, for a model that reads tags."""

    def of(self, text: str, seed: int | None = None) -> Speak:
        """Return the same request for another text, and with another seed if one is given."""
        request = replace(self.request, text=_with_tag(text, self.style), seed=self.request.seed if seed is None else seed)
        return replace(self, request=request)

    @property
    def silent(self) -> bool:
        """Whether the text has nothing that is spoken, such as a full stop alone; it gives a short pause."""
        return not speakable(self.request.text)


async def speak_of(
    service: Service,
    *data: Mapping[str, Any],
    accept: str = "",
    usual: str = "mp3",
    lax: bool = False,
    lenient: bool = False,
    base: Denoising | None = None,
) -> Speak:
    """Return the checked request of a JSON object. Raises Problem.

    data: the object, and others with fields that it may leave out. accept: the header Accept. usual: the format of audio that is
    not streamed. lax: numbers and truth values may be text, as in a form. lenient: settings of the other kind of model are
    ignored. base: settings of a diffusion model behind those of the request.
    """
    model, codec = service.tts.bundle.manifest.model, service.tts.bundle.manifest.codec
    found, spelt, ignored = flatten(model, *data, lenient=lenient)
    try:
        fields = SpeechFields.model_validate(found, strict=not lax)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise Problem(400, f"{spelt.get(name, 'input (or text)')}: {expected(first)}", param=name) from None
    _check_text(service, fields)
    most = codec.max_frames if isinstance(model, LanguageModel) else model.max_frames
    limit = fields.max_new_tokens or None
    if limit is not None and limit > most:
        ignored.append(spelt["max_new_tokens"])
        limit = most if isinstance(model, LanguageModel) else None
    style = (fields.instructions or "").strip() or None
    if style and not (model.reads is not None and "[]" in model.reads.tags):
        ignored.append(spelt["instructions"])
        style = None
    sampling: Sampling | None = None
    denoising: Denoising | None = None
    if isinstance(model, LanguageModel):
        sampling, unused = _sampling(fields, model)
    else:
        denoising, unused = denoising_of(found, model, base, limit)
    ignored += [spelt[name] for name in unused]
    voices = await _voices(service, fields)
    request = Request(
        _with_tag(fields.input, style),
        voice=voices,
        sampling=sampling,
        denoising=denoising,
        seed=fields.seed,
        max_frames=limit if isinstance(model, LanguageModel) else None,
        system=fields.speaker_prompt,
        speed=fields.speed or 1.0,
        mode=fields.mode or "balanced",
        volume=10 ** ((fields.volume_db or 0) / 20),
    )
    sse = fields.stream_format == "sse" or (fields.stream_format is None and "text/event-stream" in accept.lower())
    kind = fields.response_format or ("pcm" if fields.stream else usual)
    bitrate = {"mp3": fields.mp3_bitrate, "opus": fields.opus_bitrate}.get(kind)
    try:
        bit_rate(kind, bitrate)
    except AudioError as error:
        raise Problem(400, f"{kind}_bitrate: {error}; {error.hint}", param=f"{kind}_bitrate") from None
    return Speak(
        request,
        kind,
        rate=_rate(service, fields, kind),
        stream=sse or bool(fields.stream) or fields.stream_format == "audio" or (kind == "pcm" and fields.stream is None),
        sse=sse,
        bitrate=bitrate,
        ignored=tuple(dict.fromkeys(ignored)),
        style=style,
    )


def _sampling(fields: SpeechFields, lm: LanguageModel) -> tuple[Sampling, list[str]]:
    """Return the settings of a language model, and the fields that change nothing."""
    unused = ["repetition_penalty"] if fields.repetition_penalty is not None and lm.sampling.repetition_penalty is None else []
    top_k = lm.vocab_size if fields.top_k in (0, -1) else fields.top_k
    return Sampling(fields.temperature, fields.top_p, top_k, None if unused else fields.repetition_penalty), unused


async def _voices(service: Service, fields: SpeechFields) -> VoiceLike | Sequence[VoiceLike] | None:
    """Return the voices of a request, as `Request.voice` takes them: its references, else those that it names."""
    given = {"references": fields.references, "ref_audio": fields.ref_audio, "ref_text": fields.ref_text, "voice": fields.voice}
    if references := find_references(given):
        return await service.references.voices(references)
    if not isinstance(fields.voice, list):
        return await asyncio.to_thread(service.library.resolve, fields.voice)
    voices: list[VoiceLike] = []
    for name in fields.voice:
        voice = await asyncio.to_thread(service.library.resolve, name)
        if not isinstance(voice, (str, Voice)):
            raise Problem(400, f"voice: {name!r:.80} is the voice of no speaker; name one for each", param="voice")
        voices.append(voice)
    return voices


def flatten(
    model: LanguageModel | Diffusion, *data: Mapping[str, Any], lenient: bool = False
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return the fields of a request by their names; by the same names how the client spelt them; and the fields without effect.

    Raises Problem for an `extra_body` that is no object, and for a setting of the other kind of model. lenient: it has no effect.
    """
    diffusion = isinstance(model, Diffusion)
    foreign = LANGUAGE if diffusion else DIFFUSION
    names = {**SPELLINGS, **(dict.fromkeys(KEYS, ()) if diffusion else {})}
    known = frozenset(chain.from_iterable((name, *others) for name, others in names.items()))
    known -= foreign
    found: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    ignored: list[str] = []
    for layer in chain.from_iterable(map(_layers, data)):
        given = {name: value for name, value in layer.items() if value is not None}
        other = next((name for name in given if name in foreign), None)
        if other and not lenient:
            what = f"the loaded model is {'a' if diffusion else 'no'} diffusion model and has no such setting"
            raise Problem(400, f"{other}: {what}", param=other)
        ignored += [name for name in given if name not in known]
        for name, others in names.items():
            spellings = [spelling for spelling in (name, *others) if spelling in given and spelling in known]
            ignored += spellings[1:]
            if spellings and name not in found:
                found[name], spelt[name] = given[spellings[0]], spellings[0]
    return found, spelt, ignored


def _layers(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the objects that hold fields, the first to win, with the keys of `prosody` and `provider` as prosody.KEY."""
    layer = {name: value for name, value in data.items() if name != "extra_body"}
    for name in ("prosody", "provider"):
        if isinstance(layer.get(name), dict):
            layer |= {f"{name}.{key}": value for key, value in layer.pop(name).items()}
    options = layer.get("provider.options")
    if isinstance(options, dict):
        del layer["provider.options"]
        if len(options) > _MOST_OPTIONS:
            raise Problem(400, f"provider.options: at most {_MOST_OPTIONS} objects are expected", param="provider")
    yield layer
    extra = data.get("extra_body")
    if extra is not None:
        if not isinstance(extra, dict):
            raise Problem(400, "extra_body: an object is expected", param="extra_body")
        yield from _layers({key: value for key, value in extra.items() if key != "extra_body"})
    for each in options.values() if isinstance(options, dict) else ():
        if isinstance(each, dict):
            yield from _layers({key: value for key, value in each.items() if key not in ("extra_body", "provider")})


def _check_text(service: Service, fields: SpeechFields) -> None:
    check_unicode(fields.input, "the text")
    most = service.settings.max_text_length
    if most and len(fields.input) > most:
        raise Problem(
            400,
            f"input: the text has {len(fields.input):,} characters; at most {most:,} are spoken",
            param="input",
            code="text_too_long",
        )
    if not fields.input.strip():
        raise Problem(400, "input: the text is empty", param="input")


def _with_tag(text: str, style: str | None) -> str:
    """Return the text with a style in front of its first words, as a tag in square brackets."""
    if style is None:
        return text
    tag = "[" + " ".join(style.replace("[", "(").replace("]", ")").split()) + "] "
    first = SPEAKER.match(text)
    return text[: first.end()] + tag + text[first.end() :] if first else tag + text


def _rate(service: Service, fields: SpeechFields, kind: str) -> int:
    if fields.sample_rate is not None:
        return fields.sample_rate
    if kind == "pcm" and service.settings.pcm_rate is not None:
        return service.settings.pcm_rate
    if kind == "pcm" and _OPENAI_MODEL.match(fields.model or ""):
        return OPENAI_RATE
    return service.tts.sample_rate
