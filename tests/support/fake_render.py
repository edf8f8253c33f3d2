"""Jobs of `fishrt render` with a voice that takes no time: its sound is made of the row's digest.

As a program, it runs a job of some rows in children that it kills at random instants: `python fake_render.py OUT KILLS SEED`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fishrt.audio.encode import encode_audio
from fishrt.bulk.render import RenderJob, Speakable
from fishrt.errors import FishrtError
from fishrt.jobs.engine import Report, Work, run
from fishrt.jobs.folder import Made
from fishrt.jobs.threads import in_threads
from fishrt.request import Request
from helpers_text import manifest, voice

RATE = 8000


class FakeVoice:
    """A worker that says a tone for each row; "fail" in a text is an error of the row."""

    def __init__(self, batch: int = 1, wait: Callable[[], object] = lambda: None) -> None:
        self.batch, self._wait = batch, wait
        self.said: list[str] = []

    def compute(self, payload: Speakable) -> Made:
        self._wait()
        self.said.append(payload.request.text)
        if "fail" in payload.request.text:
            raise FishrtError("the model ended before it said anything", hint="try another seed")
        return Made(said(payload.digest, payload.format), {"seed": payload.request.seed, "seconds": 0.05, "stop": ["end"]})

    def close(self) -> None:
        pass


def said(digest: str, format: str) -> bytes:
    """The file of a row."""
    sound = (np.sin(np.arange(400) * (1 + int(digest[:4], 16)) * 1e-4) * 0.5).astype(np.float32)
    return encode_audio(sound, RATE, format, f"fishrt {digest} end")


def fake_tts() -> Any:
    """Return what `RenderJob` asks of a TTS."""
    found = manifest()

    def check(request: Request, *_: object) -> None:
        if not any(map(str.isalnum, request.text)):
            raise FishrtError("there is nothing to speak in the text", hint="give some words")

    def named(name: str) -> Any:
        if name == "nobody":
            raise FishrtError("there is no voice 'nobody'")
        return replace(voice(name), transcript=f"I am {name}.")

    return SimpleNamespace(
        bundle=SimpleNamespace(manifest=found), bundle_sha256="00", provider="cpu", voice=named, job=check, sample_rate=RATE
    )


def rendered(
    rows: bytes | Iterable[Mapping[str, Any]],
    out: Path,
    worker: FakeVoice | None = None,
    *,
    job: Any = None,
    work: Work | None = None,
    **options: Any,
) -> Report:
    """Run a job of rows with the fake voice. job: further arguments of `RenderJob`. work: in place of threads."""
    data = rows if isinstance(rows, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    settings = {"kind": "jsonl", "base": Path(), "defaults": Request(""), "format": "wav", "batch": 1, **(job or {})}
    made = RenderJob(fake_tts(), data, settings.pop("kind"), out, **settings)
    return run(made, out, work or in_threads(worker or FakeVoice()), **options)


def rows_of(count: int, text: str = "Line") -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "text": f"{text} {n}."} for n in range(count)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(out: Path) -> list[str]:
    """All files of a folder but locks, sorted."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and not path.name.startswith(".lock"))


def kill_often(out: Path, kills: int, seed: int) -> None:
    """Begin jobs whose rows change between runs, and kill each after a random time, of which a whole job takes most."""

    def begin(folder: Path, take: str) -> int:
        child = os.fork()
        if child == 0:
            rows = [*rows_of(12, f"Take {take}"), {"id": "bad", "text": "fail"}]
            rendered(rows, folder, FakeVoice(batch=2, wait=lambda: time.sleep(0.0004)))
            os._exit(0)
        return child

    begun = time.monotonic()
    os.waitpid(begin(out.with_name("timed"), "one"), 0)
    most_s, chance = 1.2 * (time.monotonic() - begun), random.Random(seed)
    for n in range(kills):
        child = begin(out, str(n // 8))
        time.sleep(chance.random() * most_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    kill_often(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
