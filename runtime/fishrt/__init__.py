"""Fish Speech text-to-speech from ONNX bundles, without torch.

tts = TTS.load()                                          # the embedded voice; or TTS.load("path/to/bundle")
speech = tts.speak("Hello!", seed=1)                      # speech.pcm: float32 [samples], speech.sample_rate: Hz
"""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import FishrtError
    from .sampling import Sampling
    from .speech import AudioChunk, Speech
    from .tts import TTS
    from .voices import Voice, VoiceStore

__all__ = ["TTS", "AudioChunk", "Bundle", "FishrtError", "Sampling", "Speech", "Voice", "VoiceStore", "__version__"]

_HOMES = {
    "TTS": "tts",
    "AudioChunk": "speech",
    "Bundle": "bundle",
    "FishrtError": "errors",
    "Sampling": "sampling",
    "Speech": "speech",
    "Voice": "voices",
    "VoiceStore": "voices",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used: a command that looks at a bundle needs no audio library."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
