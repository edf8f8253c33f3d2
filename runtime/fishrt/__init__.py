"""Fish Speech text-to-speech from ONNX bundles, without torch.

Speak and save:

    from fishrt import TTS

    with TTS.load() as tts:                          # the embedded voice; or TTS.load("path/to/bundle")
        speech = tts.speak("Hello!", seed=1)         # speech.pcm: float32 [samples], speech.sample_rate: Hz
        speech.save("hello.wav")                     # or .flac, .ogg, .opus, .mp3

Play while it is made, one chunk of audio after the other:

    for chunk in tts.stream("A long text."):         # async for chunk in tts.astream(…) does not block an event loop
        play(chunk.pcm)

Speak as somebody else, from a recording and its exact words:

    voice = Voice.from_audio(tts, "anna.wav", "What Anna says in the recording.")
    tts.speak("Hello!", voice=voice, sampling=Sampling(temperature=0.5))

All errors are FishrtErrors; `error.hint` is the remedy. Warnings are in `speech.info.warnings`; the log `fishrt` says that there
are some.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .bundle.folder import Bundle
    from .diffusion.denoising import Denoising
    from .errors import FishrtError
    from .language_model.sampling import Sampling
    from .request import Request
    from .speech import AudioChunk, Speech
    from .tts import TTS
    from .voices.store import VoiceStore
    from .voices.voice import Voice

__all__ = [
    "TTS",
    "AudioChunk",
    "Bundle",
    "Denoising",
    "FishrtError",
    "Request",
    "Sampling",
    "Speech",
    "Voice",
    "VoiceStore",
    "__version__",
]

_HOMES = {
    "TTS": "tts",
    "AudioChunk": "speech",
    "Bundle": "bundle.folder",
    "Denoising": "diffusion.denoising",
    "FishrtError": "errors",
    "Request": "request",
    "Sampling": "language_model.sampling",
    "Speech": "speech",
    "Voice": "voices.voice",
    "VoiceStore": "voices.store",
}


def __dir__() -> list[str]:
    return list(__all__)


if not TYPE_CHECKING:  # a type checker that sees it accepts every name

    def __getattr__(name):
        """Import a public name when it is first used: a command that looks at a bundle needs no audio library."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module(f".{_HOMES[name]}", __name__), name)
