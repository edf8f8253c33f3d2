"""Fish Speech text-to-speech from ONNX bundles, without torch.

tts = TTS.load()                                          # the embedded voice; or TTS.load("path/to/bundle")
speech = tts.speak("Hello!", seed=1)                      # speech.pcm: float32 [samples], speech.sample_rate: Hz
"""

from .bundle import Bundle
from .errors import FishrtError
from .sampling import Sampling
from .tts import TTS, AudioChunk, Speech
from .version import __version__
from .voices import Voice, VoiceStore

__all__ = ["TTS", "AudioChunk", "Bundle", "FishrtError", "Sampling", "Speech", "Voice", "VoiceStore", "__version__"]
