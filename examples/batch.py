"""Speak each line of a text into a file of its own: `python batch.py LINES [FOLDER]`. The graphs are loaded once."""

import sys
from pathlib import Path

from fishrt import TTS, FishrtError

if len(sys.argv) < 2:
    sys.exit(__doc__)
folder = Path(sys.argv[2] if len(sys.argv) > 2 else "spoken")
folder.mkdir(parents=True, exist_ok=True)

with TTS.load() as tts:
    for number, line in enumerate(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            tts.speak(line, voice="awb", seed=6).save(folder / f"{number:03}.wav")
        except FishrtError as error:  # the other lines are still spoken
            print(f"line {number}: {error}", file=sys.stderr)
