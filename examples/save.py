"""Speak a text into a file: `python save.py [FILE] [TEXT]`."""

import sys

from fishrt import TTS

path, text = (*sys.argv[1:], *("hello.wav", "Good morning. Please close the door.")[len(sys.argv) - 1 :])

with TTS.load() as tts:
    speech = tts.speak(text, voice="awb", seed=6)  # the same seed gives the same speech

speech.save(path)  # .wav, .flac, .ogg, .opus or .mp3
print(f"{path}: {speech.duration_s:.1f} s at {speech.sample_rate} Hz, seed {speech.info.seed}")
