"""A request to speak: what the caller asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, get_args

from .audio.speed import FASTEST, SLOWEST
from .diffusion.denoising import Denoising
from .errors import ArgumentError, SamplingError
from .language_model.sampling import Sampling
from .voices.voice import Voice

LEAST_VOLUME, MOST_VOLUME = 0.01, 10.0

Mode = Literal["fast", "balanced", "quality"]
"""How soon the first sound of a stream comes, against the work that it takes; see `chunk_sizes`."""
VoiceLike = Voice | str
"""A voice, or the name of one of the user's or the bundle's voices."""


class Options(TypedDict, total=False):
    """The options of a `Request`, as keywords."""

    voice: VoiceLike | Sequence[VoiceLike] | None
    sampling: Sampling | None
    seed: int | None
    max_frames: int | None
    system: str | None
    volume: float
    speed: float
    mode: Mode
    upstream_compat: bool
    denoising: Denoising | None


@dataclass(frozen=True, slots=True)
class Request:
    """A text to speak, and how. Raises ArgumentError for a value of another type, SamplingError for one outside its range.

    `sampling`, `system` and `upstream_compat` are for language models, `denoising` is for diffusion models; a TTS refuses those
    of the other kind.

    Attributes:
        text: a text of any length; it is spoken in pieces.
        voice: one or several. Voice i speaks `<|speaker:i|>`; for a model without turns of speakers, all voices are one speaker.
            None: the bundle's default voice, or all of its voices, the default first, if the text has speaker tags. An empty
            list: no voice. A single voice is brought to the common loudness of all voices.
        sampling: None means the bundle's defaults.
        seed: at least 0; None draws one, which `SpeechInfo` has. The same seed and request give the same codes.
        max_frames: limit for each piece of text, at most the codec's or the diffusion model's; None means as many as model and
            codec allow. `SpeechInfo` says which pieces it cut off.
        system: replaces the model's usual instruction.
        volume: factor on all samples, 0.01 to 10.
        speed: factor on the speaking rate, 0.25 to 4, without another pitch. Any but 1 needs PyAV, which the extra server brings.
        mode: of a stream: "fast" halves the frames of its first chunks, "quality" quadruples them; the codes are the same.
        upstream_compat: the behaviour of the original to the letter, without the common loudness.
        denoising: None means the bundle's defaults.
    """

    text: str
    voice: VoiceLike | Sequence[VoiceLike] | None = None
    sampling: Sampling | None = None
    seed: int | None = None
    max_frames: int | None = None
    system: str | None = None
    volume: float = 1.0
    speed: float = 1.0
    mode: Mode = "balanced"
    upstream_compat: bool = False
    denoising: Denoising | None = None

    def __post_init__(self) -> None:
        check_type("text", self.text, str, "a str")
        for voice in self.voices or ():
            check_type("voice", voice, (str, Voice), "the name of a voice, a Voice, or a list of them")
        check_type("sampling", self.sampling, (Sampling, type(None)), "a Sampling, such as Sampling(temperature=0.5)")
        check_type("denoising", self.denoising, (Denoising, type(None)), "a Denoising, such as Denoising(steps=10)")
        check_type("system", self.system, (str, type(None)), "a str")
        if self.seed is not None and (not isinstance(self.seed, Integral) or self.seed < 0):
            raise SamplingError(f"the seed is {self.seed!r}", hint="it must be a whole number of at least 0")
        if self.mode not in get_args(Mode):
            raise ArgumentError(f"the mode is {self.mode!r}", hint=f"it must be one of {', '.join(get_args(Mode))}")
        for name, least, most in (("volume", LEAST_VOLUME, MOST_VOLUME), ("speed", SLOWEST, FASTEST)):
            value: float = getattr(self, name)
            if not isinstance(value, Real) or not least <= value <= most:
                raise SamplingError(f"the {name} is {value!r}", hint=f"it must be a factor from {least:g} to {most:g}")

    @classmethod
    def of(cls, text: str | Request, options: Mapping[str, Any]) -> Request:
        """Return the request for a text with these options, or a request with these changes.

        Raises ArgumentError for an option that a request does not have; for a field of Sampling or Denoising with a hint.
        """
        for option, kind in (("sampling", Sampling), ("denoising", Denoising)):
            if given := [f"{field.name}={options[field.name]!r}" for field in fields(kind) if field.name in options]:
                name = given[0].split("=")[0]
                raise ArgumentError(f"a request has no option {name}", hint=f"{option}={kind.__name__}({', '.join(given)})")
        known = [field.name for field in fields(cls) if field.init and field.name != "text"]
        if unknown := sorted(options.keys() - known):
            raise ArgumentError(f"a request has no option {unknown[0]}", hint=f"its options are {', '.join(known)}")
        return replace(text, **options) if isinstance(text, Request) else cls(text, **options)

    @property
    def voices(self) -> Sequence[VoiceLike] | None:
        """The voices as a list; None: the bundle's."""
        if self.voice is None or (isinstance(self.voice, Sequence) and not isinstance(self.voice, str)):
            return self.voice
        return [self.voice]

    def limit(self, most: int, whose: str) -> int:
        """Return the most frames of a piece of text. Raises SamplingError for a max_frames above `most`, `whose` limit it is."""
        if self.max_frames is None:
            return most
        if not isinstance(self.max_frames, Integral) or not 1 <= self.max_frames <= most:
            raise SamplingError(
                f"max_frames is {self.max_frames!r}", hint=f"it must be a whole number from 1 to {most:,}, {whose} limit"
            )
        return int(self.max_frames)


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Check that an argument is of one of `kinds`, which `wanted` describes. Raises ArgumentError otherwise."""
    if not isinstance(value, kinds):
        found = "None" if value is None else f"of type {type(value).__name__}"
        raise ArgumentError(f"{name} is {found}; {wanted} is expected")
