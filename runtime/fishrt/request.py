"""A checked request to speak, and the checks of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ParamSpec, TypeVar

from .bundle.features import Codec
from .errors import ArgumentError, SamplingError
from .language_model.prompt import Conversation
from .language_model.sampling import Sampling
from .voices.voice import Voice

P = ParamSpec("P")
T = TypeVar("T")

LEAST_VOLUME, MOST_VOLUME = 0.01, 10.0


@dataclass(frozen=True, slots=True)
class Request:
    """A text to speak, and all settings of it, resolved."""

    pieces: list[str]
    voices: tuple[str, ...]
    """Names of the voices that speak."""
    conversation: Conversation
    sampling: Sampling
    """Resolved."""
    seed: int
    max_frames: int
    upstream_compat: bool
    volume: float
    levelled: Voice | None
    """The voice that is brought to TARGET_LUFS; None: no change of loudness."""
    provider: str
    warnings: list[str]
    """Doubts about the speech, except for pieces that ended early."""


def hints_at_sampling(method: Callable[P, T]) -> Callable[P, T]:
    """Wrap a method: a field of Sampling among its arguments raises ArgumentError with a hint at `sampling`."""
    settings = [field.name for field in fields(Sampling)]

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if given := [f"{name}={kwargs[name]!r}" for name in settings if name in kwargs]:
            raise ArgumentError(
                f"{method.__name__}() takes no argument {given[0].split('=')[0]}",
                hint=f"sampling=Sampling({', '.join(given)})",
            )
        return method(*args, **kwargs)

    return checked


def check_type(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Check that an argument is of one of `kinds`, which `wanted` describes. Raises ArgumentError otherwise."""
    if not isinstance(value, kinds):
        found = "None" if value is None else f"of type {type(value).__name__}"
        raise ArgumentError(f"{name} is {found}; {wanted} is expected")


def check_arguments(
    text: str,
    sampling: Sampling | None,
    seed: int | None,
    max_frames: int | None,
    system: str | None,
    volume: float,
    codec: Codec,
) -> None:
    """Check the types and ranges of a request's arguments; see `TTS.speak`. Raises ArgumentError, SamplingError."""
    check_type("text", text, str, "a str")
    check_type("sampling", sampling, (Sampling, type(None)), "a Sampling, such as Sampling(temperature=0.5)")
    check_type("system", system, (str, type(None)), "a str")
    if seed is not None and (not isinstance(seed, Integral) or seed < 0):
        raise SamplingError(f"the seed is {seed!r}", hint="it must be a whole number of at least 0")
    most = codec.max_frames
    if max_frames is not None and (not isinstance(max_frames, Integral) or not 1 <= max_frames <= most):
        raise SamplingError(
            f"max_frames is {max_frames!r}", hint=f"it must be a whole number from 1 to {most:,}, the codec's limit"
        )
    if not isinstance(volume, Real) or not LEAST_VOLUME <= volume <= MOST_VOLUME:
        raise SamplingError(f"the volume is {volume!r}", hint=f"it must be a factor from {LEAST_VOLUME} to {MOST_VOLUME:g}")
