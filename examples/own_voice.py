"""Speak like a recording: `python own_voice.py RECORDING TRANSCRIPT [TEXT]`. The embedded voice imitates people poorly."""

import sys

from fishrt import TTS, Voice

if len(sys.argv) < 3:
    sys.exit(__doc__)
recording, transcript = sys.argv[1:3]
text = sys.argv[3] if len(sys.argv) > 3 else "Now I speak like the recording."

with TTS.load() as tts:
    voice = Voice.from_audio(tts, recording, transcript)  # encode once, use often
    tts.speak(text, voice=voice, seed=7).save("own-voice.wav")
