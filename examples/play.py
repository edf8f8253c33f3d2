"""Play speech on the sound card while it is made: `python play.py [TEXT]`. Needs `pip install "fishrt[play]"`."""

import sys

import sounddevice

from fishrt import TTS

text = (
    sys.argv[1]
    if len(sys.argv) > 1
    else "This is played while it is made. The first words are heard before the last ones are drawn."
)

with TTS.load() as tts, sounddevice.OutputStream(samplerate=tts.sample_rate, channels=1, dtype="float32") as card:
    for chunk in tts.stream(text, voice="awb", seed=7):
        card.write(chunk.pcm)  # returns when the card has room for more
