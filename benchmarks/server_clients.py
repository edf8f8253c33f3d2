"""Clients of a server, or threads beside each other, that measure what they hear: used by `server.py`.

`python server_clients.py http URL CLIENTS REQUESTS FRAMES` and `… threads BUNDLE CLIENTS REQUESTS FRAMES` print JSON. Each client
sends one request after the other, for at most FRAMES frames each, reads the samples as they come, and plays them: sound that
comes later than its turn is a gap.
"""

from __future__ import annotations

import http.client
import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TEXTS = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background, and press it down.",
    "It is easy to tell the depth of a well.",
    "These days a chicken leg is a rare dish, and rice is often served in round bowls.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
)
Parts = Iterator[float]
"""Seconds of sound in each part of a reply, as it comes."""


def listen(parts: Parts, begun: float) -> dict[str, float]:
    """Play a reply. Return the times of its first sound and its end, its duration, and the seconds of silence within it."""
    first, heard_until, audio_s, dry_s = 0.0, 0.0, 0.0, 0.0
    for seconds in parts:
        now = time.perf_counter()
        if not audio_s:
            first = heard_until = now
        dry_s += max(0.0, now - heard_until)
        heard_until = max(heard_until, now) + seconds
        audio_s += seconds
    return {"first_s": first - begun, "total_s": time.perf_counter() - begun, "audio_s": audio_s, "dry_s": dry_s}


def run(speak: Callable[[str, int], Parts], clients: int, requests: int) -> dict[str, Any]:
    """Let clients speak at the same time, each some requests. Return what each request gave, and the seconds of all."""
    found: list[dict[str, float]] = []
    ready = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        ready.wait()
        for n in range(requests):
            seed = number * requests + n
            found.append(listen(speak(TEXTS[seed % len(TEXTS)], seed), time.perf_counter()))

    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    return {"requests": found, "wall_s": time.perf_counter() - begun}


def over_http(url: str, frames: int) -> Callable[[str, int], Parts]:
    """Return how a client speaks by a server: samples are streamed. Without a seed, nothing comes from a cache."""
    where = urlsplit(url)

    def speak(text: str, seed: int) -> Parts:
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=600)
        body = {"input": text, "response_format": "pcm", "stream": True, "max_new_tokens": frames}
        connection.request("POST", "/v1/audio/speech", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise SystemExit(f"the server answered {reply.status}: {reply.read(500)!r}")
        rate = int(reply.headers["X-Audio-Sample-Rate"])
        while part := reply.read1(1 << 16):
            yield len(part) / 2 / rate
        connection.close()

    return speak


def in_threads(bundle: str, frames: int) -> Callable[[str, int], Parts]:
    """Return how a thread speaks by itself with the models that all threads share."""
    from fishrt import TTS

    tts = TTS.load(Path(bundle) if bundle != "minnow" else None, provider="cpu")
    tts.speak(TEXTS[0], max_frames=2)

    def speak(text: str, seed: int) -> Parts:
        for chunk in tts.stream(text, max_frames=frames):
            if len(chunk):
                yield chunk.duration_s

    return speak


if __name__ == "__main__":
    way, place, *counts = sys.argv[1:]
    clients, requests, frames = map(int, counts)
    done = run({"http": over_http, "threads": in_threads}[way](place, frames), clients, requests)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({**done, "cpu_s": used.ru_utime + used.ru_stime}))
