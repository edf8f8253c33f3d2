"""Speak each line of a text into a file of its own: `python batch.py LINES [FOLDER]`. Several lines are spoken together."""

import sys
from pathlib import Path

from fishrt import TTS, FishrtError

if len(sys.argv) < 2:
    sys.exit(__doc__)
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "spoken")
folder.mkdir(parents=True, exist_ok=True)

lines = enumerate(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), 1)
left = [(number, line) for number, line in lines if line.strip()]

with TTS.load() as tts:
    while left:
        try:
            for speech in tts.speak_many((line for _, line in left.copy()), voice="awb", seed=6):
                speech.save(folder / f"{left[0][0]:03}.wav")
                left.pop(0)
        except FishrtError as error:  # of the first line that is left; the others are still spoken
            print(f"line {left.pop(0)[0]}: {error}", file=sys.stderr)
