"""A server that is killed while voices are uploaded: what it confirmed is there, and nothing is there in part."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
from pathlib import Path
from threading import Thread

import pytest

pytest.importorskip("fastapi", reason="needs the server extra")

from fishrt import VoiceStore
from serving import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")]

SOUND = (Path(__file__).parents[2] / "export/minnow/references/slt/reference.flac").read_bytes()
WORDS = "Please call my brother, and ask him to bring the big blue bag from the kitchen."


def upload(server: Server, name: str) -> int:
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in {"name": name, "ref_text": WORDS}.items()
    ]
    parts.append('--x\r\nContent-Disposition: form-data; name="audio_sample"; filename="a.flac"\r\n\r\n')
    body = "".join(parts).encode() + SOUND + b"\r\n--x--\r\n"
    connection = server.connect()
    connection.request("POST", "/v1/audio/voices", body, {"Content-Type": "multipart/form-data; boundary=x"})
    reply = connection.getresponse()
    reply.read()
    return reply.status


def test_a_killed_server_keeps_what_it_confirmed(tmp_path: Path) -> None:
    rng, confirmed, store = random.Random(1), set[str](), VoiceStore(tmp_path / "voices")

    def uploading(server: Server, prefix: str) -> None:
        try:
            for n in range(1000):
                if upload(server, f"{prefix}-{n}") == 200:
                    confirmed.add(f"{prefix}-{n}")
        except (OSError, http.client.HTTPException):
            return

    for turn in range(4):
        with serving(tmp_path) as server:
            before = len(confirmed)
            threads = [Thread(target=uploading, args=(server, f"turn{turn}{letter}")) for letter in "ab"]
            for thread in threads:
                thread.start()
            while len(confirmed) < before + 2:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            server.process.kill()
            for thread in threads:
                thread.join()
        assert store.left_out() == {}
        assert confirmed <= set(store.list())
    with serving(tmp_path) as server:
        listed = json.loads(server.ask("GET", "/v1/voices?format=names").read())
        assert confirmed <= set(listed)
        for name in store.list():
            voice = store.load(name)
            assert voice.transcript == WORDS
            assert store.is_recorded(name)
        assert server.ask("POST", "/v1/audio/speech", {"input": "Hi.", "voice": max(confirmed)}).status == 200
