"""The errors of the runtime: leaves of FishrtError, one for each kind of a user's mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fishrt_engines.errors import FishrtError, GraphError, ProviderError

if TYPE_CHECKING:
    from .speech import Speech

__all__ = [
    "ArgumentError",
    "AudioError",
    "BundleError",
    "BusyError",
    "FishrtError",
    "GraphError",
    "HubError",
    "KeptVoiceError",
    "OutputError",
    "PromptError",
    "ProviderError",
    "SamplingError",
    "TakenVoiceError",
    "TimeLimitError",
    "UnfinishedError",
    "UnknownVoiceError",
    "VoiceError",
]


class ArgumentError(FishrtError, TypeError):
    """An argument of a call is of the wrong type, or its name is unknown."""


class BundleError(FishrtError):
    """A bundle is missing, damaged, incomplete, or of a schema that this version does not read."""


class HubError(FishrtError):
    """A repository of the Hugging Face Hub cannot be found, read or stored."""


class PromptError(FishrtError):
    """The text cannot be spoken: empty, not UTF-8, or longer than the model's context."""


class VoiceError(FishrtError):
    """A voice or its codes are missing, damaged, out of range, or belong to another codec."""


class UnknownVoiceError(VoiceError):
    """No voice has the given name."""


class TakenVoiceError(VoiceError):
    """A voice has the name that a new one should get."""


class KeptVoiceError(VoiceError):
    """A voice cannot be changed: it belongs to the bundle, or another program made it."""


class AudioError(FishrtError):
    """Audio cannot be read or encoded, or is too short or too long."""


class OutputError(FishrtError):
    """A result cannot be written to its place."""


class SamplingError(FishrtError):
    """A sampling parameter, a seed or a limit of frames is outside its range."""


class BusyError(FishrtError):
    """Too many requests wait."""

    def __init__(self, waiting: int, retry_s: int) -> None:
        """waiting: number of requests. retry_s: seconds after which there should be room."""
        super().__init__(f"{waiting} requests wait already", hint=f"try again in {retry_s} s")
        self.waiting, self.retry_s = waiting, retry_s

    def __reduce__(self) -> tuple[type[BusyError], tuple[int, int]]:
        return BusyError, (self.waiting, self.retry_s)


class TimeLimitError(FishrtError):
    """A request waited longer than it was allowed to."""

    def __init__(self, waited_s: float, retry_s: int) -> None:
        """waited_s: seconds of the wait. retry_s: seconds after which there should be room."""
        super().__init__(f"the request waited {waited_s:.2f} s, longer than it may", hint=f"try again in {retry_s} s")
        self.waited_s, self.retry_s = waited_s, retry_s

    def __reduce__(self) -> tuple[type[TimeLimitError], tuple[float, int]]:
        return TimeLimitError, (self.waited_s, self.retry_s)


class UnfinishedError(FishrtError):
    """A request failed after a part of the text, `speech`, was spoken. The cause is the error that ended it."""

    def __init__(self, cause: FishrtError, speech: Speech) -> None:
        super().__init__(str(cause), hint=cause.hint)
        self.speech = speech

    def __reduce__(self) -> tuple[type[UnfinishedError], tuple[FishrtError, Speech]]:
        return UnfinishedError, (FishrtError(str(self), hint=self.hint), self.speech)
